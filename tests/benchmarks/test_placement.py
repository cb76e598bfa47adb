"""The automatic placement beside the uniform one, on few pictures: it must be the nearer one."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
import torch

from benchmarks.placement import __main__ as command
from benchmarks.placement import pixel
from benchmarks.placement.__main__ import Row
from cache import CacheStrategy, DeepCache, NoCache, attach
from cache.schedule import budget
from models.embedded import DEFAULT, SPECS
from models.placements import read

(SPEC,) = (spec for spec in SPECS if spec.name == DEFAULT)


def test_the_committed_placements_keep_the_budget_and_are_no_loss() -> None:
    found = read(SPEC)
    assert {(one.sampler, one.steps) for one in found} >= set(
        itertools.product(("euler", "ddim", "dpmpp_2m"), (10, 20))
    )
    for one in found:
        assert len(one.computed) == budget(one.calls, one.interval)
        assert one.gain_db > 0 or one.computed == tuple(range(0, one.calls, one.interval))


def test_auto_is_nearer_than_uniform_on_tiny_sd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "INTERVALS", (3,))
    (found,) = command.of_tiny_sd(["euler"], [20], 4, (128, 128))
    gain = found.gain("uniform")
    assert gain is not None
    assert gain[0] > 0.5  # 2 dB here
    assert found.decisions.count("C") == 7


@torch.no_grad()
def test_auto_is_nearer_than_uniform_on_pixels_where_nothing_is_calibrated() -> None:
    pipeline = pixel.load()

    def draw(strategy: CacheStrategy) -> tuple[np.ndarray, str]:
        with attach(pipeline, strategy) as report:
            seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
            drawn = pipeline(batch_size=4, generator=seeds, num_inference_steps=20, output_type="np").images
        return (drawn * 255).round(), report.decisions

    found = command.row("pixel", "ddim", 20, 3, draw, draw(NoCache())[0])
    gain = found.gain("uniform")
    assert gain is not None
    assert gain[0] > 3  # 5.7 dB on 32 pictures
    assert found.decisions.count("C") == 7
    assert statistics.mean(found.uniform) > 25


def test_gains_are_of_the_same_picture() -> None:
    row = Row("m", "ddim", 20, 3, "CRR", auto=[30.0, 40.0], uniform=[29.0, 37.0], plain=[], fewer=[20.0, 20.0])
    assert row.gain("uniform") == pytest.approx((2.0, 1.0, 3.0), abs=0.01)
    assert row.gain("plain") is None
    assert row.gain("fewer") == pytest.approx((15.0, 10.0, 20.0), abs=0.01)
    assert DeepCache().schedule == "auto"
