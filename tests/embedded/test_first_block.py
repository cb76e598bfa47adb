"""The first-block cache on the trained transformer: what its default forecast gains, and thresholds that are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cache import CacheStrategy, FirstBlockCache, NoCache
from models.base import GenerationParams
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.errors import ModelError
from models.generation import LoadedModel
from models.registry import Registry
from models.tuning.calibration import find_threshold
from models.tuning.nearness import psnr

PICTURES = (("a snowy forest at night", 40), ("misty hills at dawn", 41), ("a stormy sea at sunset", 42))
PROMPTS = ("a misty forest at twilight", "a clear sea at noon")
PARAMS = GenerationParams(prompt="", width=128, height=128, steps=20, guidance_scale=3.0)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(DEFAULT_FLUX)


def drawn(
    model: LoadedModel, strategy: CacheStrategy, params: GenerationParams = PARAMS
) -> tuple[list[Any], list[Any]]:
    """Pictures of PICTURES and the reports on them."""
    pictures, reports = [], []
    for prompt, seed in PICTURES:
        generation = model.generate(replace(params, prompt=prompt, seeds=(seed,)), strategy, lambda step: None)
        pictures.append(np.asarray(generation.images[0]))
        reports += generation.reports
    return pictures, reports


def test_the_default_forecast_is_nearer_than_plain_reuse_at_a_higher_hit_rate(model: LoadedModel) -> None:
    """Without a forecast the cache is diffusers' hook, bit for bit. Over 32 pictures the gain is near 8 dB."""
    references, _ = drawn(model, NoCache())
    rates, quality = [], []
    for strategy in (FirstBlockCache(0.1), FirstBlockCache(0.1, forecast=False)):
        pictures, reports = drawn(model, strategy)
        rates.append(np.mean([report.hit_rate for report in reports]))
        quality.append([psnr(*couple) for couple in zip(references, pictures, strict=True)])
    assert rates[0] > rates[1]
    assert all(own > plain for own, plain in zip(*quality, strict=True))
    assert np.mean(quality[0]) - np.mean(quality[1]) > 4


@pytest.mark.parametrize("wish", [1.4, 2.0])
def test_a_threshold_that_was_found_gives_the_wished_speed_up_on_other_prompts_and_seeds(
    model: LoadedModel, wish: float
) -> None:
    """Within a tenth, in the model's own number of steps: a call more or less is a thirtieth of the time."""
    params = replace(PARAMS, steps=28)
    found = find_threshold(model, params, wish, FirstBlockCache(), lambda step: None, PROMPTS)
    assert wish <= found.speedup < wish * 1.1
    _, reports = drawn(model, FirstBlockCache(found.threshold), params)
    reached = np.mean([report.predicted_speedup for report in reports])
    assert reached == pytest.approx(found.speedup, rel=0.1)


def test_what_cannot_be_had_is_an_error_with_a_remedy(model: LoadedModel) -> None:
    short = replace(PARAMS, steps=3)
    with pytest.raises(ModelError, match="more steps"):
        find_threshold(model, short, 5.0, FirstBlockCache(), lambda step: None, prompts=("a clear sea at noon",))
    unet = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(DEFAULT)
    with pytest.raises(ModelError, match="DeepCache"):
        find_threshold(unet, short, 2.0, FirstBlockCache(), lambda step: None, PROMPTS)
