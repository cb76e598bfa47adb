"""Reports and settings: what is said of a run, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache import CacheReport, DeepCache, FirstBlockCache, NoCache, attach
from tests.cache.networks import denoise_flux, denoise_unet, tiny_flux, tiny_unconditional


def test_an_empty_report_is_honest() -> None:
    report = CacheReport("none")
    assert (report.computed, report.reused, report.hit_rate, report.predicted_speedup) == (0, 0, 0.0, 1.0)
    assert "no calls" in str(report)


def test_a_report_adds_up() -> None:
    report = CacheReport("deepcache", {"interval": 3}, reuse_cost=0.224, cache_bytes=4096)
    for letter in "CRR" * 6 + "CR":
        report.record((letter == "C",))
    assert json.loads(json.dumps(report.as_dict())) == {
        "strategy": "deepcache",
        "computed": 7,
        "reused": 13,
        "hit_rate": 0.65,
        "decisions": "CRRCRRCRRCRRCRRCRRCR",
        "interval": 3,
        "reuse_cost": 0.224,
        "predicted_speedup": round(20 / (7 + 13 * 0.224), 3),
        "cache_bytes": 4096,
    }
    assert str(report).startswith("deepcache: CRRCRR")
    assert "hit rate 0.65" in str(report)


def test_items_are_recorded_apart_and_a_call_is_reused_if_all_are() -> None:
    report = CacheReport("first_block")
    for items in ((True, True), (False, True), (False, False)):
        report.record(items)
    assert report.decisions == "CCR"
    assert report.item_decisions == ["CRR", "CCR"]


def test_percentiles_of_the_residuals_are_those_of_numpy() -> None:
    known = [0.4, 0.02, 0.11, 0.03, 0.3, 0.07]
    report = CacheReport("first_block", residuals=[None, *known[:3], math.nan, *known[3:], math.inf])
    expected = np.percentile(known, [5, 25, 50, 75, 95])
    assert list(report.residual_percentiles) == ["p5", "p25", "p50", "p75", "p95"]
    assert list(report.residual_percentiles.values()) == pytest.approx(expected)
    assert list(report.as_dict()["residual_percentiles"].values()) == pytest.approx(expected, abs=1e-5)
    one = CacheReport("first_block", residuals=[None, 0.2])
    assert set(one.residual_percentiles.values()) == {0.2}
    assert "residual_percentiles" not in CacheReport("first_block", residuals=[None, math.nan]).as_dict()


def test_a_warning_is_given_once() -> None:
    report = CacheReport("none")
    report.warn("Twice.")
    report.warn("Twice.")
    assert report.warnings == ["Twice."]


@pytest.mark.parametrize(
    ("strategy", "settings", "remedy"),
    [
        (DeepCache, {"interval": 0}, "interval must be a whole number of 1 or more"),
        (DeepCache, {"interval": True}, "interval"),
        (DeepCache, {"interval": 2.0}, "interval"),
        (DeepCache, {"depth": -1}, "depth must be a whole number from 0 to 12"),
        (DeepCache, {"depth": 13}, "depth"),
        (DeepCache, {"start": -1}, "start"),
        (DeepCache, {"end": 1001}, "end"),
        (DeepCache, {"end": math.nan}, "end"),
        (DeepCache, {"start": 800, "end": 200}, "exchange them"),
        (DeepCache, {"forecast": "linear"}, "forecast must be True or False"),
        (DeepCache, {"forecast": None}, "forecast"),
        (DeepCache, {"guidance": "half"}, "guidance must be one of full, reuse"),
        (DeepCache, {"schedule": "best"}, "schedule must be auto, uniform or a tuple"),
        (DeepCache, {"schedule": None}, "schedule"),
        (DeepCache, {"schedule": (0, 1.5)}, "schedule must be"),
        (DeepCache, {"schedule": (1, 4)}, "begin with 0"),
        (DeepCache, {"schedule": (0, 4, 4)}, "ascend"),
        (DeepCache, {"schedule": ()}, "begin with 0"),
        (FirstBlockCache, {"forecast": 1}, "forecast must be True or False"),
        (FirstBlockCache, {"threshold": -0.1}, "between 0"),
        (FirstBlockCache, {"threshold": 1.1}, "between 0"),
        (FirstBlockCache, {"threshold": math.nan}, "between 0"),
        (FirstBlockCache, {"threshold": math.inf}, "between 0"),
        (FirstBlockCache, {"threshold": "0.1"}, "must be a number"),
        (FirstBlockCache, {"threshold": True}, "must be a number"),
        (FirstBlockCache, {"max_consecutive": 0}, "max_consecutive"),
        (FirstBlockCache, {"max_consecutive": 1.5}, "max_consecutive"),
    ],
)
def test_settings_out_of_bounds_are_refused(strategy: Any, settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        strategy(**settings)


@pytest.mark.parametrize(
    "strategy", [NoCache(), DeepCache(5, 3, 200, 800, False, (0, 2)), FirstBlockCache(0.1, 4, False)]
)
def test_strategies_are_frozen_and_survive_a_pickle(strategy: Any) -> None:
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    for field in dataclasses.fields(strategy):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(strategy, field.name, 1)
    assert not hasattr(strategy, "__dict__")


def test_settings_are_made_without_importing_torch() -> None:
    code = (
        "import sys, cache; cache.DeepCache(3, 2); cache.FirstBlockCache(); cache.NoCache(); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


@pytest.mark.parametrize(
    ("strategy", "steps", "sentence"),
    [
        (DeepCache(interval=1), 4, "interval 1 computes every call"),
        (DeepCache(start=0, end=1), 4, "Widen the window"),
        (DeepCache(interval=5), 4, "exceeds the run's 4 calls"),
        (DeepCache(), 1, "a run of 1 denoiser calls"),
    ],
)
@torch.no_grad()
def test_deepcache_says_why_it_could_not_act(strategy: DeepCache, steps: int, sentence: str) -> None:
    network = tiny_unconditional()
    with attach(network, strategy) as report:
        list(denoise_unet(network, steps=steps))
    assert len(report.warnings) == 1
    assert sentence in report.warnings[0]


@pytest.mark.parametrize(
    ("strategy", "steps", "sentence"),
    [
        (FirstBlockCache(0), 4, "threshold 0 computes every call"),
        (FirstBlockCache(0.001), 4, "A higher threshold would reuse"),
        (FirstBlockCache(), 1, "a run of 1 denoiser calls"),
    ],
)
@torch.no_grad()
def test_the_first_block_cache_says_why_it_could_not_act(strategy: FirstBlockCache, steps: int, sentence: str) -> None:
    network = tiny_flux()
    with attach(network, strategy) as report:
        list(denoise_flux(network, steps=steps))
    assert len(report.warnings) == 1
    assert sentence in report.warnings[0]


def test_a_run_without_calls_is_said() -> None:
    with attach(tiny_unconditional(), DeepCache()) as report:
        pass
    assert "a run of 0 denoiser calls" in report.warnings[0]
