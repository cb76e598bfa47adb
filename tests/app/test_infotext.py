"""The text in a PNG is what AUTOMATIC1111 writes: read back here by the rules of its own reader."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app import infotext as written
from app.engine.types import Catalogue
from app.http.apis.a1111_payload import Options, read_payload
from app.infotext import SAMPLERS, SCHEDULERS, drawn_with, fields_of, infotext, text_chunks
from models.base import FreeU, GenerationParams, Img2Img, Inpaint, Lora, Upscaler
from models.sampling.samplers import DIFFUSION, choices
from tests.app.fakes import FakeEngine

# modules/infotext_utils.py of version 1.10, `re_param` and `re_imagesize`
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def restored(text: str) -> dict[str, str]:
    """As its `parse_generation_parameters` does: the last line holds the settings, the first ones the prompts."""
    *lines, last = text.strip().split("\n")
    found = dict(PARAMETER.findall(last))
    found["Prompt"] = lines[0]
    found["Negative prompt"] = lines[1].removeprefix("Negative prompt: ") if len(lines) > 1 else ""
    return found


def params(**fields: object) -> GenerationParams:
    return GenerationParams(prompt="a forest", **fields)  # type: ignore[arg-type]


def test_a_picture_by_a_named_pair_with_a_lora() -> None:
    drawn = params(
        negative_prompt="fog",
        width=768,
        height=512,
        steps=25,
        guidance_scale=7.0,
        sampler="dpmpp_2m",
        scheduler="karras",
        clip_skip=2,
        loras=(
            Lora(name="ink", path=Path("unread"), weight=0.8),
            Lora(name="glow", path=Path("unread"), weight=1.0, text_weight=0.5),
        ),
    )
    found = restored(infotext(drawn, 4, "tiny-sd", "deepcache"))
    assert found == {
        "Prompt": "a forest <lora:ink:0.8> <lora:glow:0.5:1>",
        "Negative prompt": "fog",
        "Steps": "25",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7",
        "Seed": "4",
        "Size": "768x512",
        "Model": "tiny-sd",
        "Clip skip": "2",
        "Cache": "deepcache",
        "Version": found["Version"],
    }


def test_our_own_reader_reads_it_so_too() -> None:
    odd = Upscaler(name='4x, Seed: 9 "sharp"', path=Path("x"))
    drawn = params(negative_prompt="fog, Steps: 3", width=768, steps=25, sampler="dpmpp_2m", upscale=odd)
    theirs = restored(text := infotext(drawn, 4, "tiny-sd", "deepcache"))
    theirs |= {"Size-1": "768", "Size-2": "512", "Postprocess upscaler": odd.name}
    assert written.restored(text) == theirs
    assert written.restored("") == {}
    assert written.restored("a fog,\nSteps: to come") == {"Prompt": "a fog,\nSteps: to come", "Negative prompt": ""}


@pytest.mark.parametrize("part", ["a", 'a:"', 'a:"\\"', "a:,", "\n", " "])
def test_whatever_stands_there_is_read_in_one_go(part: str) -> None:
    """Each takes hours where the time grows with the square of the length."""
    assert "Steps" not in written.restored(part * 10**6)


def test_a_picture_s_settings_are_ours_or_theirs() -> None:
    drawn = params(negative_prompt="fog", steps=25, guidance_scale=7.5, sampler="dpmpp_2m", scheduler="karras")
    texts = text_chunks(drawn, 4, "tiny-sd", "none", {})
    names = ("prompt", "negative_prompt", "model", "steps", "seed", "width", "height", "guidance_scale", "sampler")
    expected = ("a forest", "fog", "tiny-sd", 25, 4, 512, 512, 7.5, "dpmpp_2m")
    for found in (drawn_with(texts), drawn_with({"parameters": texts["parameters"]})):
        assert tuple(found[name] for name in names) == expected
        assert found["scheduler"] == "karras"
    odd = {"wavespeed": "[1]", "parameters": "a\nSteps: 3, Sampler: none, Seed: many, x: 1"}
    assert drawn_with(odd) == {"prompt": "a", "negative_prompt": "", "steps": 3}
    assert drawn_with({"wavespeed": "{"}) == {}


def test_what_the_request_left_to_the_model_is_left_out() -> None:
    found = restored(infotext(params(), 0, "m", "none"))
    assert {"Sampler", "Schedule type", "Clip skip", "Denoising strength", "Hires upscale"}.isdisjoint(found)


def test_hires_fix_is_told_as_there_by_the_first_size() -> None:
    found = restored(infotext(params(width=1024, height=768, hires_fix=True), 0, "m", "none"))
    assert {name: found[name] for name in ("Size", "Hires upscale", "Hires upscaler", "Denoising strength")} == {
        "Size": "512x384",
        "Hires upscale": "2",
        "Hires upscaler": "Lanczos",
        "Denoising strength": "0.5",
    }


def test_img2img_tells_its_strength() -> None:
    drawn = params(img2img=Img2Img(picture=Image.new("RGB", (8, 8)), denoise=0.75))
    assert restored(infotext(drawn, 0, "m", "none"))["Denoising strength"] == "0.75"


def test_a_mask_is_told_by_the_names_it_has_there() -> None:
    picture = Image.new("RGB", (8, 8))
    told = {"Mask blur": "4"}
    closer = {"Mask blur": "0", "Masked content": "latent noise", "Inpaint area": "Only masked"}
    closer |= {"Masked area padding": "0"}
    for inpaint, expected in (
        (Inpaint(mask=picture), told),
        (Inpaint(mask=picture, blur=0, fill="noise", padding=0), closer),
    ):
        found = restored(infotext(params(img2img=Img2Img(picture=picture, inpaint=inpaint)), 0, "m", "none"))
        assert {name: text for name, text in found.items() if "ask" in name or "paint" in name} == expected


def test_guidance_in_a_part_is_told_by_the_name_it_has_there() -> None:
    found = restored(infotext(params(guidance_start=0.25, guidance_end=0.8), 0, "m", "none"))
    assert (found["Skip Early CFG"], found["Guidance end"]) == ("0.25", "0.8")
    assert {"Skip Early CFG", "Guidance end"}.isdisjoint(restored(infotext(params(), 0, "m", "none")))
    asked, _ = read_payload({"prompt": "a", "override_settings": {"skip_early_cond": 0.25}}, Options)
    assert asked.guidance_start == 0.25


def test_upscalers_are_told_by_their_names_which_pose_as_no_setting() -> None:
    odd = Upscaler(name='4x, Seed: 9 "sharp"', path=Path("x"))
    found = restored(infotext(params(hires_fix=True, hires_upscaler=odd, upscale=odd), 5, "m", "none"))
    assert found["Seed"] == "5"
    assert json.loads(found["Hires upscaler"]) == json.loads(found["Postprocess upscaler"]) == odd.name


def test_freeu_is_told_with_its_factors() -> None:
    found = restored(infotext(params(freeu=FreeU(b1=1.5, b2=1.6, s1=0.9, s2=0.2)), 0, "m", "none"))
    assert {name: found[f"FreeU {name}"] for name in ("b1", "b2", "s1", "s2")} == {
        "b1": "1.5", "b2": "1.6", "s1": "0.9", "s2": "0.2",
    }  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.ours)
def test_every_sampler_has_the_name_that_is_read_there(sampler: object) -> None:
    found = restored(infotext(params(sampler=sampler.ours), 0, "m", "none"))  # type: ignore[attr-defined]
    assert found["Sampler"] == sampler.name  # type: ignore[attr-defined]


def test_every_scheduler_has_the_label_that_is_read_there() -> None:
    labels = {scheduler.ours: scheduler.label for scheduler in SCHEDULERS if scheduler.ours}
    for ours, label in labels.items():
        assert restored(infotext(params(sampler="euler", scheduler=ours), 0, "m", "none"))["Schedule type"] == label


@pytest.mark.parametrize("engine", ["fake"], indirect=True)  # replicas tell of their own models
@pytest.mark.parametrize(
    ("fields", "pair"),
    [
        ({"sampler": "DPM++ 2M Karras"}, ("dpmpp_2m", "karras")),
        ({"sampler": "Euler a"}, ("euler_ancestral", None)),
        ({"sampler": "euler", "scheduler": "Karras"}, ("euler", "karras")),
        ({"sampler": "DPM++ 2M", "scheduler": "normal"}, ("dpmpp_2m", "normal")),
    ],
)
async def test_names_of_other_programs_are_taken(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, str], pair: tuple[str, str | None]
) -> None:
    engine.models = with_samplers(engine.models)
    answer = await client.post("/api/generate", json={"prompt": "a", "width": 64, "height": 64, **fields})
    assert answer.status_code == 200, answer.text
    drawn = engine.submitted[-1].params
    assert (drawn.sampler, drawn.scheduler) == pair


def with_samplers(catalogue: Catalogue) -> Catalogue:
    """The fakes' model, with all samplers that there are."""
    models = dict(catalogue.models)
    models["fine"] = replace(models["fine"], samplers=choices(DIFFUSION))
    return replace(catalogue, models=models)


async def test_a_name_that_nobody_knows_is_refused_with_those_that_there_are(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/generate", json={"prompt": "a", "sampler": "DPM++ 7M Karras"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "sampler")
    assert "euler" in answer.json()["error"]["message"]


@pytest.mark.parametrize("floor", [None, 40.0])
def test_a_wish_is_restored_as_a_wish(floor: float | None) -> None:
    """What it came to may be settings that no field names."""
    chosen = {"asked_speedup": 3.0, "asked_steps": 20, "floor_db": floor, "steps": 18}
    texts = text_chunks(params(steps=18), 4, "tiny-sd", "fitted", {"strategy": "fitted", "chosen": chosen})
    fields = fields_of(drawn_with(texts))
    assert (fields["cache_speedup"], fields["steps"], fields.get("cache_floor")) == (3.0, 20, floor)
    assert not any(name.startswith(("deepcache", "fbcache")) for name in fields)
