"""`python -m app`: the server's checks and code, in a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import app.__main__ as command_line
import app.engine.runner
from tests.app.fakes import fake_runner


@pytest.fixture
def _fake_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app.engine.runner, "configured_runner", lambda device, **options: fake_runner(device))


@pytest.mark.usefixtures("_fake_models")
def test_generate_writes_pictures_and_says_what_the_cache_did(tmp_path: Path) -> None:
    arguments = ["a misty forest", "-o", "out/x.png", "--num-images", "2", "--preset", "balanced", "--seed", "5"]
    result = CliRunner().invoke(command_line.cli, ["generate", *arguments])
    assert result.exit_code == 0, result.output
    assert "computed=14 reused=26 hit_rate=0.65" in result.output
    texts = [json.loads(Image.open(tmp_path / "out" / f"x-{n}.png").text["wavespeed"]) for n in (0, 1)]  # type: ignore[attr-defined]
    assert [text["seed"] for text in texts] == [5, 6]
    assert "20/20" in result.output or "40/40" in result.output


@pytest.mark.usefixtures("_fake_models")
def test_json_is_the_report_and_nothing_else(tmp_path: Path) -> None:
    result = CliRunner().invoke(command_line.cli, ["generate", "a", "--json", "--deepcache", "--seed", "5"])
    answer = json.loads(result.stdout)
    assert answer["files"] == ["image.png"]
    assert (answer["seeds"], answer["cache"]["hit_rate"]) == ([5], 0.65)
    assert answer["timings"]["total_seconds"] >= 0
    assert answer["warnings"] == ["The fake says so."]


@pytest.mark.usefixtures("_fake_models")
def test_models_are_listed_as_json() -> None:
    result = CliRunner().invoke(command_line.cli, ["models"])
    assert {"fine", "flux"} <= {row["name"] for row in json.loads(result.stdout)}


@pytest.mark.usefixtures("_fake_models")
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--width", "513"], 1, "multiple of 8"),
        (["--flux", "--deepcache"], 1, "FBCache"),
        (["--model", "nothing"], 1, "There is no model"),
        (["-o", "x.gif"], 1, ".webp"),
        (["--lora", "ink:0.5", "--lora", "wash"], 1, "no LoRA 'ink'"),
        (["--lora", "ink:much"], 1, "NAME:0.8"),
    ],
)
def test_what_the_server_refuses_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["app", "generate", "a", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == status
    *progress, last = capsys.readouterr().err.splitlines()  # loading may take long enough to be told
    assert words in last
    assert not [line for line in progress if words in line or "Traceback" in line]


@pytest.mark.usefixtures("_fake_models")
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LD_SERVER_LOGLEVEL", "LOUD")
    monkeypatch.setattr("sys.argv", ["app", "serve"])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 2
    assert "LD_SERVER_LOGLEVEL" in capsys.readouterr().err


@pytest.mark.usefixtures("_fake_models")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fine", "--speedup", "2"], "Use DeepCache"),
        (["nothing", "--speedup", "2"], "There is no model"),
        (["flux", "--speedup", "2", "--forecast", "cubic"], "cache_forecast"),
    ],
)
def test_a_threshold_is_not_searched_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.setattr("sys.argv", ["app", "threshold", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 1
    assert words in capsys.readouterr().err
