"""Where the compute calls of a model lie: what a run takes from its profile."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from diffusers import EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from cache import DeepCache
from cache.deepcache.schedule import GROWTH, Placement, budget, warped
from models.base import GenerationParams, ModelSpec, Step
from models.embedded import DEFAULT, SPECS
from models.families.sd import SD
from models.generation import LoadedModel
from models.tuning.placements import Calibrated, place, stretched
from models.tuning.profile import read, write
from tests.models.conftest import BETAS

FOUND = Calibrated(
    sampler="ddim", scheduler="normal", steps=6, interval=3, branch=0, calls=6, computed=(0, 1), gain_db=1.5, pictures=8
)
OWN = ("ddim", "normal")
LONGER = replace(FOUND, steps=12, calls=12, computed=(0, 1, 2, 7))


def evenly(calls: int) -> list[float]:
    return [1000 - 1000 * call / calls for call in range(calls)]


def ignore(step: Step) -> None:
    pass


@pytest.mark.parametrize(
    ("sampler", "scheduler", "calls", "interval", "expected"),
    [
        ("ddim", "normal", 6, 3, Placement((0, 1), 6, "calibrated: ddim, normal, 6 steps")),
        ("ddim", "normal", 12, 3, Placement((0, 1, 2, 7), 12, "calibrated: ddim, normal, 12 steps")),
        # 8 calls are nearer to 6 (ratio 1.33) than to 12 (1.5); K = 3 of knots 0, 1, 6: at 2/3 and 4/3 of a gap
        ("ddim", "normal", 8, 3, Placement((0, 1, 4), 8, "stretched from ddim, normal, 6 steps")),
        ("ddim", "karras", 6, 3, Placement(warped(6, 2, GROWTH), 6, "not calibrated")),
        ("euler", "normal", 6, 3, Placement(warped(6, 2, GROWTH), 6, "not calibrated")),
        ("ddim", "normal", 6, 2, Placement(warped(6, 3, GROWTH), 6, "not calibrated")),
    ],
)
def test_the_nearest_calibrated_run_places(
    sampler: str, scheduler: str, calls: int, interval: int, expected: Placement
) -> None:
    assert place([LONGER, FOUND], sampler, scheduler, evenly(calls), interval, 0) == expected


def test_what_is_not_calibrated_is_placed_where_the_noise_goes() -> None:
    """Half of these calls lie within the first tenth of the noise schedule."""
    dense = [1000.0 - 10 * call for call in range(10)] + [900.0 - 90 * call for call in range(10)]
    placed = place([FOUND], "euler", "karras", dense, 3, 0)
    assert placed == Placement(warped(20, 7, GROWTH, dense), 20, "not calibrated")
    assert sum(call >= 10 for call in placed.computed) > sum(call >= 10 for call in warped(20, 7, GROWTH))


@pytest.mark.parametrize("interval", [2, 3, 5, 8])
def test_gaps_grow_where_nothing_is_calibrated(interval: int) -> None:
    assert place([FOUND], "unipc", "normal", evenly(20), interval, 0).computed == warped(
        20, budget(20, interval), GROWTH, evenly(20)
    )


def test_the_branch_decides_between_equal_lengths() -> None:
    other = replace(FOUND, branch=1, computed=(0, 4))
    assert place([FOUND, other], "ddim", "normal", evenly(6), 3, 1).computed == (0, 4)
    assert place([FOUND, other], "ddim", "normal", evenly(6), 3, None).computed == (0, 1)


@given(calls=st.integers(1, 150), other=st.integers(1, 150), interval=st.integers(1, 10), growth=st.floats(1, 2))
def test_a_stretched_placement_keeps_the_budget(calls: int, other: int, interval: int, growth: float) -> None:
    found = stretched(warped(calls, budget(calls, interval), growth), calls, other, interval)
    assert found[0] == 0
    assert list(found) == sorted(set(found))
    assert len(found) == math.ceil(other / interval)
    assert found[-1] < other


@given(calls=st.integers(1, 150), other=st.integers(1, 150), interval=st.integers(1, 10))
def test_an_even_placement_lends_evenness(calls: int, other: int, interval: int) -> None:
    """10 calls at interval 3 end in a gap of one. Stretched with it to 12, tiny-sd lost 5 dB."""
    assert stretched(range(0, calls, interval), calls, other, interval) == tuple(range(0, other, interval))


@given(calls=st.integers(1, 150), interval=st.integers(1, 10), growth=st.floats(1, 2))
def test_stretched_to_its_own_length_a_placement_is_itself(calls: int, interval: int, growth: float) -> None:
    computed = warped(calls, budget(calls, interval), growth)
    assert stretched(computed, calls, calls, interval) == computed


def test_a_run_computes_where_its_models_file_says(sd_spec: ModelSpec, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sd_spec.source, folder)
    spec = replace(sd_spec, source=folder)
    branch_0 = replace(FOUND, calls=6, computed=(0, 1))
    write(spec, OWN, [branch_0, replace(FOUND, sampler="heun", calls=11, computed=(0, 1, 2, 3))])
    model = LoadedModel(SD.load(spec, "cpu"))
    params = GenerationParams(prompt="a", width=64, height=64, steps=6)
    expected = {None: "CCRRRR", "ddim": "CCRRRR", "heun": "CCCCRRRRRRR"}  # saved with DDIM
    for sampler, letters in expected.items():
        report = model.generate(replace(params, sampler=sampler), DeepCache(3, 3), ignore).reports[0]
        assert report.decisions == letters
        assert report.settings["placement"] == f"calibrated: {sampler or 'ddim'}, normal, 6 steps"


def test_a_model_saved_with_karras_is_placed_by_it(small_folders: dict[str, Path], tmp_path: Path) -> None:
    """Whether a request names the sampler or nothing: what is drawn is the same."""
    folder = tmp_path / "karras"
    shutil.copytree(small_folders["epsilon"], folder)
    EulerDiscreteScheduler(**BETAS, steps_offset=1, use_karras_sigmas=True).save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "EulerDiscreteScheduler"))
    spec = ModelSpec(name="karras", family="sd", source=folder)
    plain = replace(FOUND, sampler="euler")
    write(spec, ("euler", "karras"), [plain, replace(plain, scheduler="karras", computed=(0, 4))])
    model = LoadedModel(SD.load(spec, "cpu"))
    for sampler in (None, "euler"):
        params = GenerationParams(prompt="a", width=64, height=64, steps=6, sampler=sampler)
        report = model.generate(params, DeepCache(3, 3), ignore).reports[0]
        assert (report.decisions, report.settings["placement"]) == (
            "CRRRCR",
            "calibrated: euler, karras, 6 steps",
        )


def test_the_page_draws_the_places_that_tiny_sd_brings() -> None:
    page = (Path(__file__).parents[3] / "docs" / "caching.md").read_text(encoding="utf-8")
    known = read(next(spec for spec in SPECS if spec.name == DEFAULT)).placements
    for interval in (2, 3, 5):
        places = place(known, "ddim", "normal", evenly(20), interval, 0)
        assert places.source == "calibrated: ddim, normal, 20 steps"
        uniform, auto = (
            " ".join("C" if call in computed else "·" for call in range(20))
            for computed in (range(0, 20, interval), places.computed)
        )
        assert f"N = {interval}, uniform    {uniform}\n           auto       {auto}\n" in page


def test_the_placements_that_tiny_sd_brings_keep_the_budget_and_are_no_loss() -> None:
    (spec,) = (spec for spec in SPECS if spec.name == DEFAULT)
    found = read(spec).placements
    assert {(one.sampler, one.steps) for one in found} >= set(product(("euler", "ddim", "dpmpp_2m"), (10, 20)))
    for one in found:
        assert len(one.computed) == budget(one.calls, one.interval)
        assert one.gain_db > 0 or one.computed == tuple(range(0, one.calls, one.interval))
