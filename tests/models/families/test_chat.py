"""FLUX.2 and Z-Image at small width: equal to the plain pipelines, cached, and each picture by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cache import FirstBlockCache, NoCache
from models.base import GenerationParams, ModelSpec
from models.families import FAMILIES
from models.generation import LoadedModel
from models.libraries import quiet
from models.run import sibling_of
from tests.models.families.chat import TEXT_LENGTH, save_all
from tests.models.test_generation import generators, ignore, pixels

FAMILIES_OF_CHAT = ("flux2-klein", "flux2-klein-base", "z-image", "z-image-turbo")
PARAMS = GenerationParams(
    prompt="a misty forest", width=64, height=64, steps=4, guidance_scale=3.0, seeds=(7, 8), batch_size=2
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folders = save_all(tmp_path_factory.mktemp("chat"))
    return {
        name: LoadedModel(FAMILIES[name].load(ModelSpec(name=name, family=name, source=folder), "cpu"))
        for name, folder in folders.items()
    }


def plain(model: LoadedModel, params: GenerationParams, **changes: Any) -> np.ndarray:
    """What diffusers draws by itself, one picture a text and seed."""
    pipeline: Any = model.pipeline
    if params.img2img is not None:
        pipeline = sibling_of(pipeline, "Img2Img")
        changes |= {"image": [params.img2img.picture] * len(params.seeds), "strength": params.img2img.denoise}
    arguments = {
        "prompt": [params.prompt] * len(params.seeds),
        "num_inference_steps": params.steps,
        "width": params.width,
        "height": params.height,
        "guidance_scale": params.guidance_scale,
        "generator": generators(params),
        "max_sequence_length": TEXT_LENGTH,
    }
    if "z-image" in model.spec.family:
        arguments["negative_prompt"] = [params.negative_prompt] * len(params.seeds)
    elif params.negative_prompt:  # the pipeline reads no other text than none, and takes one that was read
        negative = pipeline.encode_prompt(params.negative_prompt, max_sequence_length=TEXT_LENGTH)[0]
        arguments["negative_prompt_embeds"] = negative.repeat(len(params.seeds), 1, 1)
    with quiet(), torch.no_grad():
        return pixels(pipeline(**arguments | changes).images)


CHANGES: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 0.0},
    {"width": 96, "negative_prompt": "rain"},
    {"sampler": "heun"},
]


@pytest.mark.parametrize("name", FAMILIES_OF_CHAT)
@pytest.mark.parametrize("changes", CHANGES[:3], ids=str)
def test_off_and_at_threshold_0_the_plain_pipelines_pictures_come_out(
    loaded: dict[str, LoadedModel], name: str, changes: dict[str, Any]
) -> None:
    model, params = loaded[name], replace(PARAMS, steps=2, **changes)
    expected = plain(model, params)
    assert expected.std() > 0
    for strategy in (NoCache(), FirstBlockCache(threshold=0.0)):
        drawn = model.generate(params, strategy, ignore)
        assert np.array_equal(pixels(drawn.images), expected)
        assert drawn.reports[0].reused == 0
