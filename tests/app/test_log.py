"""The log: one form for every line, whatever is in it."""

from __future__ import annotations

import json
import logging
import logging.handlers
from pathlib import Path

import pytest

from app.log import logging_to, request_id


def logged(folder: Path) -> list[str]:
    return (folder / "server.log").read_text(encoding="utf-8").splitlines()


def test_a_line_has_time_level_request_and_logger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path / "deep" / "logs", "INFO") as path:
        token = request_id.set("abc")
        logging.getLogger("app.x").info("cache hit_rate=%.2f", 0.65)
        request_id.reset(token)
        logging.getLogger("app.x").debug("not at this level")
        logging.getLogger("app.x").warning("outside")
        logging.getLogger("app.x").warning("told", extra={"request_id": "def"})
    lines = logged(path.parent)
    assert [line.split(" ", 1)[1] for line in lines] == [
        "INFO    request=abc app.x: cache hit_rate=0.65",
        "WARNING request=- app.x: outside",
        "WARNING request=def app.x: told",
    ]
    assert lines[0][:4].isdigit()
    assert "request=abc" in capsys.readouterr().err


def test_text_of_a_client_cannot_make_a_line(tmp_path: Path) -> None:
    with logging_to(tmp_path, "INFO"):
        logging.getLogger("app").info("field=%s", "x\n2026 INFO request=y forged\x1b[2J\u202e\r\u2028end")
    lines = logged(tmp_path)
    assert len(lines) == 2
    assert all("request=- app: " in line for line in lines)
    assert lines[1].endswith(r"forged\x1b[2J\u202e\r\u2028end")


def test_a_stack_trace_keeps_the_prefix(tmp_path: Path) -> None:
    with logging_to(tmp_path, "INFO"):
        try:
            raise KeyError("cause")
        except KeyError:
            logging.getLogger("app").exception("it broke", extra={"request_id": "r"})
    lines = logged(tmp_path)
    assert len(lines) > 2
    assert all("ERROR   request=r app: " in line for line in lines)
    assert lines[-1].endswith("KeyError: 'cause'")


def test_json_is_an_object_a_line_with_the_same_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("app.x")
    figures = {"strategy": "deepcache", "hit_rate": 0.65, "message": "no field replaces what every line has"}
    with logging_to(tmp_path, "INFO", "json"):
        token = request_id.set("abc")
        log.info("cache hit_rate=%.2f", 0.65, extra={"fields": figures})
        request_id.reset(token)
        log.warning("two\nlines \u202e\u2028 %s", "×")
        try:
            raise KeyError("cause")
        except KeyError:
            log.exception("it broke", extra={"request_id": "r"})
    lines = logged(tmp_path)
    assert capsys.readouterr().err.splitlines() == lines
    first, second, third = map(json.loads, lines)
    assert first.pop("time")[:4].isdigit()
    assert first == {
        "level": "INFO",
        "request_id": "abc",
        "logger": "app.x",
        "message": "cache hit_rate=0.65",
        "strategy": "deepcache",
        "hit_rate": 0.65,
    }
    assert (second["request_id"], second["message"]) == ("-", "two\nlines \u202e\u2028 ×")
    assert lines[1].isascii()
    assert (third["request_id"], third["message"]) == ("r", "it broke")
    assert third["exception"].startswith("Traceback")
    assert third["exception"].endswith("KeyError: 'cause'")


def test_it_rotates_at_five_mebibytes_and_keeps_three(tmp_path: Path) -> None:
    with logging_to(tmp_path, "INFO"):
        log = logging.getLogger("app")
        for _ in range(30):
            log.info("x" * 2**20)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"server.log", "server.log.1", "server.log.2", "server.log.3"}
    assert max(sizes.values()) <= 5 * 2**20


def test_everything_is_as_before_afterwards(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    with logging_to(tmp_path, "DEBUG"):
        assert root.level == logging.DEBUG
    assert (list(root.handlers), root.level) == before
