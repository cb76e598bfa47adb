"""What public clients send, by the field lists of their sources: connect, list, choose a model, draw, follow, give up.

SillyTavern's src/endpoints/stable-diffusion.js, Open WebUI's routers/images.py, LibreChat's StableDiffusion.js and
OpenAIImageTools.js, LiteLLM's openai_compatible_transformation.py, Krita's plugin cyanic-sd-krita (sdapi_v1.py),
LightDiffusion-Next's frontend/src (useStore.ts, client.ts). Their packages talk to a socket in tests/clients.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import zlib
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from app.engine.types import DeviceMemory
from app.http.foreign import LIGHTDIFFUSION
from models.embedded import CONTROLNETS
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_bad_input import assert_refused
from tests.app.test_engine import until
from tests.app.test_jobs import BODY, served
from tests.app.test_pictures import chunk, encoded, png

SD = "/sdapi/v1"
SIZE = {"width": 512, "height": 512}
# name → where it looks first, the lists that it fetches, what it draws with, what of that the report names
AUTOMATIC: dict[str, tuple[str, list[str], dict[str, Any], list[str]]] = {
    "SillyTavern": (
        f"{SD}/options",
        ["sd-models", "samplers", "schedulers", "upscalers", "latent-upscale-modes", "sd-vae", "progress"],
        {
            "url": "http://localhost:7861", "auth": "me:secret", "prompt": "a", "negative_prompt": "b", **SIZE,
            "sampler_name": "DDIM", "scheduler": "normal", "steps": 20, "cfg_scale": 7, "restore_faces": False,
            "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1.5, "hr_additional_modules": [],
            "denoising_strength": 0.7, "hr_second_pass_steps": 0, "override_settings": {"CLIP_stop_at_last_layers": 1},
            "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
            "do_not_save_grid": False, "do_not_save_samples": False,
        },
        ["save_images"],
    ),
    "Open WebUI": (
        f"{SD}/options",
        ["sd-models"],
        {"prompt": "a", "negative_prompt": "b", "batch_size": 1, "steps": 50, **SIZE},
        [],
    ),
    "LibreChat": (
        f"{SD}/options",
        [],
        {"prompt": "a", "negative_prompt": "b", "cfg_scale": 4.5, "steps": 22, "width": 1024, "height": 1024},
        [],
    ),
    "Krita": (
        "/queue/status",
        [
            *("sd-models", "sd-vae", "samplers", "upscalers", "face-restorers", "prompt-styles", "scripts", "loras"),
            *("embeddings", "hypernetworks", "options"),
        ],
        {
            **SIZE, "save_images": True, "prompt": "a", "negative_prompt": "b", "batch_size": 1, "n_iter": 1,
            "cfg_scale": 7.0, "seed": -1, "subseed": -1, "subseed_strength": 0.0, "enable_hr": False, "steps": 20,
            "override_settings": {"sd_vae": "Automatic"}, "override_settings_restore_afterwards": False,
            "sampler_name": "Euler",
        },
        ["save_images", "override_settings_restore_afterwards"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTOMATIC)
async def test_clients_of_automatic1111_connect_list_choose_a_model_and_draw(name: str) -> None:
    first, lists, body, named = AUTOMATIC[name]
    engine = FakeEngine()
    async with client_of(engine) as client:
        assert (await client.get(first)).status_code == 200
        for one in lists:
            assert (await client.get(f"{SD}/{one}")).status_code == 200
        settings = (await client.get(f"{SD}/options")).json()
        changed = (
            {"sd_model_checkpoint": "flux"} if name == "SillyTavern" else {**settings, "sd_model_checkpoint": "flux"}
        )
        assert (await client.post(f"{SD}/options", json=changed)).json() is None
        assert (await client.get(f"{SD}/options")).json() == {**settings, "sd_model_checkpoint": "flux"}
        answer = await client.post(f"{SD}/txt2img", json=body)
        assert answer.status_code == 200, answer.text
        assert Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).width == body["width"]
        info = json.loads(answer.json()["info"])
    assert (engine.submitted[0].model, info["sd_model_name"]) == ("flux", "flux")
    assert "secret" not in answer.text
    said = [warning for warning in info["wavespeed"]["warnings"] if "fake" not in warning]
    assert [warning.partition(" ")[0] for warning in said] == named


@pytest.mark.parametrize("name", AUTOMATIC)
async def test_they_follow_their_request_and_give_it_up(name: str) -> None:
    nursery = Nursery()
    async with served(nursery) as client:
        drawing = asyncio.create_task(client.post(f"{SD}/txt2img", json=AUTOMATIC[name][2]))
        await nursery.reach("step 2")
        async with asyncio.timeout(30):
            while not (seen := (await client.get(f"{SD}/progress")).json())["progress"]:
                await asyncio.sleep(0)
        assert (seen["state"]["job_count"], seen["state"]["skipped"], seen["state"]["interrupted"]) == (1, False, False)
        assert 0 < seen["progress"] < 1
        await client.post(f"{SD}/interrupt", json={})
        assert (await drawing).status_code == 409
        nursery.gate.open(100)
        idle = (await client.get(f"{SD}/progress")).json()
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)


# What each adds to prompt and model: OpenAI's own names, and what a user may have set.
IMAGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Open WebUI": ({"n": 1, "size": "512x512", "response_format": "b64_json"}, []),
    "LibreChat": ({"n": 1, "background": "auto", "output_format": "png", "quality": "auto", "size": "auto"}, []),
    "LiteLLM": (
        {
            "n": 1, "size": "512x512", "quality": "high", "style": "natural", "response_format": "b64_json",
            "user": "u", "background": "opaque", "moderation": "auto", "output_format": "jpeg",
            "output_compression": 100, "seed": 5,
        },
        ["quality", "style"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
async def test_clients_of_openai_list_and_draw(client: httpx.AsyncClient, name: str) -> None:
    fields, named = IMAGES[name]
    models = [row["id"] for row in (await client.get("/v1/models")).json()["data"]]
    answer = await client.post("/v1/images/generations", json={"model": models[0], "prompt": "a", **fields})
    assert answer.status_code == 200, answer.text
    assert base64.b64decode(answer.json()["data"][0]["b64_json"])
    said = [warning for warning in answer.json()["warnings"] if "fake" not in warning]
    assert [warning.partition(" ")[0] for warning in said] == named


# LightDiffusion-Next's page as it starts, without the fields of a refiner and of guidance that ends early.
PAGE: dict[str, Any] = {
    "prompt": "a", "negative_prompt": "b", **SIZE, "num_images": 1, "batch_size": 1, "steps": 20, "cfg_scale": 7.0,
    "seed": -1, "scheduler": "karras", "sampler": "euler", "model_path": "", "img2img_mode": False,
    "img2img_denoise": 0.75, "controlnet_enabled": False, "controlnet_strength": 1.0, "controlnet_type": "canny",
    "hiresfix": False, "adetailer": False, "enhance_prompt": False, "stable_fast": False, "reuse_seed": False,
    "keep_models_loaded": True, "enable_preview": True, "preview_fidelity": "balanced",
    "persist_prompt_history": False, "enable_multiscale": False, "multiscale_preset": "disabled",
    "multiscale_factor": 0.5, "multiscale_fullres_start": 10, "multiscale_fullres_end": 8,
    "multiscale_intermittent_fullres": True, "deepcache_enabled": False, "deepcache_interval": 3, "deepcache_depth": 2,
    "tome_enabled": False, "tome_ratio": 0.5, "torch_compile": False, "vae_autotune": False, "fp8_inference": False,
}  # fmt: skip
SERVER: dict[str, Any] = {  # and what its server has beside that, by default
    "realistic_model": False, "multiscale_preset": "balanced", "multiscale_intermittent": True,
    "tome_max_downsample": 1, "batched_cfg": True, "dynamic_cfg_rescaling": False, "dynamic_cfg_method": "variance",
    "dynamic_cfg_percentile": 95.0, "dynamic_cfg_target_scale": 7.0, "adaptive_noise_enabled": False,
    "adaptive_noise_method": "complexity", "controlnet_model": None, "torch_compile": None, "vae_autotune": None,
    "weight_quantization": None, "guidance_scale": None, "model_path": None, "img2img_image": None,
}  # fmt: skip


@pytest.mark.parametrize("body", [PAGE, {"prompt": "a", "sampler": "euler", "scheduler": "karras", **SERVER}])
async def test_what_lightdiffusion_next_sends_by_itself_draws(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await client.post("/api/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert {name for name in LIGHTDIFFUSION if any(name in warning for warning in answer.json()["warnings"])} == set()


async def test_its_names_are_ours_and_what_changes_no_picture_is_named(engine: FakeEngine) -> None:
    body = {
        **PAGE, "model_path": "fine", "hiresfix": True, "cfg_scale": 5, "enable_multiscale": True,
        "multiscale_intermittent_fullres": False, "img2img_mode": True,
        "img2img_image": base64.b64encode(encoded(Image.new("RGB", (64, 64)))).decode(),
    }  # fmt: skip
    ignored = {"keep_models_loaded": False, "preview_fidelity": "high", "persist_prompt_history": True}
    async with client_of(engine) as client:
        answer = await client.post(
            "/api/generate", json={**body, **ignored, "batched_cfg": False, "vae_autotune": True}
        )
    assert answer.status_code == 200, answer.text
    (job,) = engine.submitted
    assert (job.model, job.params.hires_fix, job.params.guidance_scale) == ("fine", True, 5)
    assert job.params.img2img is not None
    assert job.params.multiscale is not None
    assert job.params.multiscale.intermittent is False
    said = {warning.partition(" ")[0] for warning in answer.json()["warnings"]}
    assert ignored.keys() <= said


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"enhance_prompt": True}, "enhance_prompt", "as it is written"),
        ({"reuse_seed": True}, "reuse_seed", "seed"),
        ({"realistic_model": True}, "realistic_model", "model"),
        ({"tome_enabled": True}, "tome_enabled", "deepcache_enabled"),
        ({"dynamic_cfg_rescaling": True}, "dynamic_cfg_rescaling", "guidance_rescale"),
        ({"adaptive_noise_enabled": True}, "adaptive_noise_enabled", "sampler"),
        ({"weight_quantization": "fp8"}, "weight_quantization", "models file"),
        ({"fp8_inference": True}, "fp8_inference", "models file"),
        ({"input_image_path": "/etc/passwd"}, "input_image_path", "img2img_image"),
        ({"enable_multiscale": True, "multiscale_preset": "balanced"}, "multiscale_preset", "multiscale_factor"),
        ({"preview_fidelity": "ultra"}, "preview_fidelity", "'balanced'"),
        ({"batched_cfg": 1}, "batched_cfg", "true, false"),
    ],
)
async def test_what_it_has_and_we_have_not_is_refused_with_the_remedy(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], field: str, words: str
) -> None:
    answer = await client.post("/api/generate", json={"prompt": "a", **fields})
    assert_refused(answer, 422, "unsupported", field, words)
    assert engine.submitted == []


async def test_two_names_of_one_field_are_refused(client: httpx.AsyncClient) -> None:
    for one, other in (("hiresfix", "hires_fix"), ("img2img_mode", "img2img_enabled")):
        answer = await client.post("/api/generate", json={"prompt": "a", one: True, other: True})
        assert_refused(answer, 422, "invalid", one, other)


async def test_a_request_is_given_up_by_the_api_that_it_came_by() -> None:
    nursery = Nursery()
    async with served(nursery) as client:
        drawing = asyncio.create_task(client.post("/api/generate", json=BODY))
        await until(lambda: nursery.gate.at == "text")
        waiting = asyncio.create_task(client.post("/api/jobs", json=BODY))
        assert (await waiting).status_code == 202
        telemetry = (await client.get("/api/telemetry")).json()
        assert (telemetry["pending_by_signature"], telemetry["running_count"]) == ({"fine": 1}, 1)
        assert telemetry["pending_avg_wait_s"] >= 0
        assert (await client.post(f"{SD}/interrupt")).json() == {}
        assert not drawing.done()
        for _ in range(2):  # the second finds nothing
            assert (await client.post("/api/interrupt")).json() == {"status": "interrupted"}
        assert (await drawing).json()["error"]["type"] == "cancelled"
        identity = (await waiting).json()["id"]
        nursery.gate.open(100)
        await client.get(f"/api/jobs/{identity}/events")
        assert (await client.get(f"/api/jobs/{identity}")).json()["state"] == "done"


async def test_telemetry_has_lightdiffusion_next_s_keys_and_no_prompt(engine: FakeEngine) -> None:
    async with client_of(engine, max_batch_size=3) as client:
        before = (await client.get("/api/telemetry")).json()
        await client.post("/api/generate", json={"prompt": "a secret wish", "num_images": 2})
        after = await client.get("/api/telemetry")
    assert (before["last_batch_time"], before["items_processed"], before["pending_by_signature"]) == (None, 0, {})
    found = after.json()
    assert (found["items_processed"], found["max_batch_size"], found["max_images_per_group"]) == (2, 3, 3)
    assert found["last_batch_time"] >= found["server_start_ts"]
    assert (found["pipeline_import_ok"], found["pipeline_import_error"]) == (True, None)
    assert (found["loaded_models_count"], found["batch_timeout"]) == (len(found["loaded_models"]), 0.5)
    assert "secret" not in after.text
    async with client_of(FakeEngine(ready=False)) as client:
        waiting = (await client.get("/api/telemetry")).json()
    assert waiting["pipeline_import_ok"] is False
    assert "cpu is starting" in waiting["pipeline_import_error"]


async def test_a_model_is_chosen_for_the_caller_alone() -> None:
    engine = FakeEngine()
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    chosen = {"sd_model_checkpoint": "flux"}
    async with client_of(engine, api_keys=("one", "two")) as client:

        async def model_of(headers: dict[str, str], **fields: Any) -> str:
            answer = await client.post(f"{SD}/txt2img", json={"prompt": "a", **fields}, headers=headers)
            assert answer.status_code == 200, answer.text
            return engine.submitted[-1].model

        assert (await client.post(f"{SD}/options", json=chosen, headers=one)).status_code == 200
        assert [await model_of(one), await model_of(two)] == ["flux", "fine"]
        assert await model_of(one, override_settings={"sd_model_checkpoint": "fine"}) == "fine"
        assert await model_of(one, model="fine") == "fine"
        assert await model_of(one, flux_enabled=True) == "flux"
        for body in ({"sd_model_checkpoint": "no"}, {"sd_model_checkpoint": 5}, {**chosen, "deepcache_enabled": True}):
            refused = await client.post(f"{SD}/options", json=body, headers=two)
            assert refused.status_code in (404, 422)
        assert await model_of(two) == "fine"
        await client.post("/v1/images/generations", json={"prompt": "a"}, headers=one)
        assert engine.submitted[-1].model == "fine"
        assert (await client.post(f"{SD}/options", json={"sd_model_checkpoint": None}, headers=one)).status_code == 200
        assert await model_of(one) == "fine"


async def test_callers_are_forgotten_before_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.http.apis.a1111.MOST_CHOICES", 2)
    keys = ("one", "two", "three")
    async with client_of(FakeEngine(), api_keys=keys) as client:
        for key in (*keys, "two"):
            headers = {"Authorization": f"Bearer {key}"}
            await client.post(f"{SD}/options", json={"sd_model_checkpoint": "flux"}, headers=headers)
        found = [(await client.get(f"{SD}/options", headers={"Authorization": f"Bearer {key}"})).json() for key in keys]
    assert [settings["sd_model_checkpoint"] for settings in found] == ["fine", "flux", "flux"]


async def test_what_automatic1111_tells_of_itself(tmp_path: Any) -> None:
    (tmp_path / "ink.safetensors").write_bytes(bytes(16))
    async with client_of(FakeEngine(), embedding_folder=tmp_path) as client:

        async def get(name: str) -> Any:
            answer = await client.get(f"{SD}/{name}")
            assert answer.status_code == 200, name
            return answer.json()

        memory = await get("memory")
        assert memory["ram"]["total"] == memory["ram"]["used"] + memory["ram"]["free"]
        assert memory["cuda"] == {"error": "unavailable"}
        assert (await get("cmd-flags"))["api"] is True
        assert list((await get("embeddings"))["loaded"]) == ["ink"]
        assert {(row["name"], row["is_img2img"]) for row in await get("script-info")} == {
            ("wavespeed", False),
            ("wavespeed", True),
        }
        assert await get("extensions") == []
        assert (await client.get("/api/controlnets")).json() == {"models": [*CONTROLNETS]}
        for name in ("checkpoints", "loras", "embeddings", "vae"):
            assert (await client.post(f"{SD}/refresh-{name}")).json() is None


async def test_a_gpu_s_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    memory = DeviceMemory(total=8, used=3, allocated=2, reserved=3, peak=5)
    status = engine.status()
    device = replace(status.devices[0], memory=memory)
    monkeypatch.setattr(engine, "status", lambda: replace(status, devices=(device, device)))
    async with client_of(engine) as client:
        cuda = (await client.get(f"{SD}/memory")).json()["cuda"]
    assert cuda["system"] == {"free": 10, "used": 6, "total": 16}
    assert (cuda["allocated"], cuda["reserved"]["current"]) == ({"current": 4, "peak": 10}, 6)


async def test_a_picture_tells_what_it_was_drawn_with(client: httpx.AsyncClient) -> None:
    fields = {"seed": 7, "steps": 3, "cfg_scale": 5.5, "sampler": "euler", "scheduler": "karras", "model": "fine"}
    drawn = await client.post("/api/generate", json={"prompt": "a fog", "negative_prompt": "b", **fields})
    picture = {"image": "data:image/png;base64," + drawn.json()["image"]}
    told = (await client.post(f"{SD}/png-info", json=picture)).json()
    assert told["info"] == told["items"]["parameters"]
    assert {name: told["parameters"][name] for name in ("Prompt", "Seed", "Sampler", "Size-1")} == {
        "Prompt": "a fog", "Seed": "7", "Sampler": "Euler", "Size-1": "512",
    }  # fmt: skip
    metadata = (await client.post("/api/images/metadata", json=picture)).json()["metadata"]
    del fields["model"]
    assert metadata == {"prompt": "a fog", "negative_prompt": "b", **SIZE, **fields, "model_path": "fine"}
    again = (await client.post("/api/images/metadata", json=picture)).json()["fields"]
    assert (await client.post("/api/generate", json=again)).json()["image"] == drawn.json()["image"]
    for kind in ("JPEG", "WEBP", "PNG"):
        mute = {"image": base64.b64encode(encoded(Image.new("RGB", (8, 8)), kind)).decode()}
        empty = await client.post(f"{SD}/png-info", json=mute)
        assert empty.json() == {"info": "", "items": {}, "parameters": {}}
        assert (await client.post("/api/images/metadata", json=mute)).json() == {"metadata": {}, "fields": {}}


def texts(count: int) -> bytes:
    """A PNG whose few bytes hold so many MiB of text."""
    body = b"\0\0" + zlib.compress(b"a" * (2**20 - 100))
    return png(8, 8, *(chunk(b"zTXt", f"text {number}".encode() + body) for number in range(count)))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "image"),
        ({"image": 5}, "base64"),
        ({"image": "/etc/passwd"}, "nothing is fetched"),
        ({"image": "http://169.254.169.254/"}, "nothing is fetched"),
        ({"image": base64.b64encode(b"GIF89a").decode()}, "no picture"),
        ({"image": base64.b64encode(texts(3)).decode()}, "characters of text"),
        ({"image": base64.b64encode(texts(1)).decode(), "more": 1}, "image"),
        ({"image": base64.b64encode(png(8, 8)[:40]).decode()}, "image"),
    ],
)
@pytest.mark.parametrize("address", [f"{SD}/png-info", "/api/images/metadata"])
async def test_a_picture_with_nothing_to_read_is_refused(
    client: httpx.AsyncClient, address: str, body: dict[str, Any], words: str
) -> None:
    assert_refused(await client.post(address, json=body), 422, "invalid", "image", words)
