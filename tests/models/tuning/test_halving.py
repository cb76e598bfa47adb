"""A front is found by pictures that get fewer, and an interrupted search goes on where it was."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cache import DeepCache, FirstBlockCache, NoCache
from models.base import GenerationParams
from models.errors import LoadFailed
from models.generation import LoadedModel
from models.tuning.front import Point
from models.tuning.halving import LEAST, Candidate, Pictures, Tried, candidates, drawings, fronts, kept_on, unbeaten
from models.tuning.unfinished import Unfinished


def point(operations: float, psnr_db: float) -> Point:
    return Point(steps=9, strategy=NoCache(), operations=operations, psnr_db=psnr_db, psnr_interval=(0, 99))


def test_what_another_beats_in_both_is_no_part_of_the_front() -> None:
    points = [point(3, 40), point(2, 45), point(2.5, 39), point(2, 44), point(3, 40), point(9, 20), point(1, 60)]
    assert unbeaten(points) == [points[1], points[0]]  # one as slow as uncached, and one beyond what can be asked for


def test_the_half_that_falls_least_behind_goes_on_and_all_that_fall_behind_none() -> None:
    named = {"a": point(2, 45), "b": point(2, 30), "c": point(3, 40), "d": point(1.5, 44), "e": point(1, 60)}
    some = {name: Candidate(9, FirstBlockCache(number / 10)) for number, name in enumerate(named)}
    kept = kept_on({some[name]: one for name, one in named.items()})
    assert kept == [some[name] for name in "ac"]
    kept = kept_on({some[name]: named[name] for name in "acd"} | {some["b"]: point(4, 10)})
    assert kept == [some[name] for name in "acb"]


@dataclass
class Figures:
    """Stands for what is drawn: a candidate's likeness falls with its speed, and wavers from round to round."""

    params: Any = field(default_factory=lambda: SimpleNamespace(seeds=(1, 2)))
    drawn: Counter[Candidate] = field(default_factory=Counter)

    def uncached_calls(self) -> float:
        return 20.0

    def tried(self, candidate: Candidate, number: int) -> Tried:
        self.drawn[candidate] += 1
        strategy: Any = candidate.strategy
        worse = 10 * (strategy.threshold > 0.5)  # those that save nothing for it
        base = 30 + candidate.steps - worse
        return Tried([base + number % 2, base - number % 2], [candidate.steps * (1 - strategy.threshold % 0.5)])

    def seconds(self, candidate: Candidate) -> float:
        return 0.9 * 20 / candidate.steps


def test_fewer_settings_draw_more_pictures() -> None:
    tried = [Candidate(steps, FirstBlockCache(threshold)) for steps in range(5, 20) for threshold in (0.1, 0.6)]
    figures = Figures()
    found = list(fronts(figures, tried, (1, 2, 4)))  # type: ignore[arg-type]
    assert [pictures for _, pictures in found] == [2, 4, 8, 8]
    assert [point.seconds is None for points, _ in found[1:] for point in points[:1]] == [True, True, False]
    points = found[-1][0]
    assert [one.steps for one in points] == list(range(19, 4, -1))
    assert {one.strategy for one in points} == {FirstBlockCache(0.1)}
    assert all(one.psnr_interval[0] < one.psnr_db < one.psnr_interval[1] for one in points)  # type: ignore[index]
    often = {count: sum(drawn == count for drawn in figures.drawn.values()) for count in set(figures.drawn.values())}
    assert often == {1: 15, 7: 15}  # rounds 0; 0 and 1; 0 to 3: what was drawn is known, here it is asked for again
    assert drawings(30, (1, 2, 4)) == 4 + 30 + 15 + 2 * 7 + 3  # the references, each rung, and what is timed


def test_what_is_tried_computes_often_enough_and_no_setting_twice(sd: LoadedModel, flux: LoadedModel) -> None:
    for model, guided in ((sd, True), (sd, False), (flux, True)):
        found = candidates(model.denoiser, 10, guided=guided)
        assert len(set(found)) == len(found)
        assert Candidate(10, NoCache()) not in found
        assert Candidate(2, NoCache()) in found
        caches = [one for one in found if isinstance(one.strategy, DeepCache)]
        assert bool(caches) == (model is sd)
        assert all(-(-one.steps // one.strategy.interval) >= LEAST for one in caches)  # type: ignore[union-attr]
        assert any(one.strategy.guidance == "reuse" for one in caches) == (guided and model is sd)  # type: ignore[union-attr]


def test_an_interrupted_search_draws_nothing_twice(sd: LoadedModel, tmp_path: Path) -> None:
    params = GenerationParams(prompt="", width=64, height=64, steps=4, seeds=(1, 2), batch_size=2)
    told: list[str] = []
    tried = [Candidate(4, DeepCache(2, 3)), Candidate(2, NoCache())]

    def search() -> list[Any]:
        pictures = Pictures(sd, params, ["a", "b"], Unfinished(tmp_path / "unfinished"), told.append)
        return [points for points, _ in fronts(pictures, tried, (1, 2))]

    first = search()
    assert len(told) == 1 + 2 + 2 * 2 + len(first[-1])  # calls, references, both in two rounds, what is timed
    told.clear()
    assert search() == first
    assert told == []
    assert {one.steps for one in first[0]} <= {4, 2}
    assert [replace(one, seconds=None) for one in first[-1]] == first[-2]


@pytest.mark.parametrize("content", ["no json", "3"])
def test_unfinished_work_that_cannot_be_read_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "unfinished"
    path.write_text(content)
    with pytest.raises(LoadFailed, match="Delete it"):
        Unfinished(path)
    path.write_text(json.dumps({"a": 1}))
    kept = Unfinished(path)
    assert kept.known("a", lambda: pytest.fail("it is known")) == 1
    kept.forget()
    assert not path.exists()
