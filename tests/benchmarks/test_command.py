"""The cache benchmark as it is called: the last line, the page, and going on after an interruption."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cache import __main__ as command
from benchmarks.cache import settings, weights
from benchmarks.cache.measure import Bench
from cache import FirstBlockCache
from models.base import ModelSpec
from models.registry import Registry
from models.tuning.nearness import psnr

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
    monkeypatch.setattr(command, "FORECAST_REPEATS", 2)
    for name, only in {"INTERVALS": 3, "DEPTHS": 2, "THRESHOLDS": 0.6, "FEWER_STEPS": 0.5, "CACHED_STEPS": 0.5}.items():
        monkeypatch.setattr(settings, name, (only,))
    return [spec.name for spec in specs]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    usual = {"model": None, "whole": False, "weights": False, "pictures": 2, "repeats": 1, "steps": 4, "device": "cpu"}
    return {**usual, "page": folder / "benchmarks.md", "store": folder / "store", **changes}


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


@needs_peers
def test_the_full_run_writes_its_page_and_goes_on_where_it_stopped(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks.md").write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    command.main(**arguments(tmp_path, whole=True))
    first = last_line(capsys)
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    for name in names:
        for setting in first["models"][name]["settings"]:
            assert f"| {setting} |" in page
    told = [claim["sentence"] for claim in first["models"][names[0]]["demands"]]
    assert any("time over plain reuse" in sentence for sentence in told)
    assert any("above its bare layers" in sentence for sentence in told)

    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "quality", fail)
    command.main(**arguments(tmp_path, whole=True))
    again = last_line(capsys)
    for name in names:
        assert again["models"][name]["settings"] == first["models"][name]["settings"]
