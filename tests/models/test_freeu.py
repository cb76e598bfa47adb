"""FreeU for one request: diffusers' own, bit for bit, under DeepCache too, and gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from cache import DeepCache, NoCache
from models.base import FreeU, Img2Img, Step
from models.errors import GenerationCancelled
from models.families import FAMILIES
from models.families.flow import FlowFamily
from models.generation import LoadedModel
from tests.models.stages.test_stages import picture
from tests.models.test_generation import PARAMS, ignore, pixels, plain

FREEU = FreeU(b1=1.4, b2=1.6, s1=0.9, s2=0.2)
FREE = replace(PARAMS, freeu=FREEU)


@pytest.fixture(params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    return loaded


@contextmanager
def enabled(model: LoadedModel) -> Iterator[None]:
    """diffusers' own switch."""
    pipeline: Any = model.pipeline
    pipeline.enable_freeu(**asdict(FREEU))
    try:
        yield
    finally:
        pipeline.disable_freeu()


def test_it_is_diffusers_own_and_gone_afterwards(model: LoadedModel) -> None:
    without = pixels(model.generate(PARAMS, NoCache(), ignore).images)
    blocks: Any = model.denoiser.root.up_blocks
    before = [dict(vars(block)) for block in blocks]
    drawn = pixels(model.generate(FREE, NoCache(), ignore).images)
    assert [dict(vars(block)) for block in blocks] == before
    assert np.array_equal(pixels(model.generate(PARAMS, NoCache(), ignore).images), without)
    with enabled(model):
        expected = pixels(plain(model, replace(PARAMS, negative_prompt=PARAMS.negative_prompt or None)))  # type: ignore[arg-type]
    assert np.array_equal(drawn, expected)
    assert not np.array_equal(drawn, without)


@pytest.mark.parametrize("changes", [{}, {"img2img": Img2Img(picture=picture(64, 64), denoise=0.75)}], ids=["", "over"])
@pytest.mark.parametrize("strategy", [DeepCache(interval=1), DeepCache(interval=3)], ids=["1", "3"])
def test_under_deepcache_it_is_what_it_is_on_a_network_that_has_it(
    sd: LoadedModel, strategy: DeepCache, changes: dict[str, Any]
) -> None:
    params = replace(FREE, **changes)
    drawn = sd.generate(params, strategy, ignore)
    with enabled(sd):
        expected = sd.generate(replace(params, freeu=None), strategy, ignore)
    assert np.array_equal(pixels(drawn.images), pixels(expected.images))
    assert drawn.stages[0].cache.decisions == expected.stages[0].cache.decisions
    uncached = pixels(sd.generate(params, NoCache(), ignore).images)
    assert np.array_equal(uncached, pixels(drawn.images)) == (strategy.interval == 1)


def test_a_cancel_takes_it_away(sd: LoadedModel) -> None:
    def cancel(step: Step) -> None:
        raise GenerationCancelled

    with pytest.raises(GenerationCancelled):
        sd.generate(FREE, NoCache(), cancel)
    assert getattr(sd.denoiser.root.up_blocks[0], "b1", None) is None  # type: ignore[index]


def test_each_unet_family_has_published_factors() -> None:
    published = {name: family.freeu for name, family in FAMILIES.items()}
    assert published["sdxl"] == FreeU(b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    assert {name for name, factors in published.items() if factors is None} == {
        name for name, family in FAMILIES.items() if isinstance(family, FlowFamily)
    }
