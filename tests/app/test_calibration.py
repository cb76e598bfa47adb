"""`python -m app calibrate`: what it writes is what the next run computes by."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import app.__main__ as command_line
from app.engine import runner
from cache import DeepCache
from models.base import GenerationParams, ModelSpec
from models.families.sd import SD
from models.generation import LoadedModel
from models.loading.checkpoints import CheckpointFolder
from models.models_file import Configuration
from models.tuning.profile import Profile, file_of, processor, read
from tests.models.conftest import flux_folder, flux_spec, sd_folder, sd_spec

__all__ = ["flux_folder", "flux_spec", "sd_folder", "sd_spec"]


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd_spec: ModelSpec, flux_spec: ModelSpec) -> ModelSpec:
    """A random UNet model in a folder of the operator's, configured beside a random Flux."""
    shutil.copytree(sd_spec.source, tmp_path / "mine")
    spec = replace(sd_spec, source=tmp_path / "mine", render_sizes=((64, 64),))
    configuration = Configuration((spec, flux_spec), spec.name, flux_spec.name)
    arguments = {"configuration": configuration, "checkpoints": CheckpointFolder(tmp_path / "none"), "threads": 1}
    monkeypatch.setattr(runner, "runner_arguments", lambda settings: arguments)
    return spec


def test_what_is_found_is_kept_with_the_model_and_read_by_the_next_run(spec: ModelSpec) -> None:
    options = ["--sampler", "ddim", "--sampler", "heun", "--steps", "4", "--interval", "2", "--depth", "3"]
    command = ["calibrate", spec.name, "--prompt", "a", *options]
    stopped = CliRunner().invoke(command_line.cli, [*command, "--minutes", "0"])
    assert stopped.exit_code == 0, stopped.output
    assert "the same command goes on from there" in stopped.output
    assert read(spec) == Profile()
    result = CliRunner().invoke(command_line.cli, command)
    assert result.exit_code == 0, result.output
    assert {file.name for file in file_of(spec).parent.glob("profile*")} == {"profile.json"}  # nothing is unfinished
    known = read(spec)
    found = {one.sampler: one for one in known.placements}
    assert {name: (one.steps, one.calls, one.interval, one.pictures) for name, one in found.items()} == {
        "ddim": (4, 4, 2, 2),
        "heun": (4, 7, 2, 2),
    }
    assert known.own == ("ddim", "normal")
    fronts = {front.sampler: front for front in known.fronts}
    assert {(front.steps, front.pictures, front.device) for front in fronts.values()} == {(4, 16, processor())}
    for front in fronts.values():
        # four computed calls are too few for a cache that forecasts by a line
        assert {point.steps for point in front.portable.points} <= {2, 3}
        assert (front.portable == front) == (front.sampler == "heun")  # whose steps are two calls
        assert all(point.operations > 1 and point.seconds is not None for point in front.points)
    model = LoadedModel(SD.load(spec, "cpu"))
    params = GenerationParams(prompt="a", width=64, height=64, steps=4, sampler="heun")
    report = model.generate(params, DeepCache(2, 3), lambda step: None).reports[0]
    assert tuple(call for call, letter in enumerate(report.decisions) if letter == "C") == found["heun"].computed
    assert report.settings["placement"] == "calibrated: heun, normal, 4 steps"


def test_a_transformer_has_a_front_and_no_placements(spec: ModelSpec) -> None:
    options = ["--steps", "2", "--pictures", "1", "--prompt", "a", "--width", "64", "--height", "64"]
    result = CliRunner().invoke(command_line.cli, ["calibrate", "random-flux", *options])
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.strip())
    known = json.loads(path.read_text())
    path.unlink()  # the folder is other tests' too
    assert known["placements"] == []
    assert [(front["steps"], front["pictures"]) for front in known["fronts"]] == [(2, 8)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["random-sd", "--sampler", "best"], "no sampler 'best'"),
        (["none"], "no model"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(
    spec: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["app", "calibrate", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 1
    *progress, last = capsys.readouterr().err.splitlines()  # loading may take long enough to be told
    assert words in last
    assert not [line for line in progress if words in line or "Traceback" in line]
    assert read(spec) == Profile()


def test_a_damaged_profile_is_told_of_before_anything_is_drawn(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file_of(spec).write_text("no json")
    monkeypatch.setattr("sys.argv", ["app", "calibrate", spec.name])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "profile.json is no profile" in capsys.readouterr().err.splitlines()[-1]
    assert file_of(spec).read_text() == "no json"
