"""The cache benchmark as it is called: the last line, the page, and going on after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cache import __main__ as command
from benchmarks.cache.measure import Bench
from benchmarks.cache.overhead import FLUX_BLOCK
from benchmarks.cache.settings import Grid
from models.base import ModelSpec

needs_peers = pytest.mark.skipif(
    find_spec("cache_dit") is None or find_spec("matplotlib") is None, reason="needs the bench extra"
)


TINY = {
    **FLUX_BLOCK, "in_channels": 16, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
    "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, sd_spec: ModelSpec, flux_spec: ModelSpec) -> list[str]:
    specs = [replace(spec, render_sizes=((64, 64),)) for spec in (sd_spec, flux_spec)]
    monkeypatch.setattr(command, "SPECS", specs)
    monkeypatch.setattr(command, "DEFAULT", sd_spec.name)
    monkeypatch.setattr(command, "DEFAULT_FLUX", flux_spec.name)
    monkeypatch.setattr(command, "OVERHEAD_REPEATS", 2)
    monkeypatch.setattr(command, "WIDE_REPEATS", 2)
    monkeypatch.setattr(command, "FORECAST_REPEATS", 2)
    monkeypatch.setattr(command, "GRID", Grid(intervals=(2,), depths=(2,), thresholds=(0.6,)))
    monkeypatch.setattr(command, "FLUX_BLOCK", TINY)  # minutes at Flux's width
    monkeypatch.setattr(command, "counted", list)  # seconds for SDXL; tests/cache/test_flops.py has it
    return [spec.name for spec in specs]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    usual = {"model": None, "whole": False, "pictures": 2, "repeats": 1, "steps": 4, "device": "cpu"}
    return {**usual, "page": folder / "benchmarks.md", "store": folder / "store.jsonl", **changes}


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
    assert excess.keys() == {"ours", "ours, no forecast", "DeepCache 0.1.1"}

    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "quality", fail)
    command.main(**arguments(tmp_path, whole=True))
    again = last_line(capsys)
    for name in names:
        assert again["models"][name]["settings"] == first["models"][name]["settings"]
