"""When reuse is allowed: the contract's window, in progress units, and the interval."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache import DeepCache, attach
from cache.schedule import Uniform, Window, progress
from tests.cache.networks import denoise_unet, tiny_unconditional


@pytest.mark.parametrize(
    ("timestep", "training", "expected"),
    [(1000, 1000, 0), (999, 1000, 1), (0, 1000, 1000), (500, 1000, 500), (250, 500, 500), (12.5, 1000, 987.5)],
)
def test_progress_runs_from_noise_to_the_finished_picture(timestep: float, training: int, expected: float) -> None:
    assert progress(timestep, training) == expected


def test_both_ends_of_the_window_are_inside() -> None:
    window = Window(200, 800)
    assert [window.contains(t) for t in (801, 800, 500, 200, 199)] == [False, True, True, True, False]


@pytest.mark.parametrize(("start", "end", "whole"), [(0, 1000, True), (1, 1000, False), (0, 999, False)])
def test_only_the_whole_schedule_needs_no_timestep(start: int, end: int, whole: bool) -> None:
    assert Window(start, end).is_whole is whole


@given(interval=st.integers(1, 12), calls=st.integers(1, 60))
def test_an_interval_computes_a_share_rounded_up(interval: int, calls: int) -> None:
    age, letters = interval, ""  # nothing was computed yet
    for _ in range(calls):
        reuse = Uniform(interval).reuses(age)
        letters += "R" if reuse else "C"
        age = age + 1 if reuse else 1
    assert letters.count("C") == math.ceil(calls / interval)
    assert all((letter == "C") == (call % interval == 0) for call, letter in enumerate(letters))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 1000, "CRRCRRCRRC"),
        # DDIM's ten timesteps are 900, 800, …, 0: progress 100, 200, …, 1000.
        (200, 800, "CRRCRRCRCC"),
        (400, 1000, "CCCRRCRRCR"),
        (0, 150, "CCCCCCCCCC"),  # the first call is inside, and has nothing to reuse
    ],
)
@torch.no_grad()
def test_the_window_acts_on_the_schedulers_timesteps(start: int, end: int, expected: str) -> None:
    network = tiny_unconditional()
    with attach(network, DeepCache(3, 0, start, end)) as report:
        list(denoise_unet(network, steps=10))
    assert report.decisions == expected
