"""A real Prometheus scrapes a running server: its hit rate is telemetry's, and each panel has something to show."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from benchmarks.server import Server, running, wait_for

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "wavespeed.json"
FAKE = ("-m", "tests.e2e.fake_server")
SCRAPE = "1s"  # instead of the deployed 15
REQUESTS: list[dict[str, Any]] = [
    {"deepcache_enabled": True, "steps": 20},
    {"deepcache_enabled": True, "steps": 7, "deepcache_interval": 5},
    {"flux_enabled": True, "steps": 9},
    {"steps": 4, "num_images": 3},
    {"model": "dies"},
]

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")


@dataclass(frozen=True)
class Prometheus:
    address: str

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The samples of an instant query, those that are numbers."""
        answer = httpx.get(f"{self.address}/api/v1/query", params={"query": query}, timeout=30).json()
        assert answer["status"] == "success", (query, answer)
        return [sample for sample in answer["data"]["result"] if not math.isnan(float(sample["value"][1]))]

    def number(self, query: str) -> float | None:
        samples = self.ask(query)
        return float(samples[0]["value"][1]) if len(samples) == 1 else None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(FAKE) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Runs on the deployed configuration, with another target and a shorter interval; has seen `REQUESTS` happen."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(PROMETHEUS / "rules", folder / "rules")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] |= dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), SCRAPE)
    config["scrape_configs"][0]["static_configs"][0]["targets"] = ["{}:{}".format(*server.address)]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{wait_for(lambda: listens_at(process), 60, 'a port')}")
        wait_for(lambda: prometheus.number("count(up == 1)") == 1, 60, "a first scrape")
        for request in REQUESTS:
            body = {"prompt": "a", "width": 64, "height": 64, **request}
            host, port = server.address
            answer = httpx.post(f"http://{host}:{port}/api/generate", json=body, timeout=60)
            assert answer.status_code == (503 if request.get("model") == "dies" else 200)
        wait_for(lambda: prometheus.number("sum(wavespeed_requests_total)") == len(REQUESTS), 60, "the last request")
        yield prometheus
    finally:
        process.kill()
        process.wait()


def listens_at(process: subprocess.Popen[bytes]) -> int | None:
    assert process.poll() is None, "Prometheus ended by itself"
    listening = [c for c in psutil.Process(process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return listening[0].laddr.port if listening else None


@pytest.mark.parametrize(("strategy", "name"), [("deepcache", "deepcache"), ("first_block", "fbcache")])
def test_the_hit_rate_is_telemetrys(server: Server, prometheus: Prometheus, strategy: str, name: str) -> None:
    told = server.get("/api/telemetry").json()["cache"][name]
    steps = f'wavespeed_cache_steps_total{{strategy="{strategy}"'
    for query, figure in {
        f'sum({steps}, outcome="computed"}})': told["computed_steps"],
        f'sum({steps}, outcome="reused"}})': told["reused_steps"],
        f'sum({steps}, outcome="reused"}}) / sum({steps}}})': told["hit_rate"],
    }.items():
        assert figure > 0
        # Waited for: a scrape that a busy machine let pass leaves a gap.
        assert wait_for(lambda query=query, figure=figure: round(prometheus.number(query) or 0, 4) == figure, 30, query)


def test_a_rate_sees_the_very_first_request(server: Server, prometheus: Prometheus) -> None:
    """The counters were there, at 0, before anything was counted; the rule's ratio is that of the whole run."""
    told = server.get("/api/telemetry").json()["cache"]["deepcache"]["hit_rate"]
    query = 'job_strategy:wavespeed_cache_hits:ratio_rate5m{strategy="deepcache"}'
    assert wait_for(lambda: round(prometheus.number(query) or 0.0, 4) == told, 30, "the recorded rate")


def test_an_alert_fires_and_tells_of_the_lost_worker(prometheus: Prometheus) -> None:
    [alert] = wait_for(lambda: prometheus.ask('ALERTS{alertname="WaveSpeedWorkerLost"}'), 30, "the alert")  # type: ignore[misc]
    assert (alert["metric"]["alertstate"], alert["metric"]["device"]) == ("firing", "cpu")


def queries() -> list[tuple[str, str]]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]


@pytest.mark.parametrize(("title", "query"), queries())
def test_every_panel_has_something_to_show(prometheus: Prometheus, title: str, query: str) -> None:
    """Grafana fills in the interval; here it is long enough for all that happened."""
    filled = query.replace("$__rate_interval", "5m")
    assert "$" not in filled, "a variable of Grafana's that this test does not know"
    wait_for(lambda: prometheus.ask(filled), 30, title)
