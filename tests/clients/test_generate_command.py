"""`python -m app generate --server`: the same files and words as without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import app.__main__ as command_line
import app.cli.generate
from app import cli as progress
from app.cli import Bar
from app.client import Client, Event, Job
from benchmarks.server import Server, wait_for
from tests.clients.conftest import KEY
from tests.clients.test_client import address_of


def test_a_server_draws(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "new" / "x.png"
    arguments = ["a misty forest", "-o", str(output), "--num-images", "2", "--preset", "balanced", "--seed", "5"]
    result = CliRunner().invoke(command_line.cli, ["generate", *arguments, "--server", address_of(server)])
    assert result.exit_code == 0, result.output
    assert "computed=14 reused=26 hit_rate=0.65" in result.stdout
    texts = [json.loads(Image.open(output.with_stem(f"x-{n}")).text["wavespeed"]) for n in (0, 1)]  # type: ignore[attr-defined]
    assert [text["seed"] for text in texts] == [5, 6]
    assert "40/40" in result.stderr


def test_json_is_all_that_stands_on_stdout(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "x.webp"
    arguments = ["generate", "a", "-o", str(output), "--json", "--server", address_of(server), "--flux"]
    result = CliRunner().invoke(command_line.cli, arguments)
    answer = json.loads(result.stdout)
    assert answer["files"] == [str(output)]
    assert (answer["model"], answer["cache"]["strategy"]) == ("tiny-flux", "first_block")
    assert output.read_bytes()[8:12] == b"WEBP"


def test_what_the_server_refuses_is_one_line(
    locked: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 3600.0)  # what a slow answer would be told in is not counted
    for values, words in ((["--key", "wrong"], "keys"), (["--key", KEY, "--width", "513"], "multiple of 8")):
        arguments = ["app", "generate", "a", "--server", address_of(locked), *values]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as caught:
            command_line.main()
        assert caught.value.code == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_interrupted_it_gives_the_job_up(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def interrupted(progress: Bar, job: Job, event: Event) -> None:
        seen.append(job.id)
        if event.name == "progress":
            raise KeyboardInterrupt

    monkeypatch.setattr(app.cli.generate, "_tell", interrupted)
    arguments = ["a", "-o", str(tmp_path / "x.png"), "--model", "slow", "--steps", "150", "--num-images", "10"]
    result = CliRunner().invoke(command_line.cli, ["generate", *arguments, "--server", address_of(server)])
    assert result.exit_code != 0
    assert not list(tmp_path.iterdir())
    with Client(address_of(server)) as client:
        assert client.job(seen[0]).state == "cancelled"
    wait_for(server.idle, 60, "an idle server")
