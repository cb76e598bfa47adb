"""The server as a process that is told to end while it has work."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.log import ENDING
from tests.app.forks import ROOT, Ended, ended

PATIENCE = 60.0  # seconds; only keeps a broken server from hanging the suite
SCRIPT = """
import logging
import os
import threading

from app.engine.supervisor import LocalEngine
from app.log import logging_to
from app.http.app import create_app
from app.http.server import serve_until_told
from app.settings import Settings
from tests.app.fakes import fake_runner

SAID = int(os.environ.get("SAID", "0"))  # lines


def runner(device):
    os.write(2, b"a worker says much\\n" * SAID)
    return fake_runner(device)


def talk():
    for number in range(SAID):
        logging.getLogger("talk").info("line %d", number)


if __name__ == "__main__":
    settings = Settings()
    with logging_to(settings.log_folder, settings.log_level, whole_stderr=True):
        threading.Thread(target=talk).start()
        engine = LocalEngine(runner, ["cpu"], stop_seconds=settings.stop_seconds)
        serve_until_told(create_app(settings, engine), settings, engine)
"""


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def ask(self, **body: Any) -> httpx.Response:
        return self.client.post("/api/generate", json={"prompt": "a", "width": 64, "height": 64, **body})

    def running(self) -> tuple[int, int]:
        telemetry = self.client.get("/api/telemetry").json()
        return telemetry["running_count"], telemetry["pending_count"]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def wait_for(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


@contextmanager
def serving(folder: Path, stderr: int | None = None, said: int = 0, **settings: Any) -> Iterator[Server]:
    """`stderr`: None for a file in `folder`. `said`: lines that the server and its worker say by themselves."""
    folder.mkdir(exist_ok=True)
    (folder / "serve.py").write_text(SCRIPT)
    log = folder / "logs" / "server.log"
    log.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WAVESPEED_PORT": "0", "SAID": str(said)}
    environment |= {f"WAVESPEED_{name.upper()}": str(value) for name, value in settings.items()}
    with (folder / "stderr").open("wb") as file:
        to = file if stderr is None else stderr
        process = subprocess.Popen([sys.executable, "serve.py"], cwd=folder, env=environment, stderr=to)
    try:
        found = wait_for(lambda: log.exists() and re.search(r"http://127\.0\.0\.1:\d+", log.read_text()))
        with httpx.Client(base_url=found[0], timeout=PATIENCE) as client:
            wait_for(lambda: client.get("/readyz").status_code == 200)
            yield Server(process, client, log)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_a_stderr_that_nobody_reads_holds_up_neither_the_log_nor_the_worker_nor_the_end(tmp_path: Path) -> None:
    limit = 0.2 + 2 + 10 + 2 * ENDING  # drain, worker, last answers, log
    with serving(tmp_path, subprocess.PIPE, said=10_000, drain_seconds=0.2, stop_seconds=2) as server:
        wait_for(lambda: "line 9999" in server.log.read_text())  # so the worker is ready: it has said its lines before
        assert server.ask().status_code == 200
        server.end()
        assert server.process.wait(limit) == 0
        log = server.log.read_text()
        assert re.findall(r"talk: line (\d+)", log) == [str(number) for number in range(10_000)]
        assert "Finished server process" in log.splitlines()[-1]


def test_what_was_accepted_is_finished_and_nothing_else_taken(tmp_path: Path) -> None:
    with serving(tmp_path) as server, ThreadPoolExecutor(4) as pool:
        worker = server.client.get("/api/telemetry").json()["devices"][0]["pid"]
        asked: list[Future[httpx.Response]] = [pool.submit(server.ask, model="slow", steps=100)]
        wait_for(lambda: server.running() == (1, 0))  # two seconds, which the others come in
        asked += [pool.submit(server.ask) for _ in range(3)]
        wait_for(lambda: server.running() == (1, 3))
        server.end()
        not_ready = wait_for(lambda: (answer := server.client.get("/readyz")).status_code == 503 and answer)
        assert "shutting down" in not_ready.json()["error"]["message"]
        late = server.ask()
        assert (late.status_code, late.json()["error"]["type"]) == (503, "not_ready")
        assert int(late.headers["retry-after"]) > 0
        assert [answer.result().status_code for answer in asked] == [200] * 4
        assert server.process.wait(PATIENCE) == 0
        wait_for(lambda: not psutil.pid_exists(worker))
    log = server.log.read_text()
    assert len(re.findall("hit_rate=", log)) == 4
    assert "Finished server process" in log.splitlines()[-1]


@pytest.mark.parametrize("hurry", [False, True])
def test_what_cannot_be_finished_is_answered(tmp_path: Path, hurry: bool) -> None:
    """When the time is over, or when a second signal says that there is none."""
    with serving(tmp_path, drain_seconds=600 if hurry else 0.2, stop_seconds=600 if hurry else 0.2) as server:
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(server.ask, model="hangs")]
            wait_for(lambda: server.running() == (1, 0))  # or "fine" may come first, and be done
            asked.append(pool.submit(server.ask))
            wait_for(lambda: server.running() == (1, 1))
            server.end()
            if hurry:
                wait_for(lambda: "told to end" in server.log.read_text())
                server.end()
            for answer in asked:
                assert (answer.result().status_code, answer.result().json()["error"]["type"]) == (503, "not_ready")
                assert int(answer.result().headers["retry-after"]) > 0
        assert server.process.wait(PATIENCE) == 0
        assert "Finished server process" in server.log.read_text().splitlines()[-1]


def test_a_restart_goes_on_with_the_jobs_that_were_promised(tmp_path: Path) -> None:
    settings = {"jobs_folder": tmp_path / "jobs", "jobs_restart": "requeue", "drain_seconds": 0}
    body = {"prompt": "a", "width": 64, "height": 64, "seed": 3}
    with serving(tmp_path, **settings) as server:
        blocking = server.client.post("/api/jobs", json={**body, "model": "slow", "steps": 150}).json()["id"]
        waiting = server.client.post("/api/jobs", json=body).json()["id"]
        server.end()
        assert server.process.wait(PATIENCE) == 0
    with serving(tmp_path, **settings) as server:
        for identity in (blocking, waiting):
            server.client.get(f"/api/jobs/{identity}/events")
            assert server.client.get(f"/api/jobs/{identity}").json()["result"]["seeds"] == [3]


FAULTS = [
    (
        "WAVESPEED_PORT",
        "taken",
        "WAVESPEED_PORT: another program listens on port {port} of 127.0.0.1; take another",
    ),
    ("WAVESPEED_HOST", "nonsense.invalid", "WAVESPEED_HOST: 'nonsense.invalid' is no address ("),
    ("WAVESPEED_HOST", "192.0.2.1", "WAVESPEED_HOST: '192.0.2.1' is no address of this machine."),
    ("WAVESPEED_DRAIN_SECONDS", "-1", "WAVESPEED_DRAIN_SECONDS: Input should be"),
    ("WAVESPEED_JOBS_RESTART", "requeue", "WAVESPEED_JOBS_RESTART=requeue needs WAVESPEED_JOBS_FOLDER"),
    ("WAVESPEED_JOBS_FOLDER", __file__, f"WAVESPEED_JOBS_FOLDER: '{__file__}' cannot be used"),
    ("WAVESPEED_LOG_FOLDER", f"{__file__}/x", f"WAVESPEED_LOG_FOLDER: '{__file__}/x' cannot be written to: Not a"),
    ("WAVESPEED_MODELS_FILE", "none.toml", "WAVESPEED_MODELS_FILE: there is no file 'none.toml'."),
    ("WAVESPEED_MODELS_FILE", "bad.toml", "there is no key 'path'. The nearest is 'folder'"),
    ("WAVESPEED_MODEL", "sdxl", "WAVESPEED_MODEL: there is no model 'sdxl', but tiny-sd, tiny-flux."),
    ("WAVESPEED_API_KEY", "secret", "the nearest one is WAVESPEED_API_KEYS."),
    ("WAVESPEED_DEVICES", "cuda:77", "WAVESPEED_DEVICES: "),
]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Ended]]:
    """A port that is taken, and what came of a start with each of FAULTS."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "bad.toml").write_text('[[models]]\nname = "mine"\nfamily = "sd15"\npath = "weights"\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        commands = [(["serve"], {name: port if value == "taken" else value}) for name, value, _ in FAULTS]
        return port, ended(folder, commands, ["app.engine.runner", "app.http.app", "app.http.server"])


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{name}-{value}" for name, value, _ in FAULTS])
def test_a_setting_at_fault_ends_the_start_in_one_sentence(faulty: tuple[str, list[Ended]], number: int) -> None:
    (name, _, sentence), (port, starts) = FAULTS[number], faulty
    start = starts[number]
    assert start.status == 2, start.err
    assert sentence.format(port=port) in start.err
    assert name in start.err
    assert "Traceback" not in start.err
    assert "secret" not in start.err
    assert len([line for line in start.err.splitlines() if " INFO " not in line and "startup failed" not in line]) == 1


def test_the_start_prints_addresses_that_work(tmp_path: Path) -> None:
    with serving(tmp_path, host="0.0.0.0") as server:
        lines = server.log.read_text().splitlines()
        told = [found[1] for line in lines if (found := re.search(r"listening: (\S+)/ \(its API: \1/docs\)", line))]
        assert told[0] == str(server.client.base_url)
        assert len(told) == len(set(told))
        for address in told:
            assert "0.0.0.0" not in address
            assert httpx.get(f"{address}/docs", trust_env=False).status_code == 200
        assert all(address in (tmp_path / "stderr").read_text() for address in told)
