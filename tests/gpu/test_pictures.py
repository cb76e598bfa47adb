"""On the device: off is the plain pipeline, every sampler draws the CPU's picture, offloaded weights change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.registry import FAMILIES
from models.tuning.nearness import psnr
from tests.gpu.conftest import DEVICE, PUBLISHED, Load
from tests.models.families.test_families import PARAMS, expected
from tests.models.test_generation import ignore, pixels

SHORT = replace(PARAMS, steps=3, seeds=(7,), batch_size=1)
NAMES = ("sd15", "flux-dev") if DEVICE == "cpu" else PUBLISHED  # tests/models draws with all of them on the CPU
SAMPLERS = [(name, sampler) for name in NAMES for sampler in FAMILIES[name].samplers]
NEAR = 70.0  # dB: weights that are off by 1e-6, as float32 rounds, leave 86 and more; by 1e-4, 71


def is_unet(name: str) -> bool:
    return FAMILIES[name].cache == "deepcache"


def acting(name: str) -> CacheStrategy:
    """Decides by its schedule, or reuses whatever the residual is: rounding changes no decision."""
    return DeepCache(interval=2) if is_unet(name) else FirstBlockCache(threshold=1.0)


def neutral(name: str) -> CacheStrategy:
    return DeepCache(interval=1) if is_unet(name) else FirstBlockCache(threshold=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_off_is_the_plain_pipeline_bit_for_bit(load: Load, name: str) -> None:
    """In the precision that the device computes in, before and after a cache has acted."""
    model = load(name)
    plain = expected(model)
    assert plain.std() > 0
    for strategy in (NoCache(), neutral(name)):
        assert np.array_equal(pixels(model.generate(PARAMS, strategy, ignore).images), plain)
    cached = model.generate(PARAMS, acting(name), ignore)
    assert cached.reports[0].reused > 0
    assert not np.array_equal(pixels(cached.images), plain)
    assert np.array_equal(pixels(model.generate(PARAMS, NoCache(), ignore).images), plain)


@pytest.mark.parametrize(("name", "sampler"), SAMPLERS)
def test_a_sampler_draws_what_it_draws_on_the_cpu(load: Load, name: str, sampler: str) -> None:
    """Its noise is the CPU's everywhere."""
    params = replace(SHORT, sampler=sampler)
    here, there = load(name, dtype="float32"), load(name, "cpu", dtype="float32")
    drawn = here.generate(params, acting(name), ignore)
    assert drawn.reports[0].reused > 0
    assert pixels(drawn.images).std() > 0
    reference = there.generate(params, acting(name), ignore)
    assert drawn.reports[0].decisions == reference.reports[0].decisions
    assert psnr(pixels(reference.images), pixels(drawn.images)) > NEAR


@pytest.mark.parametrize("how", ["text", "model", "group", "sequential"])
@pytest.mark.parametrize("name", NAMES)
def test_offloaded_weights_change_no_bit(load: Load, device: str, name: str, how: str) -> None:
    if device == "cpu":
        pytest.skip("there is nothing to offload from; tests/accelerator and tests/cache/test_offload.py have it")
    drawn = load(name, offload=how).generate(PARAMS, acting(name), ignore)
    assert drawn.reports[0].reused > 0
    assert np.array_equal(pixels(drawn.images), pixels(load(name).generate(PARAMS, acting(name), ignore).images))
