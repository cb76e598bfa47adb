"""What is written of a measured load: kept, predicted, judged, drawn."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import __main__ as command
from benchmarks.serving import page, plan
from benchmarks.serving.load import Load
from benchmarks.serving.load import entry as told
from benchmarks.serving.plan import predict
from benchmarks.serving.scenarios import ruled
from benchmarks.serving.simulation import Machine, poisson_kinds, simulate
from tests.benchmarks.test_serving import sample

TIMES = {"one": {"alone": [0.5], "busy": [0.5], "batches": {"1": 1.0}}}


def entry(caches: bool, size: int, samples: list[Any], rate: float | None = None, queue: int = 64, **given: Any) -> Any:
    loop: Any = {"rate": rate, "clients": None if rate else 8}
    load = Load(name="a load", mix=[("one", 1.0, {})], seconds=100.0, warm_up=5.0, objective=2.0, **loop)
    looks = [(at, 60_000_000, 70_000_000 + at * 1000, 2) for at in range(100)]
    return json.loads(json.dumps(told(load, [(samples, looks)], **(ruled(caches, size, queue) | given))))


def measured() -> dict[str, Any]:
    """As the scenarios leave it, of loads that were computed instead of measured."""
    source = random.Random(0)
    arrivals = poisson_kinds(1.4, 130, [("one", 1.0)], source)
    outcomes = zip(arrivals, simulate(Machine(), arrivals, TIMES, source), strict=True)
    samples = [
        sample(at, one.latency, queue=one.wait, service=one.latency - one.wait)
        for (at, _), one in outcomes
        if one is not None and at < 100
    ]
    refused = [sample(at + 0.5, 0.01, 429) for at in range(100)]
    scenarios = {
        "closed": [entry(on, size, samples) for on in (False, True) for size in (1, 4)],
        "open": [entry(False, 1, samples, 1.4, times=TIMES, drift=0.01, capacity=2.0)],
        "overload": [entry(False, 1, [*samples, *refused], 6.0, 8, capacity=1.4)],
    }
    return {name: {"command": "command", "conditions": "Here.", "entries": those} for name, those in scenarios.items()}


def test_what_is_kept_is_read_back_and_its_summary_is_short(tmp_path: Path) -> None:
    kept = measured()
    command.write(tmp_path / "kept.json", kept)
    assert command.read(tmp_path / "kept.json") == kept
    assert command.read(tmp_path / "none.json") == {}
    assert "points" not in command.short(kept["open"]["entries"][0])


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the bench extra")
def test_page_and_plots_are_drawn_from_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ARRIVALS", 1000)
    kept, data = measured(), tmp_path / "kept.json"
    command.write(data, kept)
    command.again(data)
    text = (tmp_path / "kept.md").read_text(encoding="utf-8")
    assert "| a load | caches off, batches of 1 |" in text
    assert "![open](images/serving-open.png)" in text
    assert "nan" not in text
    planned = tmp_path / "plan.md"
    planned.write_text("<!-- times -->\n<!-- /times -->\n<!-- fleet -->\n<!-- /fleet -->\n")
    command.planned(rate=10.0, objective=2.0, share=0.95, price=2.0, workers=2, data=data, file=planned)
    assert "| caches off, batches of 1 |" in planned.read_text(encoding="utf-8")
    pictures = list((tmp_path / "images").glob("*.png"))
    assert len(pictures) == 4
    assert all(file.stat().st_size > 10_000 for file in pictures)


def test_a_run_is_predicted_by_its_own_service_times() -> None:
    found = predict(measured()["open"]["entries"][0])
    for one in found.values():
        assert one.low < one.model < one.high
        assert one.replay_error == pytest.approx(0, abs=1e-4)  # simulated with these times and arrivals
    mean = found["mean"]
    assert mean.exact == pytest.approx(mean.model, rel=0.1)
    assert found["p50"].exact is None
    assert page.of_prediction("x", "mean", replace(mean, measured=1.1 * mean.model)).holds
    assert not page.of_prediction("x", "mean", replace(mean, measured=2 * mean.model)).holds


def test_overload_is_held_to_its_bounds() -> None:
    good = measured()["overload"]["entries"][0]
    assert all(claim.holds for claim in page.of_overload(good))
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
        assert [claim.holds for claim in page.of_overload(bad)].count(False) == 1


def test_gains_are_over_neither_caches_nor_batches() -> None:
    entries = [
        {"name": "x", "rules": {"caches": on, "max_batch": size}, "figures": {"finished": finished}}
        for on, size, finished in ((False, 1, 2.0), (False, 4, 3.0), (True, 1, 4.0), (True, 4, 6.0))
    ]
    assert [claim.measured for claim in page.of_closed(entries)] == ["1.50×", "2.00×", "3.00×"]


def test_marked_tables_are_replaced_and_nothing_else() -> None:
    text = "before\n<!-- fleet -->\nold\n<!-- /fleet -->\nafter\n"
    assert page.marked(text, {"fleet": ["new", ""]}) == "before\n<!-- fleet -->\n\nnew\n<!-- /fleet -->\nafter\n"
    with pytest.raises(ValueError, match="'times' 0 times"):
        page.marked(text, {"times": []})
