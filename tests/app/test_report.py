"""Cache reports put together, counters over the last hundred, and a process that stays light."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from app.engine.runner import summarise
from app.http.pages import exposition
from app.metrics import RECENT, CacheUse, Metrics
from cache import CacheReport
from tests.app.fakes import FakeEngine


def test_one_report_is_itself() -> None:
    report = CacheReport("deepcache", {"interval": 3}, "CRR", reuse_cost=0.25, cache_bytes=7)
    assert summarise([report]) == report.as_dict()


def test_reports_of_batches_are_summed() -> None:
    first = CacheReport("first_block", {"threshold": 0.05}, "CRR", cache_bytes=7, residuals=[None, 0.01, 0.02])
    second = CacheReport("first_block", {"threshold": 0.05}, "CC", cache_bytes=9, residuals=[None, 0.5])
    summary = summarise([first, second])
    assert (summary["computed"], summary["reused"], summary["hit_rate"]) == (3, 2, 0.4)
    assert (summary["decisions"], summary["cache_bytes"], summary["threshold"]) == ("CRR CC", 9, 0.05)
    assert summary["residuals"] == [None, 0.01, 0.02, None, 0.5]
    assert first.decisions == "CRR"


def test_controlnets_of_batches_are_summed() -> None:
    first = CacheReport("deepcache", {}, "CRR", reuse_cost=0.2, control_calls=1, control_operations=(0.5, 1.5))
    second = CacheReport("deepcache", {}, "CR", reuse_cost=0.2)
    summary = summarise([first, second])
    assert summary["control"] == {"calls": 1, "share": round(0.5 / (2 + 3 * 0.2 + 0.5), 4)}
    assert summary["predicted_speedup"] == round((5 + 1.5) / (2 + 3 * 0.2 + 0.5), 3)
    uncounted = summarise([first, replace(second, control_calls=1)])
    assert uncounted["control"] == {"calls": 2, "share": None}
    assert uncounted["predicted_speedup"] is None


def test_what_json_cannot_say_is_null() -> None:
    summary = summarise([CacheReport("first_block", {}, "CC", residuals=[None, math.nan])])
    assert summary["residuals"] == [None, None]
    json.dumps(summary, allow_nan=False)


def test_a_run_without_a_report_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="once a batch"):
        summarise([])


def test_the_recent_rate_forgets_and_the_total_does_not() -> None:
    metrics = Metrics()

    def use(computed: int, reused: int) -> None:
        use = CacheUse(model="fine", strategy="deepcache", computed=computed, reused=reused)
        metrics.generated(use, queue_seconds=2.0, generation_seconds=1.0, images=1, batches=(1,))

    for _ in range(RECENT):
        use(10, 0)
    for _ in range(RECENT):
        use(5, 5)
    report = metrics.cache_report()["deepcache"]
    assert (report["requests"], report["recent_requests"]) == (2 * RECENT, RECENT)
    assert (report["hit_rate"], report["recent_hit_rate"]) == (0.25, 0.5)
    assert metrics.average_wait_seconds == 2.0
    assert metrics.cache_report()["fbcache"]["last"] is None


def test_two_apps_count_apart() -> None:
    engine = FakeEngine()
    one, other = Metrics(), Metrics()
    one.answered("fine", "ok")
    line = b'wavespeed_requests_total{model="fine",outcome="ok"} 1.0'
    assert line in exposition(one, engine)
    assert line not in exposition(other, engine)


def test_a_device_that_is_gone_is_no_longer_shown() -> None:
    engine = FakeEngine()
    metrics = Metrics()
    assert b'wavespeed_worker_state{device="cpu",state="ready"} 1.0' in exposition(metrics, engine)
    nobody = replace(engine.status(), devices=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "status", lambda: nobody)
        assert b'device="cpu"' not in exposition(metrics, engine)


def test_the_http_process_loads_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "transformers", "numpy")
    script = (
        "import sys, app.http.app, app.engine.supervisor, app.log\n"
        "from app.settings import Settings\n"
        "from functools import partial\n"
        "from app.engine.runner import configured_runner\n"
        "engine = app.engine.supervisor.LocalEngine(partial(configured_runner, threads=1), ['cpu'])\n"
        "app.http.app.create_app(Settings(_env_file=None), engine).openapi()\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
