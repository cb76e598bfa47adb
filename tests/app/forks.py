"""Commands in processes of their own, forked from one that has imported the command line: none pays for that again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib, json, os, sys, traceback

from app.__main__ import main

commands, modules = json.load(sys.stdin)
for module in modules:
    importlib.import_module(module)
for number, (arguments, environment) in enumerate(commands):
    child = os.fork()
    if child == 0:
        for to, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{number}", os.O_WRONLY | os.O_CREAT), to)
        os.environ.update(environment)
        sys.argv[1:] = arguments
        status = 1
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code
        except BaseException:  # whatever ends it: a child must not go on as its parent
            traceback.print_exc()
        with open(f"heavy.{number}", "w") as file:
            print(*sorted({"torch", "diffusers"} & set(sys.modules)), end="", file=file)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """heavy: which of torch and diffusers it had imported."""

    status: int
    out: str
    err: str
    heavy: str


def ended(
    folder: Path, commands: Sequence[tuple[Sequence[str], dict[str, str]]], modules: Sequence[str] = ()
) -> list[Ended]:
    """What came of each command line with its environment, in `folder`. modules: further ones to import once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WAVESPEED_", "LD_"))}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT)},
        input=json.dumps([commands, modules]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr

    def read(name: str, number: int) -> str:
        return (folder / f"{name}.{number}").read_text(encoding="utf-8")

    return [
        Ended(int(status), *(read(name, number) for name in ("out", "err", "heavy")))
        for number, status in enumerate(ran.stdout.split())
    ]
