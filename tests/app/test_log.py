"""The log: one form for every line, whatever is in it."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
import time
from pathlib import Path

import pytest

import app.log
from app.errors import CannotStart
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


def test_a_reader_that_comes_late_is_told_what_it_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    line = "x" * 1000
    with os.fdopen(writing, "w") as stream, os.fdopen(reading) as late:
        monkeypatch.setattr("sys.stderr", stream)
        with logging_to(tmp_path, "INFO"):
            for _ in range(4000):  # four megabytes, of which a pipe takes 64 KiB and the queue one
                logging.getLogger("app").info(line)
            read = threading.Thread(target=lambda: lines.extend(iter(late.readline, "end\n")))
            lines: list[str] = []
            read.start()
            while not lines or "missing" not in lines[-1]:
                time.sleep(0.01)
            logging.getLogger("app").info("after it")
        stream.write("end\n")
        stream.flush()
        read.join()
    *before, notice, after = lines
    missing = re.search(r"WARNING request=- app\.log: (\d+) lines are missing here", notice)
    assert missing is not None
    assert len(before) + int(missing[1]) == 4000
    assert len(before) > 900
    assert after.endswith("app: after it\n")
    assert len(logged(tmp_path)) == 4001


def test_a_disk_that_takes_nothing_holds_nobody_up_and_goes_on_when_it_takes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, full = os.write, threading.Event()
    monkeypatch.setattr(app.log, "_RETRY", 0.01)
    monkeypatch.setattr(app.log, "_FILE_ROOM", 200)  # bytes: three lines

    def to_a_full_disk(descriptor: int, data: bytes) -> int:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", to_a_full_disk)
    with logging_to(tmp_path, "INFO") as path:
        log = logging.getLogger("app")
        log.info("before")
        while "before" not in path.read_text():
            time.sleep(0.01)
        full.set()
        for number in range(10):
            log.info("line %d", number)
        time.sleep(0.1)
        full.clear()
        while "missing" not in path.read_text():
            time.sleep(0.01)
        log.info("after")
    before, *waited, notice, after = logged(tmp_path)
    assert [line[-6:] for line in waited] == [f"line {number}" for number in range(len(waited))]
    assert 0 < len(waited) < 10
    assert f" {10 - len(waited)} lines are missing here" in notice
    assert (before.endswith("before"), after.endswith("after")) == (True, True)
    assert capsys.readouterr().err.count("line ") == 10


def test_a_line_that_a_disk_has_room_for_half_of_is_written_whole_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, [20]  # bytes
    monkeypatch.setattr(app.log, "_RETRY", 0.01)
    path = tmp_path / "server.log"

    def to_a_small_disk(descriptor: int, data: bytes) -> int:
        if not os.path.samestat(os.fstat(descriptor), path.stat()) or room[0] > 1000:
            return write(descriptor, data)
        if not (fits := data[: room[0] - os.fstat(descriptor).st_size]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, fits)

    monkeypatch.setattr(os, "write", to_a_small_disk)
    with logging_to(tmp_path, "INFO"):
        logging.getLogger("app").info("a line")
        time.sleep(0.1)
        assert path.stat().st_size in (0, 20)
        room[0] = 10**6
    assert [line.partition(" INFO ")[2] for line in logged(tmp_path)] == ["   request=- app: a line"]


def test_a_disk_that_hangs_does_not_keep_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(app.log, "ENDING", 0.1)
    monkeypatch.setattr(os, "write", lambda descriptor, data: released.wait() and len(data))
    with logging_to(tmp_path, "INFO"):
        logging.getLogger("app").info("a line")
    threads = [thread.name for thread in threading.enumerate() if thread.daemon]
    assert "log to file" in threads  # left behind
    released.set()


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CannotStart, match=r"^WAVESPEED_LOG_FOLDER: '.*file/x' cannot be written to: Not a directory\.$"),
        logging_to(tmp_path / "file" / "x", "INFO"),
    ):
        pass


def test_everything_is_as_before_afterwards(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    with logging_to(tmp_path, "DEBUG"):
        assert root.level == logging.DEBUG
    assert (list(root.handlers), root.level) == before
