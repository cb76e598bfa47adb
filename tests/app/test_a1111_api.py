"""/sdapi without a socket: names, what is refused and with which remedy. A client's package talks to it in tests/."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from app.errors import Invalid
from app.infotext import SAMPLERS, SCHEDULERS, pair
from models.sampling.samplers import DIFFUSION, choices
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_bad_input import JSON, assert_refused


def png(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURE, MASK = png("black"), png("white")


@pytest.mark.parametrize(
    ("sampler", "scheduler", "ours"),
    [
        ("Euler a", None, ("euler_ancestral", None)),
        ("Euler a", "automatic", ("euler_ancestral", None)),
        ("k_euler_a", "Automatic", ("euler_ancestral", None)),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M Karras", "Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "uniform", ("dpmpp_2m", "normal")),
        ("DPM++ 2M SDE", None, ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE Karras", None, ("dpmpp_2m_sde", "karras")),
        ("Euler SGM Uniform", None, ("euler", "sgm_uniform")),
        ("DPM2 a", "align_your_steps", ("dpm2_ancestral", "ays")),
        ("PLMS", None, ("pndm", None)),
        ("dpmpp_3m_sde", "Normal", ("dpmpp_3m_sde", "normal")),
    ],
)
def test_names_are_told_apart(sampler: str, scheduler: str | None, ours: tuple[str, str | None]) -> None:
    found, named = pair(sampler, scheduler)
    assert (found.ours, named) == ours


def test_every_sampler_has_a_name_there_and_takes_what_automatic_stands_for() -> None:
    pairs = choices(DIFFUSION)
    assert {sampler.ours for sampler in SAMPLERS} == set(pairs)
    for sampler in SAMPLERS:
        assert sampler.automatic is None or sampler.automatic in pairs[sampler.ours]
    assert {scheduler.ours for scheduler in SCHEDULERS} - {None} == set().union(*pairs.values())


@pytest.mark.parametrize(
    ("sampler", "scheduler", "field"),
    [
        ("DPM adaptive", None, "sampler_name"),
        ("Euler\ud800", None, "sampler_name"),
        ("Karras", None, "sampler_name"),
        ("Euler", "Simple", "scheduler"),
        ("DPM++ 2M Karras", "Exponential", "scheduler"),
    ],
)
def test_names_that_are_not_there_are_refused(sampler: str, scheduler: str | None, field: str) -> None:
    with pytest.raises(Invalid) as refused:
        pair(sampler, scheduler)
    assert refused.value.field == field
    refused.value.message.encode()


# members as JSON text, type, field, words of the answer
REFUSED = [
    ('"n_iter": 11', "invalid", "n_iter", "10"),
    ('"n_iter": 0', "invalid", "n_iter", "1"),
    ('"n_iter": 4, "batch_size": 3', "invalid", "n_iter", "4 × 3"),
    ('"batch_size": 1e999', "invalid", "batch_size", "integer"),
    ('"n_iter": 1000000000', "invalid", "n_iter", "10"),
    ('"sampler_name": 5', "invalid", "sampler_name", "string"),
    ('"sampler_name": "\\ud800"', "invalid", "sampler_name", "surrogate"),
    ('"sampler_name": "Euler a"', "invalid", "sampler", "euler"),
    ('"sampler_name": "Euler", "scheduler": "beta"', "invalid", "scheduler", "karras"),
    ('"eta": NaN', "invalid", "eta", "finite"),
    ('"sampler_name": "DDIM", "eta": 1.0', "unsupported", "eta", "eta 0"),
    ('"denoising_strength": 2', "invalid", "denoising_strength", "1"),
    ('"cfg_scale": NaN', "invalid", "guidance_scale", "finite"),
    ('"width": 1e9', "invalid", "width", "2048"),
    ('"seed": -2', "invalid", "seed", "-1"),
    ('"styles": ["a"]', "unsupported", "styles", "prompt"),
    ('"styles": "\\ud800"', "unsupported", "styles", "prompt"),
    ('"subseed_strength": 0.5', "unsupported", "subseed_strength", "not mixed"),
    ('"subseed_strength": false', "unsupported", "subseed_strength", "not mixed"),
    ('"s_churn": 1', "unsupported", "s_churn", "no such setting"),
    ('"save_images": "no"', "unsupported", "save_images", "kept nowhere"),
    ('"steps": 4.5', "invalid", "steps", "integer"),
    ('"clip_skip": 2, "override_settings": {"CLIP_stop_at_last_layers": 3}', "invalid",
     "override_settings.CLIP_stop_at_last_layers", "once"),
    ('"script_name": "x/y plot"', "unsupported", "script_name", "WaveSpeed"),
    ('"enable_hr": true', "unsupported", "hr_upscaler", "Lanczos"),
    ('"enable_hr": true, "hr_upscaler": "Lanczos"', "unsupported", "denoising_strength", "half strength"),
    ('"override_settings": 5', "invalid", "override_settings", "dictionary"),
    ('"override_settings": {"CLIP_stop_at_last_layers": 99}', "invalid", "clip_skip", "12"),
    ('"override_settings": {"samples_format": "tiff"}', "invalid", "output_format", "png"),
    ('"override_settings": {"sd_vae": "x.ckpt"}', "unsupported", "override_settings.sd_vae", "VAE"),
    ('"override_settings": {"\\ud800": 1}', "unsupported", "override_settings.\\ud800", "no setting"),
    ('"alwayson_scripts": {"ADetailer": {"args": [true, false, {"ad_model": "hand_yolov8n.pt"}]}}', "unsupported",
     "alwayson_scripts.ADetailer", "adetailer"),
    ('"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "face_yolov8n.pt", "ad_prompt": "b"}]}}', "unsupported",
     "alwayson_scripts.ADetailer", "adetailer"),
    ('"alwayson_scripts": {"ControlNet": "x"}', "unsupported", "alwayson_scripts.ControlNet", "WaveSpeed"),
    ('"alwayson_scripts": {"WaveSpeed": {"args": []}}', "invalid", "alwayson_scripts.WaveSpeed", "/api/generate"),
    ('"alwayson_scripts": {"WaveSpeed": {"args": [{"x": 1}]}}', "invalid", "x", "no field"),
    ('"prompt": "a <lora:x:much>"', "invalid", "prompt", "<lora:name:0.8>"),
    ('"prompt": "a <lora:x:nan>"', "invalid", "loras.0.weight", "finite"),
    ('"prompt": "a <lora:x:1:1:8>"', "invalid", "prompt", "<lora:name:te=0.5:unet=0.8>"),
    ('"prompt": "a <lora:x:1:lbw=ALL>"', "invalid", "prompt", "<lora:name:te=0.5:unet=0.8>"),
    ('"prompt": "a <lora:../../x:1>"', "invalid", "loras.0.name", "LoRA"),
    ('"prompt": "a <hypernet:x:1>"', "invalid", "prompt", "<lora:name:0.8>"),
    ('"sampler_nam": "Euler"', "invalid", "sampler_nam", "'sampler_name'"),
    ('"init_images": ["x"]', "invalid", "init_images", "no field"),
    ('"deepcache_interval": 11', "invalid", "deepcache_interval", "10"),
    ('"deepcache_enabled": true, "override_settings": {"deepcache_enabled": false}', "invalid",
     "override_settings.deepcache_enabled", "once"),
]  # fmt: skip
REFUSED_IMG2IMG = [
    ('"init_images": []', "invalid", "init_images", "1 item"),
    (f'"init_images": ["{PICTURE}", "{PICTURE}"]', "invalid", "init_images", "1 item"),
    ('"init_images": ["/etc/passwd"]', "invalid", "img2img_image", "not read"),
    ('"init_images": ["http://169.254.169.254/"]', "invalid", "img2img_image", "nothing is fetched"),
    ('"init_images": [5]', "invalid", "init_images.0", "string"),
    ('"width": 512', "invalid", "init_images", "required"),
    (
        f'"init_images": ["{PICTURE}"], "mask": "{PICTURE}", "inpainting_fill": 0',
        "unsupported",
        "inpainting_fill",
        "noise",
    ),
    (
        f'"init_images": ["{PICTURE}"], "mask": "{PICTURE}", "inpaint_full_res": "x"',
        "unsupported",
        "inpaint_full_res",
        "0",
    ),
    (
        f'"init_images": ["{PICTURE}"], "mask": "{PICTURE}", "inpainting_mask_invert": 1',
        "unsupported",
        "inpainting_mask_invert",
        "inverted",
    ),
    (
        f'"init_images": ["{PICTURE}"], "mask": "{PICTURE}", "mask_blur_x": 4, "mask_blur_y": 8',
        "invalid",
        "mask_blur_y",
        "once",
    ),
    (f'"init_images": ["{PICTURE}"], "mask": 5', "invalid", "mask", "string"),
    (f'"init_images": ["{PICTURE}"], "latent_mask": "{PICTURE}"', "unsupported", "latent_mask", "as mask"),
    (f'"init_images": ["{PICTURE}"], "width": 768', "invalid", "resize_mode", "set resize_mode to 1"),
    (f'"init_images": ["{PICTURE}"], "resize_mode": 3', "invalid", "resize_mode", "2"),
    (f'"init_images": ["{PICTURE}"], "enable_hr": true', "unsupported", "enable_hr", "hires_fix"),
    (f'"init_images": ["{PICTURE}"], "deepcache_enabled": true', "incompatible", "deepcache_enabled", "img2img"),
    (f'"init_images": ["{PICTURE}"], "img2img_denoise": 0.5', "invalid", "denoising_strength", "once"),
    (
        f'"init_images": ["{PICTURE}"], "alwayson_scripts": {{"ADetailer": {{"args": [true, true, '
        '{"ad_model": "face_yolov8n.pt"}]}}',
        "unsupported",
        "alwayson_scripts.ADetailer",
        "adetailer",
    ),
]


@pytest.mark.parametrize(
    ("address", "members", "kind", "field", "words"),
    [("txt2img", *row) for row in REFUSED] + [("img2img", *row) for row in REFUSED_IMG2IMG],
)
async def test_what_would_change_nothing_or_is_wrong_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, address: str, members: str, kind: str, field: str, words: str
) -> None:
    prompt = "" if '"prompt"' in members else '"prompt": "a", '
    response = await client.post(f"/sdapi/v1/{address}", content=f"{{{prompt}{members}}}", headers=JSON)
    assert_refused(response, 422, kind, field, words)
    assert engine.submitted == []


async def drawn(client: httpx.AsyncClient, body: dict[str, Any], address: str = "txt2img") -> dict[str, Any]:
    response = await client.post(f"/sdapi/v1/{address}", json={"prompt": "a", "sampler_name": "Euler", **body})
    assert response.status_code == 200, response.text
    info: dict[str, Any] = json.loads(response.json()["info"])
    return info


async def test_hires_is_ours_where_it_is_the_same(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    same = {"enable_hr": True, "hr_upscaler": "Lanczos", "hr_scale": 2, "denoising_strength": 0.5, "width": 256}
    await drawn(client, same)
    params = engine.submitted[0].params
    assert (params.hires_fix, params.width, params.height) == (True, 512, 1024)


async def test_what_is_idle_there_is_idle_here(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    idle = {"mask_blur": 4, "image_cfg_scale": 1.5, "subseed": 7, "inpaint_full_res": True, "hr_upscaler": "Latent"}
    info = await drawn(client, {**idle, "init_images": [PICTURE], "seed": None, "batch_size": None}, "img2img")
    assert info["denoising_strength"] == engine.submitted[0].params.img2img.denoise == 0.75  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("original", 4, 0)),
        ({"inpainting_fill": 2, "mask_blur": 8, "inpaint_full_res_padding": 16}, ("noise", 8, 16)),
        (
            {"inpaint_full_res": False, "mask_blur_x": 2, "mask_blur_y": 2, "inpainting_mask_invert": 0},
            ("original", 2, None),
        ),
    ],
)
async def test_a_mask_is_drawn_within(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], expected: tuple[str, int, int | None]
) -> None:
    await drawn(client, {**fields, "init_images": [PICTURE], "mask": MASK}, "img2img")
    inpaint = engine.submitted[0].params.img2img.inpaint  # type: ignore[union-attr]
    assert inpaint is not None
    assert (inpaint.fill, inpaint.blur, inpaint.padding) == expected


# member as JSON, the field that the report's warnings name
TAKEN = [
    ({"save_images": True}, ["save_images"]),
    ({"send_images": False}, ["send_images"]),
    ({"override_settings_restore_afterwards": False}, ["override_settings_restore_afterwards"]),
    ({"styles": [""], "sampler_name": "", "scheduler": "", "steps": 4.0, "seed": 7.0, "batch_size": 1.0}, []),
    ({"sampler_name": "DDIM", "eta": 0}, []),
    ({"url": "http://a/", "auth": "me:secret", "hr_additional_modules": [], "force_task_id": "x"}, []),
    ({"clip_skip": 2, "override_settings": {"CLIP_stop_at_last_layers": 2.0, "sd_vae": ""}}, []),
    ({"clip_skip": 1, "override_settings": {"sd_model_checkpoint": "flux", "CLIP_stop_at_last_layers": 1}}, []),
    ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False, "weight": 1.0}, {"enabled": False}]}}}, []),
    ({"alwayson_scripts": {"ADetailer": {"args": [False, False, {"ad_model": "face_yolov8n.pt"}]}}}, []),
    (
        {"alwayson_scripts": {"ADetailer": {"args": [True, {"ad_model": "None"}, {"ad_tab_enable": False}]}, "x": {}}},
        [],
    ),
    ({"alwayson_scripts": {"ADetailer": {"args": [True, True, {"ad_model": "face_yolov8n.pt"}]}}}, ["ADetailer"]),
]


@pytest.mark.parametrize(("members", "named"), TAKEN)
async def test_what_changes_no_picture_is_taken_and_named_where_it_asked_for_something(
    client: httpx.AsyncClient, members: dict[str, Any], named: list[str]
) -> None:
    info = await drawn(client, members)
    said = [warning for warning in info["wavespeed"]["warnings"] if not warning.startswith("The fake")]
    assert len(said) == len(named)
    assert all(name in warning for name, warning in zip(named, said, strict=True))


async def test_whole_numbers_and_empty_names_are_read_as_they_are_meant(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await drawn(client, {"sampler_name": "", "sampler_index": "DDIM", "steps": 4.0, "clip_skip": 2, "n_iter": 2.0})
    params = engine.submitted[0].params
    assert (params.sampler, params.steps, params.clip_skip, len(params.seeds)) == ("ddim", 4, 2, 2)
    await drawn(client, {"alwayson_scripts": {"ADetailer": {"args": [True, True, {"ad_model": "face_yolov8n.pt"}]}}})
    assert engine.submitted[1].params.adetailer is True


async def test_the_prompt_s_loras_are_taken_out_of_it(engine: FakeEngine, tmp_path: Any) -> None:
    for name in ("ink", "wash"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(16))
    async with client_of(engine, lora_folder=tmp_path) as client:
        await drawn(client, {"prompt": "a <lora:ink:0.5>forest<lora:wash>"})
        listed = (await client.get("/sdapi/v1/loras")).json()
    params = engine.submitted[0].params
    assert params.prompt == "a forest"
    assert [(lora.name, lora.weight) for lora in params.loras] == [("ink", 0.5), ("wash", 1.0)]
    assert [row["path"] for row in listed] == ["ink", "wash"]


@pytest.mark.parametrize(
    ("tag", "weights"),
    [
        ("<lora:ink:0.5>", (0.5, None)),
        ("<lyco:ink:0.5>", (0.5, None)),
        ("<lora:ink:0.3:0.8>", (0.8, 0.3)),  # the text encoders' first, as AUTOMATIC1111 reads it
        ("<lora:ink:te=0.3:unet=0.8>", (0.8, 0.3)),
        ("<lora:ink:0.8:te=0>", (0.0, None)),
        ("<lora:ink:unet=0.8>", (0.8, 1.0)),
        ("<lora:style/ink:0.5:0.5>", (0.5, None)),
    ],
)
async def test_a_tag_may_give_the_text_encoders_a_strength_of_their_own(
    engine: FakeEngine, tmp_path: Any, tag: str, weights: tuple[float, float | None]
) -> None:
    for name in ("ink", "style/ink"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(16))
    async with client_of(engine, lora_folder=tmp_path) as client:
        await drawn(client, {"prompt": f"a forest {tag}"})
    (lora,) = engine.submitted[0].params.loras
    assert (lora.weight, lora.text_weight) == weights
    assert lora.name == tag.split(":")[1].rstrip(">")


async def test_keys_open_it_as_bearer_and_as_password_and_only_here(engine: FakeEngine) -> None:
    def basic(text: str) -> dict[str, str]:
        return {"authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    async with client_of(engine, api_keys="a-key") as client:

        async def status(address: str, headers: dict[str, str]) -> int:
            return (await client.get(address, headers=headers)).status_code

        there = "/sdapi/v1/sd-models"
        assert await status(there, {"authorization": "Bearer a-key"}) == 200
        assert await status(there, basic("user:a-key")) == 200
        for wrong in ({}, basic("a-key"), basic("a-key:"), basic("user:"), {"authorization": "Basic \x7f"}):
            assert await status(there, wrong) == 401
        assert await status("/api/models", basic("user:a-key")) == 401
        assert await status("/sdapi/v1/progress", {}) == 401


async def test_a_progress_that_is_asked_for_badly_is_refused_in_our_shape(client: httpx.AsyncClient) -> None:
    response = await client.get("/sdapi/v1/progress?skip_current_image=%00")
    assert_refused(response, 422, "invalid", "skip_current_image", "boolean")
