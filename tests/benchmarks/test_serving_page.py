"""What is written of a measured load: kept, replayed, judged, planned from."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.report import fill
from benchmarks.serving import __main__ as command
from benchmarks.serving import page, plan
from benchmarks.serving.load import Load
from benchmarks.serving.load import entry as told
from benchmarks.serving.plan import Machine, poisson_kinds, simulate
from benchmarks.serving.scenarios import ruled
from tests.benchmarks.test_serving import sample

TIMES = {"one": {"alone": [0.5], "busy": [0.5], "batches": {"1": 1.0}}}


def entry(samples: list[Any], rate: float, queue: int, **given: Any) -> Any:
    load = Load(name="a load", mix=[("one", 1.0, {})], seconds=100.0, warm_up=5.0, objective=2.0, rate=rate)
    looks = [{"at": at, "server": 6e7, "workers": 7e7 + at * 1000, "waiting": 2} for at in range(100)]
    return json.loads(json.dumps(told(load, samples, looks, rules=ruled(False, 1, queue), **given)))


def measured() -> dict[str, Any]:
    """As the scenarios leave it, of loads that were computed instead of measured."""
    source = random.Random(0)
    arrivals = [one for one in poisson_kinds(1.4, 130, [("one", 1.0)], source) if one[0] < 100]
    outcomes = zip(arrivals, simulate(Machine(), arrivals, TIMES, source), strict=True)
    samples = [
        {**sample(at, one.latency, queue=one.wait, service=one.latency - one.wait), "kind": kind}
        for (at, kind), one in outcomes
        if one is not None
    ]
    refused = [sample(at + 0.5, 0.01, 429) for at in range(100)]
    opened = entry(samples, 1.4, 64, times=TIMES, drift=0.01, capacity=2.0)
    opened["replayed"] = plan.Setting.of(opened).replayed(arrivals, 5.0)
    return {"open": [opened], "overload": [entry([*samples, *refused], 6.0, 8, capacity=1.4)]}


def test_the_command_measures_keeps_writes_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, data = measured(), tmp_path / "kept.json"
    monkeypatch.setattr(plan, "ARRIVALS", 1000)
    scenarios = {"open": (lambda setup: kept["open"], page.of_open)}
    monkeypatch.setattr(command, "SCENARIOS", scenarios)
    (tmp_path / "kept.md").write_text("Before.\n<!-- open -->\n<!-- /open -->\n")
    ran = CliRunner().invoke(command.cli, ["scenarios", "open", "--data", str(data)])
    assert json.loads(ran.stdout.splitlines()[-1])["scenarios"]["open"]["entries"] == kept["open"]
    assert command.read(data) == {"open": kept["open"]}
    text = (tmp_path / "kept.md").read_text(encoding="utf-8")
    assert "| a load | caches off, batches of 1 |" in text
    assert "nan" not in text
    ran = CliRunner().invoke(command.cli, ["plan", "--rate", "10", "--objective", "2", "--data", str(data)])
    assert "| caches off, batches of 1 |" in ran.stdout
    assert json.loads(ran.stdout.splitlines()[-1])["fleets"][0]["machines"] == 1
    assert CliRunner().invoke(command.cli, ["plan", "--data", str(tmp_path / "none.json")]).exit_code == 1


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the bench extra")
def test_the_plan_is_drawn_and_its_tables_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ARRIVALS", 1000)
    data, planned = tmp_path / "kept.json", tmp_path / "plan.md"
    data.write_text(json.dumps(measured()))
    planned.write_text("<!-- times -->\n<!-- /times -->\n<!-- fleet -->\n<!-- /fleet -->\n")
    command.planned(rate=10.0, objective=2.0, share=0.95, price=2.0, workers=2, data=data, file=planned)
    assert "| caches off, batches of 1 |" in planned.read_text(encoding="utf-8")
    assert (tmp_path / "images" / "planning.png").stat().st_size > 10_000


def test_a_run_is_replayed_by_its_own_service_times() -> None:
    (opened,) = measured()["open"]
    assert opened["replayed"] == pytest.approx({name: opened["figures"]["latency"][name] for name in plan.NAMES})
    assert [claim.holds for claim in page.of_open([opened])] == [True, True, True, None]
    wrong = {**opened, "replayed": {**opened["replayed"], "mean": 2 * opened["replayed"]["mean"]}}
    assert [claim.holds for claim in page.of_open([wrong])] == [False, True, True, None]


def test_overload_is_held_to_its_bounds() -> None:
    (good,) = measured()["overload"]
    assert all(claim.holds for claim in page.of_overload([good]))
    wrongs: list[tuple[str, str, Any]] = [
        ("figures", "statuses", {"200": 1, "500": 1}),
        ("figures", "without_retry_after", 1),
        ("held", "waiting_most", 9),
        ("held", "service_longest", 0.01),
        ("figures", "finished", 1.0),
        ("held", "server_growth", 0.06),
        ("held", "workers_growth", None),
    ]
    for part, name, value in wrongs:
        bad = {**good, part: {**good[part], name: value}}
        assert [claim.holds for claim in page.of_overload([bad])].count(False) == 1


def test_marked_parts_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    text = tmp_path / "page.md"
    text.write_text("before\n<!-- fleet -->\nold\n<!-- /fleet -->\nafter\n")
    fill(text, {"fleet": ["new", ""]})
    assert text.read_text() == "before\n<!-- fleet -->\n\nnew\n<!-- /fleet -->\nafter\n"
    with pytest.raises(ValueError, match="'times' 0 times"):
        fill(text, {"times": []})
