"""What is written of a measured load: kept, predicted, judged, drawn."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import kept as store
from benchmarks.serving import page, plan
from benchmarks.serving.__main__ import marked
from benchmarks.serving.api import Answer
from benchmarks.serving.load import Sample
from benchmarks.serving.mix import Kind
from benchmarks.serving.prediction import NAMES, predict
from benchmarks.serving.scenarios import Measured, Rules
from benchmarks.serving.service import Occupied, ServiceTimes
from benchmarks.serving.simulation import Machine, poisson_kinds, simulate
from benchmarks.serving.target import Load, Run
from benchmarks.serving.verdict import of_closed, of_overload, of_prediction
from benchmarks.serving.watch import Look, growth


def sample(at: float, latency: float, status: int = 200, **answer: Any) -> Sample:
    told = {"images": 1 if status == 200 else 0, "retry_after": status == 429} | answer
    return Sample("one", at, at + 0.01, at + latency, Answer(status, **told))


def entry(rules: Rules, samples: list[Sample], *, rate: float | None = None, **given: Any) -> dict[str, Any]:
    load = Load(
        name="a load",
        mix=(Kind("one", 1.0),),
        seconds=100.0,
        warm_up=5.0,
        objective=2.0,
        rate=rate,
        clients=None if rate else 8,
    )
    looks = [Look(at, 60_000_000, 70_000_000 + at * 1000, 2) for at in range(100)]
    return Measured(rules, Run(load, samples, looks), **given).as_dict()


def measured() -> dict[str, Any]:
    """As the scenarios leave it, of loads that were computed instead of measured."""
    source = random.Random(0)
    times = ServiceTimes({"one": Occupied([0.5], [0.5])})
    arrivals = poisson_kinds(1.4, 130, [("one", 1.0)], source)
    outcomes = simulate(Machine(), arrivals, times, source)
    samples = [
        sample(at, one.latency, queue=one.wait, service=one.latency - one.wait)
        for (at, _), one in zip(arrivals, outcomes, strict=True)
        if one is not None and at < 100
    ]
    refused = [sample(at + 0.5, 0.01, 429) for at in range(100)]
    at_load = entry(Rules(False, 1), samples, rate=1.4, times=times, drift=0.01, capacity=2.0)
    over = entry(Rules(False, 1, queue_size=8), [*samples, *refused], rate=6.0, capacity=1.4)
    busy = [entry(Rules(on, size), samples) for on in (False, True) for size in (1, 4)]
    return {name: {"command": "command", "conditions": "Here.", "entries": list(those)} for name, those in (
        ("closed", busy), ("open", [at_load]), ("overload", [over]),
    )}  # fmt: skip


def test_what_is_kept_is_read_back_and_its_summary_is_short(tmp_path: Path) -> None:
    kept = measured()
    store.write(tmp_path / "kept.json", kept)
    assert store.read(tmp_path / "kept.json") == json.loads(json.dumps(kept))
    assert store.read(tmp_path / "none.json") == {}
    assert "points" not in store.summary(kept)["open"]["entries"][0]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the bench extra")
def test_page_and_plots_are_drawn_from_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ARRIVALS", 1000)
    from benchmarks.serving.plot import DRAWN, load_curves

    kept = measured()
    for name, one in kept.items():
        DRAWN[name](one["entries"], tmp_path / f"{name}.png")
    load_curves(kept["open"]["entries"], 2, 0.95, 2.0, tmp_path / "curves.png")
    assert all(file.stat().st_size > 10_000 for file in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 4
    page.write(tmp_path / "page.md", kept, {"open": "open.png"})
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| a load | caches off, batches of 1 |" in text
    assert "![open](open.png)" in text
    assert "nan" not in text


def test_a_run_is_predicted_by_its_own_service_times() -> None:
    found = predict(measured()["open"]["entries"][0])
    for name in NAMES:
        assert found.low[name] < found.model[name] < found.high[name]
        assert found.replay_error(name) == pytest.approx(0, abs=1e-4)  # simulated with these times and arrivals
    assert found.closed_form == pytest.approx(found.model["mean"], rel=0.1)
    far = replace(found, measured={name: 2 * value for name, value in found.model.items()})
    assert [claim.holds for claim in of_prediction("x", far)] == [False] * 3


def test_overload_is_held_to_its_bounds() -> None:
    good = measured()["overload"]["entries"][0]
    assert all(claim.holds for claim in of_overload(good))
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
        assert [claim.holds for claim in of_overload(bad)].count(False) == 1


def test_gains_are_over_neither_caches_nor_batches() -> None:
    entries = [
        {"name": "x", "rules": {"caches": on, "max_batch": size}, "figures": {"finished": finished}}
        for on, size, finished in ((False, 1, 2.0), (False, 4, 3.0), (True, 1, 4.0), (True, 4, 6.0))
    ]
    assert [claim.measured for claim in of_closed(entries)] == ["1.50×", "2.00×", "3.00×"]


def test_growth_is_of_medians_a_third_apart() -> None:
    assert growth([100, 100, 500, 100, 100, 100, 110, 110, 110]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="2 looks"):
        growth([1, 2])


def test_marked_tables_are_replaced_and_nothing_else() -> None:
    text = "before\n<!-- fleet -->\nold\n<!-- /fleet -->\nafter\n"
    assert marked(text, {"fleet": ["new", ""]}) == "before\n<!-- fleet -->\n\nnew\n<!-- /fleet -->\nafter\n"
    with pytest.raises(ValueError, match="'times' 0 times"):
        marked(text, {"times": []})
