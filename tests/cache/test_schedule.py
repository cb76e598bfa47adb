"""When reuse is allowed: the contract's window, in progress units, and the interval."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from cache import DeepCache, attach
from cache.deepcache.schedule import GROWTH, Placement, Uniform, Window, budget, progress, warped
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
    letters = played(Uniform(interval), calls)
    assert letters.count("C") == math.ceil(calls / interval)
    assert all((letter == "C") == (call % interval == 0) for call, letter in enumerate(letters))


def played(schedule: Uniform | Placement, calls: int) -> str:
    letters = "C"  # the first call has nothing to reuse
    for call in range(1, calls):
        letters += "R" if schedule.reuses(call, letters.rindex("C")) else "C"
    return letters


@given(interval=st.integers(1, 12), calls=st.integers(1, 150), growth=st.floats(1, 2))
def test_a_warped_placement_keeps_the_budget_and_its_gaps_grow(interval: int, calls: int, growth: float) -> None:
    computed = warped(calls, budget(calls, interval), growth)
    letters = played(Placement(computed, calls, ""), calls)
    assert letters.count("C") == len(computed) == math.ceil(calls / interval)
    gaps = [b - a for a, b in itertools.pairwise([*computed, calls])]
    assert all(later >= earlier - 1 for i, earlier in enumerate(gaps) for later in gaps[i:])  # rounding: one call
    assert growth > 1 or max(gaps[:-1], default=interval) <= interval


@pytest.mark.parametrize(
    ("interval", "calls", "expected"),
    [
        (2, 10, "CCRCRCRRCR"),  # 10 (k / 5) ^ 1.2: 1.4, 3.3, 5.4, 7.7
        (3, 20, "CRCRCRRCRRCRRCRRRCRR"),  # 20 (k / 7) ^ 1.2: 1.9, 4.4, 7.2, 10.2, 13.4, 16.6
        (5, 20, "CRRRCRRRRCRRRRCRRRRR"),  # 20 (k / 4) ^ 1.2: 3.8, 8.7, 14.2
        (3, 1, "C"),
        (9, 4, "CRRR"),
    ],
)
def test_a_warped_placement_by_hand(interval: int, calls: int, expected: str) -> None:
    assert played(Placement(warped(calls, budget(calls, interval), 1.2), calls, ""), calls) == expected


@given(interval=st.integers(1, 12), calls=st.integers(2, 150), growth=st.floats(1, 2), first=st.floats(0.5, 1000))
def test_evenly_spaced_timesteps_place_as_none(interval: int, calls: int, growth: float, first: float) -> None:
    even = [first * (1 - call / calls) for call in range(calls)]
    with_them, without = (
        warped(calls, budget(calls, interval), growth, even),
        warped(calls, budget(calls, interval), growth),
    )
    assert all(abs(one - other) <= 1 for one, other in zip(with_them, without, strict=True))  # a tie may round


@given(gaps=st.lists(st.floats(0, 100), min_size=1, max_size=60), interval=st.integers(1, 12), growth=st.floats(0.5, 2))
def test_any_timesteps_keep_the_budget(gaps: list[float], interval: int, growth: float) -> None:
    timesteps = list(itertools.accumulate(reversed(gaps), initial=1.0))[::-1]
    computed = warped(len(timesteps), budget(len(timesteps), interval), growth, timesteps)
    assert computed[0] == 0
    assert list(computed) == sorted(set(computed))
    assert len(computed) == math.ceil(len(timesteps) / interval)
    assert computed[-1] < len(timesteps)


def test_a_run_longer_than_was_said_goes_on_as_densely() -> None:
    assert played(Placement((0, 1), 6, ""), 15) == "CCRRRR" + "CRRCRRCRR"


class Pipe:
    """What `view_of` reads of a pipeline, with a scheduler that knows its steps when it is called."""

    def __init__(self, steps: int) -> None:
        self.unet = tiny_unconditional()
        self.scheduler = DDIMScheduler()
        self.scheduler.set_timesteps(steps)


UNKNOWN = "uniform: the length of the run is not known"


@pytest.mark.parametrize(
    ("strategy", "expected", "schedule", "placement"),
    [
        (
            DeepCache(2, 0),
            "".join("C" if c in warped(10, 5, GROWTH) else "R" for c in range(10)),
            "auto",
            "not calibrated",
        ),
        (DeepCache(3, 0, schedule="uniform"), "CRRCRRCRRC", "uniform", None),
        (DeepCache(3, 0, schedule=(0, 1, 7)), "CCRRRRRCRR", (0, 1, 7), None),
        (DeepCache(3, 0, 400), "CCCRRCRRCR", "uniform", "uniform: a window is set"),
    ],
)
@torch.no_grad()
def test_where_calls_compute_and_what_the_report_says_of_it(
    strategy: DeepCache, expected: str, schedule: Any, placement: str | None
) -> None:
    pipe = Pipe(10)
    with attach(pipe, strategy) as report:
        list(denoise_unet(pipe.unet, steps=10))
    assert report.decisions == expected
    assert (report.settings["schedule"], report.settings["placement"]) == (schedule, placement)


@torch.no_grad()
def test_a_run_of_unknown_length_is_uniform() -> None:
    alone, midway = tiny_unconditional(), Pipe(10)
    midway.scheduler.set_timesteps(25)  # img2img: the run is not the whole of the scheduler's timesteps
    for target, unet in ((alone, alone), (midway, midway.unet)):
        with attach(target, DeepCache(3, 0)) as report:
            list(denoise_unet(unet, steps=10))
        assert report.decisions == "CRRCRRCRRC"
        assert (report.settings["schedule"], report.settings["placement"]) == ("uniform", UNKNOWN)


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
