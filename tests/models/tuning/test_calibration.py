"""What a calibration decides by, and that its proposals are drawn and judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from cache import CacheStrategy, DeepCache
from models.base import GenerationParams
from models.generation import LoadedModel
from models.tuning.calibration import calibrate, chosen, generated, rounds, sensitivities
from models.tuning.nearness import psnr

UNIFORM, OTHER, THIRD = (0, 3), (0, 1), (0, 2)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({OTHER: [1.0, 1.2, 0.8, 1.0]}, (OTHER, 1.0)),
        ({OTHER: [-1.0, -1.2, -0.8, -1.0]}, (UNIFORM, 0.0)),
        ({OTHER: [9.0, -8.0, 7.0, -6.0]}, (UNIFORM, 0.0)),  # as likely chance
        ({OTHER: [4.0, -1.0, 4.0, 1.0], THIRD: [1.0, 1.1, 1.0, 0.9]}, (THIRD, 1.0)),  # the surer one
        ({}, (UNIFORM, 0.0)),
    ],
)
def test_a_placement_has_to_beat_uniform_by_more_than_chance(gains: dict[Any, list[float]], expected: Any) -> None:
    even = [30.0, 40.0, 35.0, 20.0]
    nearness = {placement: [a + b for a, b in zip(even, own, strict=True)] for placement, own in gains.items()}
    best, gain = chosen(UNIFORM, {UNIFORM: even, **nearness})
    assert (best, pytest.approx(gain)) == expected


def test_one_picture_decides_nothing() -> None:
    assert chosen(UNIFORM, {UNIFORM: [30.0], OTHER: [50.0]}) == (UNIFORM, 0.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_sensitivity_is_how_far_the_sampler_moves(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    found = sensitivities(scheduler, [float(timestep) for timestep in scheduler.timesteps])
    latents, said = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64).unbind()
    for timestep, moved in zip(scheduler.timesteps, found, strict=True):
        plain, pushed = (scheduler.step(said + push, timestep, latents).prev_sample for push in (0.0, 1.0))
        # 1e-3 at the end: DDIM goes to the signal's share at timestep 0, not to one
        assert abs(float((pushed - plain).mean())) == pytest.approx(moved, rel=0.02, abs=5e-3)


def test_two_calls_at_one_timestep_share_its_step() -> None:
    scheduler = DDIMScheduler()
    once = sensitivities(scheduler, [900.0, 600.0, 300.0])
    twice = sensitivities(scheduler, [900.0, 600.0, 600.0, 300.0, 300.0])
    assert twice == pytest.approx([once[0], once[1] / 2, once[1] / 2, once[2] / 2, once[2] / 2])


def test_the_best_of_the_drawn_placements_is_kept(sd: LoadedModel) -> None:
    params = GenerationParams(prompt="", width=64, height=64, steps=8, seeds=(1, 2), batch_size=2, sampler="ddim")
    strategies: list[CacheStrategy] = []
    inner = generated(sd, params, ["a", "b"])

    def draw(strategy: CacheStrategy) -> Any:
        strategies.append(strategy)
        return inner(strategy)

    scheduler = sd.pipeline.scheduler  # type: ignore[attr-defined]
    told: list[str] = []
    view: Any = sd.denoiser
    found = calibrate(
        draw, view, scheduler, sampler=("ddim", "normal"), steps=8, intervals=(2, 4), depth=3, progress=told.append
    )
    assert len(told) == len(strategies) <= rounds((2, 4))
    assert [(one.interval, one.calls, one.pictures, len(one.computed)) for one in found] == [(2, 8, 4, 4), (4, 8, 4, 2)]
    drawn = [strategy.schedule for strategy in strategies if isinstance(strategy, DeepCache)]
    assert tuple(range(0, 8, 2)) in drawn
    assert all(one.computed in drawn and one.gain_db >= 0 for one in found)
    # Anew, by hand: no drawn placement of that interval is surer to be nearer than the kept one.
    reference = inner(strategies[0])
    for one in found:
        own, even = (
            [psnr(*couple) for couple in zip(reference, inner(DeepCache(one.interval, 3, schedule=s)), strict=True)]
            for s in (one.computed, tuple(range(0, 8, one.interval)))
        )
        assert float(np.mean(own) - np.mean(even)) == pytest.approx(one.gain_db, abs=0.01)
