"""The text in a PNG is what AUTOMATIC1111 writes: read back here by the rules of its own reader."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.engine.types import Catalogue
from app.infotext import SAMPLERS, SCHEDULERS, infotext
from models.base import GenerationParams, Img2Img, Lora
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
