"""Loading as the operator sees it: part by part in the log; a models file that is wrong ends the start in one line."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

import app.__main__ as command_line
from app import cli as progress
from app.engine.runner import runner_arguments
from app.engine.types import Job
from app.engine.worker import WARMING
from app.errors import CannotStart, ModelUnavailable
from app.settings import Settings
from models.base import Refiner
from tests.app.test_engine import job, running
from tests.models import original


def refined(name: str) -> Job:
    """By that model, once `flux` has begun."""
    plain = job(name, model="flux")
    return replace(plain, params=replace(plain.params, refiner=Refiner(model=name)))


async def test_the_log_tells_each_part_that_a_worker_loads(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "app.engine.supervisor"):
        async with running() as engine:
            await engine.submit(refined("slow")).result
            assert engine.status().devices[0].loaded == ("fine", "flux", "slow")
            with pytest.raises(ModelUnavailable) as caught:
                await engine.submit(refined("broken")).result
            assert caught.value.field == "refiner_model"
    said = [record.getMessage() for record in caplog.records]
    stages = {"fine": ("begins", "mixing colours", WARMING)}
    stages |= dict.fromkeys(("flux", "slow"), ("begins", "mixing colours")) | {"broken": ("begins",)}
    assert [line.removeprefix("loading ") for line in said if line.startswith("loading ")] == [
        f"model={model} device=cpu: {stage}" for model, its in stages.items() for stage in its
    ]
    assert engine.status().devices[0].loading is None


def test_a_model_of_the_folder_can_be_the_default_one(tmp_path: Path) -> None:
    made = original.stable_diffusion(original.networks(original.narrow("sd15")))
    original.write_hollow(tmp_path / "mine.safetensors", made)
    given = {"_env_file": None, "checkpoint_folder": tmp_path}
    arguments = runner_arguments(Settings(**given, model="mine"))
    assert arguments["configuration"].default == "mine"
    with pytest.raises(CannotStart, match=r"there is no model 'mien', but tiny-sd, tiny-flux, mine\."):
        runner_arguments(Settings(**given, model="mien"))


@pytest.mark.parametrize("command", [["serve"], ["models"], ["generate", "a"]], ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("WAVESPEED_MODELS_FILE", "models.toml", "no key 'famly'. The nearest is 'family'"),
        ("WAVESPEED_MODELS_FILE", "absent.toml", "absent.toml"),
        ("WAVESPEED_MODEL", "tiny-df", "there is no model 'tiny-df', but tiny-sd, tiny-flux."),
    ],
)
def test_a_wrong_configuration_ends_the_start_in_one_line(
    command: list[str],
    variable: str,
    value: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 3600.0)  # what a slow import would be told in is not counted
    monkeypatch.chdir(tmp_path)
    Path("models.toml").write_text('[[models]]\nname = "a"\nfamly = "sd15"\n')
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sys.argv", ["app", *command])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
