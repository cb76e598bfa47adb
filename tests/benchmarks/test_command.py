"""The benchmarks as they are called: the last line, the page, and going on after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

from benchmarks import gpu
from benchmarks.cache import __main__ as command
from benchmarks.cache.measure import Bench
from benchmarks.geometry import TINY
from cache import DeepCache
from models.base import ModelSpec

needs_peers = pytest.mark.skipif(
    find_spec("cache_dit") is None or find_spec("matplotlib") is None, reason="needs the bench extra"
)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, sd_spec: ModelSpec, flux_spec: ModelSpec) -> list[str]:
    specs = [replace(spec, render_sizes=((64, 64),)) for spec in (sd_spec, flux_spec)]
    monkeypatch.setattr(command, "SPECS", specs)
    monkeypatch.setattr(command, "DEFAULT", sd_spec.name)
    monkeypatch.setattr(command, "DEFAULT_FLUX", flux_spec.name)
    monkeypatch.setattr(command, "OVERHEAD_REPEATS", 2)
    monkeypatch.setattr(command, "WIDE_REPEATS", 2)
    monkeypatch.setattr(command, "FORECAST_REPEATS", 2)
    tiny = next(geometry for geometry in TINY if geometry.kind == "transformer")
    monkeypatch.setattr(command, "FLUX_BLOCK", tiny)  # minutes at Flux's width
    monkeypatch.setattr(command, "counted", list)  # seconds for SDXL; tests/cache/test_cost.py has it
    return [spec.name for spec in specs]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    usual = {"model": None, "whole": False, "pictures": 2, "repeats": 1, "steps": 4, "device": "cpu"}
    grid = {"intervals": "2", "depths": "2", "thresholds": "0.6", "forecasts": None, "fewer": None}
    return {
        **usual,
        **grid,
        "cached_fewer": None,
        "page": folder / "benchmarks.md",
        "store": folder / "store.jsonl",
        **changes,
    }


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return parsed


def test_the_quick_run_ends_in_one_json_line(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(**arguments(tmp_path, model=names[:1]))
    last = last_line(capsys)
    rows = last["models"][names[0]]["settings"]
    assert rows["uncached"]["identical"] == 2
    balanced = rows["ours balanced 3/2"]
    assert balanced["operations_speedup"] == pytest.approx(balanced["predicted_speedup"], rel=0.03)
    assert balanced["operations_speedup"] > 1
    assert last["machine"]["versions"]["torch"] == torch.__version__
    assert not (tmp_path / "benchmarks.md").exists()


@needs_peers
def test_the_full_run_writes_its_page_and_goes_on_where_it_stopped(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command.main(**arguments(tmp_path, whole=True))
    first = last_line(capsys)
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    for name in names:
        assert f"images/pareto-{name}.png" in page
        assert (tmp_path / "images" / f"pareto-{name}.png").stat().st_size > 10_000
        for setting in first["models"][name]["settings"]:
            assert f"| {setting} |" in page
    excess = first["models"][names[0]]["overhead"][0]["excess"]
    assert excess.keys() == {f"ours, {DeepCache().forecast}", "ours, none", "DeepCache 0.1.1"}

    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "quality", fail)
    command.main(**arguments(tmp_path, whole=True))
    again = last_line(capsys)
    for name in names:
        assert again["models"][name]["settings"] == first["models"][name]["settings"]


@pytest.mark.parametrize("text", ["two", "2,,3", "2.5"])
def test_a_list_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="comma-separated"):
        command.main(**arguments(tmp_path, intervals=text))


@needs_peers
@pytest.mark.parametrize("geometry", TINY, ids=lambda geometry: geometry.name)
def test_the_gpu_benchmark_at_a_tiny_geometry(geometry: Any) -> None:
    rows = gpu.measure(geometry, "cpu", torch.float32, 1, Console(stderr=True))
    assert rows["uncached"]["hit_rate"] == 0
    cached = {name: row for name, row in rows.items() if "ours" in name}
    assert all(row["hit_rate"] > 0 and row["cache_mib"] > 0 for row in cached.values())
    assert all(row["predicted_speedup"] > 1 for row in cached.values())
    if geometry.kind == "transformer":
        assert cached["1 of 2 reused, ours"]["hit_rate"] == pytest.approx(1 / 2)
        assert cached["2 of 3 reused, ours"]["hit_rate"] == pytest.approx(2 / 3, abs=1e-3)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as ended:
        gpu.main(device="cuda", repeats=1, tiny=False)
    assert ended.value.exit_code == 1
    last = last_line(capsys)
    assert last["run"] is False
    assert "No GPU" in last["reason"]
