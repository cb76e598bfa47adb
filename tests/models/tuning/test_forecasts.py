"""Fitted forecasts are found by drawing, come nearer than a repeated prediction, and act where they were fitted."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from cache import DeepCache, FittedForecast, NoCache
from models.base import GenerationParams, Multiscale
from models.generation import LoadedModel
from models.tuning import forecasts as module
from models.tuning.choice import Wish, choose
from models.tuning.forecasts import counts, forecasts, most
from models.tuning.front import Front, Point
from models.tuning.halving import Candidate, Pictures
from models.tuning.profile import Profile
from models.tuning.unfinished import Unfinished
from tests.models.test_generation import PARAMS, ignore

STEPS = 6
FITTED = FittedForecast((0, 2), ((1.0,), (1.0,), (0.0, 1.0), (-0.5, 1.5), (-1.0, 2.0), (0.25, 0.75)), DeepCache(2))


def pictures_of(model: LoadedModel, path: Path, told: list[str], **changes: Any) -> Pictures:
    params = GenerationParams(prompt="", width=64, height=64, steps=STEPS, seeds=(1, 2), batch_size=2)
    return Pictures(model, replace(params, **changes), ["a", "b"], Unfinished(path / "unfinished"), told.append)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_they_are_nearer_than_a_repeated_prediction(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(module, "SPEEDS", (2.0,))
    told: list[str] = []
    pictures = pictures_of(request.getfixturevalue(family), tmp_path, told)
    found = forecasts(pictures)
    assert 1 <= len(found) <= most(STEPS)
    assert len(told) <= module.drawings(STEPS)
    for candidate in found:
        fitted = candidate.strategy
        assert isinstance(fitted, FittedForecast)
        assert (len(fitted.computed), fitted.calls) == (3, STEPS)
        rows = tuple((1.0,) for _ in range(STEPS))
        repeated = Candidate(STEPS, FittedForecast(fitted.computed, rows))
        near, far = ([*chain(*(pictures.tried(one, n).psnr_db for n in (0, 1)))] for one in (candidate, repeated))
        assert all(map(operator.gt, near, far))  # picture by picture
    told.clear()
    assert forecasts(pictures) == found
    assert not told  # what was found is known


def test_for_a_sampler_of_two_calls_a_step_there_are_none(sd: LoadedModel, tmp_path: Path) -> None:
    assert forecasts(pictures_of(sd, tmp_path, [], sampler="heun")) == []


def test_for_a_checkpoint_for_inpainting_there_are_none(
    sd: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sd.model), "inpaints", True)
    told: list[str] = []
    assert forecasts(pictures_of(sd, tmp_path, told)) == []
    assert told == []


@pytest.mark.parametrize("steps", [2, 3])
def test_where_no_call_can_be_spared_there_are_none(sd: LoadedModel, tmp_path: Path, steps: int) -> None:
    told: list[str] = []
    assert forecasts(pictures_of(sd, tmp_path, told, steps=steps)) == []
    assert told == []


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (30, [24, 20, 18, 17, 15, 14, 13, 12, 10, 9, 8, 7, 6, 5, 4]),  # 7.5×: in seconds the 6× that may be asked for
        (20, [16, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3]),
        (4, [3]),
        (3, []),
    ],
)
def test_so_many_calls_compute(steps: int, expected: list[int]) -> None:
    assert counts(steps) == expected


def test_an_answer_is_of_the_whole_run_alone(sd: LoadedModel) -> None:
    """A run over a picture, in parts or guided in a part was not what it was fitted for."""
    params = replace(PARAMS, steps=STEPS)
    for changes, named in (
        ({}, ["fitted"]),
        ({"width": 192, "height": 192, "hires_fix": True}, ["fitted", "deepcache"]),
        ({"multiscale": Multiscale(fullres_start=1, fullres_end=1)}, ["deepcache"]),
        ({"guidance_end": 0.5}, ["deepcache"]),
    ):
        drawn = sd.generate(replace(params, **changes), FITTED, ignore)  # type: ignore[arg-type]
        assert [one.cache.strategy for one in drawn.stages] == named


FRONT = Front(
    sampler="euler",
    scheduler="normal",
    steps=STEPS,
    guidance_scale=3.0,
    width=64,
    height=64,
    pictures=8,
    device="here",
    points=(
        Point(steps=STEPS, strategy=DeepCache(2), operations=2.0, psnr_db=40.0, psnr_interval=(38.0, 42.0)),
        Point(
            steps=STEPS,
            strategy=replace(FITTED, otherwise=NoCache()),
            operations=2.0,
            psnr_db=50.0,
            psnr_interval=(48.0, 52.0),
        ),
    ),
)


@pytest.mark.parametrize(
    ("changes", "fitted"),
    [
        ({}, True),
        ({"guidance_scale": 1.5}, True),
        ({"guidance_scale": 3.5}, False),  # where it was not measured
        ({"steps": 12}, False),
        ({"scheduler": "karras"}, False),
        ({"sampler": "ddim"}, False),
    ],
)
def test_a_wish_takes_weights_where_they_were_fitted(changes: dict[str, Any], fitted: bool) -> None:
    wish = replace(Wish(2.0, None, STEPS, 3.0, "euler", "normal"), **changes)
    choice = choose(wish, "a", "deepcache", Profile(own=("euler", "normal"), fronts=(FRONT,)))
    assert choice.strategy == (FITTED if fitted else DeepCache(2))


def test_a_front_comes_back_from_its_file_as_it_was() -> None:
    import json

    assert Front.of(json.loads(json.dumps(FRONT.as_dict()))) == FRONT
    assert "otherwise" not in json.dumps(FRONT.as_dict())
