"""What a command says while it works."""

from __future__ import annotations

import time

import pytest

from app import cli as progress


def test_without_a_terminal_the_state_is_told_line_by_line_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 3600.0)  # what is said at the beginning and the end
    with progress.bar("loading") as shown:
        shown.show("tiny", total=2)
        shown.advance("C")
        shown.advance("R")
    said = capsys.readouterr()
    assert said.out == ""
    *_, last = said.err.splitlines()
    assert last.startswith("tiny 2/2 R ")


def test_work_that_says_nothing_is_still_seen_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.001)
    said, until = "", time.monotonic() + 60
    with progress.bar("loading"):
        while said.count("loading") < 3 and time.monotonic() < until:
            said += capsys.readouterr().err
        assert said.count("loading") >= 3


def test_a_failure_is_left_to_its_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SILENCE", 3600.0)
    with pytest.raises(OSError, match="broken"), progress.bar("loading"):
        raise OSError("broken")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    with progress.bar("loading") as shown:
        shown.show("tiny", total=7, completed=3, note="CR")
    said = capsys.readouterr()
    assert said.out == ""
    assert "tiny" in said.err
    assert "3/7" in said.err
    assert "CR" in said.err
