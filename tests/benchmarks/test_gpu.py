"""scripts/gpu-check on the CPU: its page and JSON, parts that fail or end too late, wheels from a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import measure
from benchmarks.gpu.page import page
from benchmarks.report import ROOT, machine

TESTS = "def test_good(): pass\ndef test_bad(): assert False, 'a reason'\n"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of it but compiled layers, which take a minute; tests/gpu are run by themselves.

    The process that runs pytest loads no plugin: one of them imports torch.
    """
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "pytest.ini").write_text("[pytest]", encoding="utf-8")
    (folder / "test_two.py").write_text(TESTS, encoding="utf-8")
    parts = command.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.setattr(command, "parts", lambda *given: [one for one in parts(*given) if "compiled" not in one.name])
        tests = [str(folder / "test_two.py"), "-c", str(folder / "pytest.ini")]
        with pytest.raises(typer.Exit) as ended:
            command.main(tests, out=folder / "out", device=None, small=True, seconds=1000)
    assert ended.value.exit_code == 1  # a test failed
    assert {file.name for file in (folder / "out").iterdir()} == {"gpu-check.json", "gpu-check.md"}
    result: dict[str, Any] = json.loads((folder / "out" / "gpu-check.json").read_text(encoding="utf-8"))
    assert (folder / "out" / "gpu-check.md").read_text(encoding="utf-8") == page(result)
    return result


def rows(result: dict[str, Any], part: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = result["parts"][part]["rows"]
    return found


def test_tests_are_told_one_by_one(checked: dict[str, Any]) -> None:
    assert [row["outcome"] for row in rows(checked, 0)] == ["passed", "failed"]
    assert checked["parts"][0]["state"] == "failed"
    assert any("a reason" in line for line in checked["parts"][0]["tail"])
    text = page(checked)
    assert "Tests: 1 passed, 1 failed." in text
    assert "test_two.py::test_bad`" in text


def test_each_setting_has_its_row(checked: dict[str, Any]) -> None:
    assert [part["state"] for part in checked["parts"][1:]] == ["done", "done"]
    planned = [(row["model"], *one) for row in rows(checked, 1) for one in row.get("planned", ())]
    found = {(row["model"], row["setting"], row["images"]): row for row in rows(checked, 1) if "setting" in row}
    assert list(found) == planned
    for key, row in found.items():
        _, name, _ = key
        if name in ("cache-dit", "uncached, sage", "uncached, sparge") and "error" in row:
            assert any(word in row["error"] for word in ("not installed", "No module named"))
        else:
            assert row["seconds_per_step"] > 0, key
            hits = {"uncached": row["hit_rate"] == 0.0, "ours": row["hit_rate"] in (0.25, 0.5, 0.75)}
            assert hits.get(name, row["hit_rate"] is None), key  # what a peer did is not known


def test_the_simulated_device_tells_of_the_same_runs(checked: dict[str, Any]) -> None:
    simulated = {(row["model"], row["setting"]): row for row in rows(checked, 2)}
    assert len(simulated) == 4
    for model in ("small-sd", "small-flux"):
        plain, ours = simulated[model, "uncached"], simulated[model, "ours"]
        assert plain["waits"] < 4  # of which none lies in a step
        assert 0 < ours["launches"] < plain["launches"]
        assert 0 < plain["weights_bytes"] < plain["peak_bytes"] <= ours["peak_bytes"] <= ours["most_bytes"]


def test_kernels_are_told_from_operations_of_the_host() -> None:
    gauge = measure.Gauge("cpu")
    with gauge.counted():
        torch.ones(2) + 1
    assert (gauge.waits, gauge.launches) == (None, None)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(2) + 1
    assert measure.events_on(DeviceType.CPU, profiler) >= 2
    assert measure.events_on(DeviceType.CUDA, profiler) == 0


def test_waits_are_told_from_what_torch_says_of_the_mode() -> None:
    """Its words, from c10/cuda/CUDAFunctions.cpp and torch/csrc/cuda/Module.cpp."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mode = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
        warnings.warn_explicit(mode, UserWarning, "torch/cuda/__init__.py", 1)
        for _ in range(2):
            text = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:1.)"
            warnings.warn_explicit(text, UserWarning, "a/cache/first_block/rule.py", 7)
    assert measure.waits_in(said) == {"first_block/rule.py:7": 2}


def test_what_was_written_before_the_end_of_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what never began is said."""
    marker = tmp_path / "written"
    lines = ["import pathlib, signal", """print('{"model": "x", "planned": [["a", 1], ["b", 1]]}')"""]
    row = {"model": "x", "setting": "a", "images": 1, "error": "no reason"}
    lines += [f"print('{json.dumps(row)}', flush=True)", f"pathlib.Path({str(marker)!r}).touch()", "signal.pause()"]
    (tmp_path / "endless.py").write_text("\n".join(lines), encoding="utf-8")

    class Impatient(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            while not marker.exists():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(command.subprocess, "Popen", Impatient)
    part = command.Part("endless", ("endless",), 1.0, {"PYTHONPATH": str(tmp_path)})
    late, never = command.run(part, 1000.0), command.run(part, 0.0)
    assert (late["state"], never["state"]) == ("out of time", "not reached")
    assert late["rows"][1] == row
    text = page({"machine": machine(), "small": False, "parts": [late, never]})
    assert "| a | 1 | no reason |" in text
    assert "| b | 1 | not reached |" in text
    assert "| endless | not reached | 0.0 |" in text


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(typer.Exit) as ended:
        command.main(small=False, device=None)
    assert ended.value.exit_code == 2
    assert "--small" in capsys.readouterr().err


def test_wheels_come_before_what_is_installed(tmp_path: Path) -> None:
    """This one takes typer's place, says so and ends."""
    named = "typer-99.0.dist-info"
    files = {
        "typer.py": "print('of the wheel')\nraise SystemExit(0)\n",
        f"{named}/METADATA": "Metadata-Version: 2.1\nName: typer\nVersion: 99.0\n",
        f"{named}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{named}/RECORD": f"typer.py,,\n{named}/METADATA,,\n{named}/WHEEL,,\n{named}/RECORD,,\n",
    }
    with zipfile.ZipFile(tmp_path / "typer-99.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    ran = subprocess.run(
        [ROOT / "scripts" / "gpu-check", "--wheels", tmp_path, "--small"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "of the wheel\n"
