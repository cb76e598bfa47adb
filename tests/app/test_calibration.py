"""`python -m app calibrate`: what it writes is what the next run computes by."""

from __future__ import annotations

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
from models.tuning.placements import read
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
    result = CliRunner().invoke(command_line.cli, ["calibrate", spec.name, "--prompt", "a", *options])
    assert result.exit_code == 0, result.output
    assert "12/12" in result.output  # two samplers: uncached and at most five placements each
    found = {one.sampler: one for one in read(spec)}
    assert {name: (one.steps, one.calls, one.interval, one.pictures) for name, one in found.items()} == {
        "ddim": (4, 4, 2, 2),
        "heun": (4, 7, 2, 2),
    }
    model = LoadedModel(SD.load(spec, "cpu"))
    params = GenerationParams(prompt="a", width=64, height=64, steps=4, sampler="heun")
    report = model.generate(params, DeepCache(2, 3), lambda step: None).reports[0]
    assert tuple(call for call, letter in enumerate(report.decisions) if letter == "C") == found["heun"].computed
    assert report.settings["placement"] == "calibrated: heun, normal, 4 steps"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["random-flux"], "has no UNet"),
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
    assert read(spec) == ()
