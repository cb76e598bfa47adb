"""The cache benchmark as it is called: the last line, and the table of small weights."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cache import __main__ as command
from benchmarks.cache import overhead, settings, weights
from cache import FirstBlockCache
from models.base import ModelSpec
from models.registry import Registry
from models.tuning.nearness import psnr


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, sd_spec: ModelSpec, flux_spec: ModelSpec) -> list[str]:
    specs = [replace(spec, render_sizes=((64, 64),)) for spec in (sd_spec, flux_spec)]
    monkeypatch.setattr(command, "SPECS", specs)
    monkeypatch.setattr(command, "DEFAULT", sd_spec.name)
    monkeypatch.setattr(command, "DEFAULT_FLUX", flux_spec.name)
    monkeypatch.setattr(overhead, "REPEATS", 2)
    monkeypatch.setattr(overhead, "RUNS", 2)
    monkeypatch.setattr(settings, "DEPTHS", (2,))
    return [spec.name for spec in specs]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    usual = {"model": None, "weights": False, "pictures": 2, "repeats": 1, "steps": 4, "device": "cpu"}
    return {**usual, "page": folder / "benchmarks.md", **changes}


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return parsed


def test_the_quick_run_ends_in_one_json_line(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "PRESETS", {"balanced": settings.PRESETS["balanced"]})
    command.main(**arguments(tmp_path, model=names[:1]))
    last = last_line(capsys)
    rows = last["models"][names[0]]["settings"]
    assert rows["uncached"]["identical"] == 2
    balanced = rows["ours balanced"]
    assert balanced["operations_speedup"] == pytest.approx(balanced["predicted_speedup"], rel=0.03)
    assert balanced["operations_speedup"] > 1
    assert last["machine"]["versions"]["torch"] == torch.__version__
    step, forecast = (claim["sentence"] for claim in last["models"][names[0]]["demands"])
    assert "above its bare layers" in step
    assert "time over plain reuse" in forecast
    assert not (tmp_path / "benchmarks.md").exists()


def test_a_loss_by_weights_is_told_apart_from_the_caches(
    flux_spec: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights under two names lose nothing by them, and by the cache what they lose in all."""
    specs = [replace(flux_spec, name=name, render_sizes=((64, 64),)) for name in ("whole", "again")]
    monkeypatch.setattr(command, "small_flux", lambda device: nullcontext(Registry(specs, "whole", "whole", device)))
    always = settings.Setting(settings.OURS, "1.0", settings.ours(FirstBlockCache(threshold=1.0)))
    monkeypatch.setattr(weights, "SETTINGS", (settings.PLAIN, always))
    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- weights -->\n<!-- /weights -->\n")
    command.main(**arguments(tmp_path, weights=True, steps=6))
    whole, whole_cached, again, cached = last_line(capsys)["rows"]
    equal = psnr(np.zeros((64, 64, 3)), np.zeros((64, 64, 3)))
    assert (whole["loss"], whole["cache_loss"]) == (None, None)
    assert (again["loss"], again["cache_loss"]) == ([equal] * 3, None)
    assert cached["loss"] == cached["cache_loss"] == whole_cached["loss"]
    assert cached["loss"][0] < equal
    assert cached["hit_rate"] == whole_cached["hit_rate"] > 0
    assert f"| again | uncached | 0.00 | {equal:.1f} | {equal:.1f}–{equal:.1f} |" in page.read_text(encoding="utf-8")
