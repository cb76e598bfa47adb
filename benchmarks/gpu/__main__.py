"""scripts/gpu-check: the tests and measurements that need a GPU, each part in a process and a time of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu.page import page
from benchmarks.report import ROOT, machine

OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b")
TAIL = 40  # lines of a part's output that are kept when it went wrong


@dataclass(frozen=True, slots=True)
class Part:
    """share: of the whole time; what a part leaves over, the next ones have."""

    name: str
    command: tuple[str, ...]
    share: float
    environment: dict[str, str] = field(default_factory=dict)


def parts(device: str, small: bool, tests: Sequence[str]) -> list[Part]:
    """What tells most comes first."""
    quiet = ("-v", "--tb=short", "-p", "no:cacheprovider", "-o", "filterwarnings=default")  # of other versions, too

    def measure(share: float, *arguments: str) -> Part:
        return Part(" ".join(arguments), ("benchmarks.gpu.measure", *arguments, "--device", device), share)

    if small:
        names = ["small-sd", "small-flux"]
        measured = [measure(0.4, *names), measure(0.3, "small-sd", "--compiled")]
    else:
        names = ["sd15", "sdxl", "flux-dev", "sd21", "flux-schnell"]
        measured = [measure(*one) for one in zip((0.1, 0.12, 0.2, 0.05, 0.1), names, strict=True)]
        measured += [measure(0.08, name, "--compiled") for name in names[:2]]
    tested = Part("tests", ("pytest", *quiet, *tests), 0.24, {"TEST_DEVICE": device})
    simulated = Part("simulated", ("tests.accelerator", "counts", *names), 0.1, {"CUDA_VISIBLE_DEVICES": ""})
    return [tested, *measured, simulated]


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Its state, and what it wrote; after `seconds` it is killed, with its children."""
    if seconds <= 0:
        return {"name": part.name, "state": "not reached", "seconds": 0.0, "rows": []}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.command],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **part.environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        lines = out.read().splitlines()
    result = {"name": part.name, "state": state, "seconds": round(time.monotonic() - started, 1), "rows": rows(lines)}
    return result if state == "done" else {**result, "tail": lines[-TAIL:]}


def rows(lines: Sequence[str]) -> list[dict[str, Any]]:
    """JSON lines as they are; a line of pytest's a test."""
    found = []
    for line in lines:
        if line.startswith('{"') and line.endswith("}"):
            found.append(json.loads(line))
        elif outcome := OUTCOME.match(line):
            found.append({"test": outcome[1], "outcome": outcome[2].lower()})
    return found


def main(
    tests: Annotated[list[str] | None, typer.Argument(help="What pytest is given; else tests/gpu.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for gpu-check.json and gpu-check.md.")] = ROOT / "build/gpu-check",
    device: Annotated[str | None, typer.Option(help="A torch device; else cuda, and cpu if small.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Small models, for a CPU.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="All parts together.")] = 510.0,
) -> None:
    """Run the tests and measurements that need a GPU; results are written after every part."""
    import torch

    device = device or ("cpu" if small else "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("torch finds no CUDA device here. On a CPU: scripts/gpu-check --small.", file=sys.stderr)
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"benchmark": "gpu", "small": small, "machine": machine(device), "parts": []}
    chosen = parts(device, small, tests or ["tests/gpu"])
    started, until = time.monotonic(), 0.0
    for part in chosen:
        until += part.share * seconds / sum(one.share for one in chosen)
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        result["parts"].append(run(part, started + until - time.monotonic()))
        (out / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "gpu-check.md").write_text(page(result), encoding="utf-8")
    print((out / "gpu-check.md").read_text(encoding="utf-8"))
    if any(part["state"] == "failed" for part in result["parts"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
