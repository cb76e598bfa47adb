"""tiny-flux in small weights: what a picture loses by them, told apart from what a cache costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache import FirstBlockCache, NoCache
from models.base import GenerationParams
from models.families import FAMILIES
from models.generation import LoadedModel
from models.tuning.nearness import psnr
from tests.models.loading.quantising import TINY_WIDTH, embedded_flux, narrow_flux

PARAMS = GenerationParams(
    prompt="a misty forest at twilight", width=192, height=128, steps=8, guidance_scale=3.0, seeds=(0,)
)
# dB of this picture to the unquantised one, uncached. Measured: 59.3, 41.7, 51.1 and 50.1; the cache's own loss, 40.1.
LEAST = {"GGUF Q8_0": 53.0, "GGUF Q4_0": 36.0, "scaled fp8": 45.0, "kept in fp8": 44.0}


def drawn(model: LoadedModel, threshold: float | None) -> tuple[np.ndarray, float]:
    made = model.generate(
        PARAMS, NoCache() if threshold is None else FirstBlockCache(threshold=threshold), lambda _: None
    )
    return np.asarray(made.images[0]), made.reports[0].hit_rate


def test_each_kind_loses_little_and_the_cache_as_much_as_ever(tmp_path: Path) -> None:
    with narrow_flux(TINY_WIDTH):
        models = {
            name: LoadedModel(FAMILIES["flux"].load(spec, "cpu"))
            for name, spec in embedded_flux(tmp_path).items()
            if name in (*LEAST, "unquantised")
        }
    whole, _ = drawn(models["unquantised"], None)
    cached, rate = drawn(models["unquantised"], 0.2)
    assert rate > 0.2
    for name, least in LEAST.items():
        picture, _ = drawn(models[name], None)
        assert least < psnr(picture, whole) < 70, name
        again, theirs = drawn(models[name], 0.2)
        assert theirs == pytest.approx(rate, abs=0.13), "a call more or less of eight"
        assert psnr(again, picture) == pytest.approx(psnr(cached, whole), abs=3), "the cache's own loss"
