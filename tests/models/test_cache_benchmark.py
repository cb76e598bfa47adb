"""The benchmark's arithmetic, and a small run of it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.cache import UNCACHED, Measurements, measure, psnr
from cache import CacheReport, DeepCache, NoCache
from models.base import GenerationParams, LoadedModel


def test_psnr_of_known_errors() -> None:
    black = Image.new("RGB", (4, 4), (0, 0, 0))
    assert psnr(black, Image.new("RGB", (4, 4), (255, 255, 255))) == pytest.approx(0.0)
    assert psnr(black, Image.new("RGB", (4, 4), (1, 1, 1))) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(black, black) is None


def test_speedup_is_the_median_of_the_pairs_ratios() -> None:
    picture = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    uncached = Measurements(seconds=[1.0, 2.0, 90.0], images=[picture] * 3)
    cached = Measurements(seconds=[0.5, 0.5, 30.0], images=[picture] * 3)
    cached.reports = [CacheReport("deepcache", decisions="CRCR", reuse_cost=0.25) for _ in range(3)]
    row = cached.against(uncached)
    assert row["speedup"] == 3.0  # of 2, 4 and 3; the ratio of the medians would be 4
    assert row["denoise_seconds"] == 0.5
    assert (row["psnr_db"], row["identical"]) == (None, 3)
    assert row["predicted_speedup"] == 1.6  # 4 calls, 2 of them at a quarter


def test_every_setting_draws_every_picture(sd: LoadedModel) -> None:
    params = GenerationParams(prompt="a", width=64, height=64, steps=4, guidance_scale=1.0)
    runs = measure(sd, params, {UNCACHED: NoCache(), "half": DeepCache(interval=2)}, range(2))
    uncached, half = (run.against(runs[UNCACHED]) for run in runs.values())
    assert (uncached["speedup"], uncached["hit_rate"], uncached["identical"]) == (1.0, 0.0, 2)
    assert (half["hit_rate"], half["identical"]) == (0.5, 0)
    assert half["psnr_db"] > 0
    assert len(runs["half"].images) == 2
