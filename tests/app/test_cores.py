"""How a process shares its machine's cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHOWN = {"OMP_DISPLAY_ENV": "VERBOSE"}  # GNU's OpenMP says at its start what it goes by


DRAWING = "from app.engine.runner import configured_runner; configured_runner('cpu')"
LIBRARY = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
SHARING = f"import ctypes; from app.engine.runner import share_cores; share_cores(); ctypes.CDLL({str(LIBRARY)!r})"


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(
    ("code", "settings", "spins"),
    [
        (DRAWING, {}, "30000"),
        (SHARING, {"GOMP_SPINCOUNT": "5"}, "5"),
        (SHARING, {"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
    ],
    ids=["a drawing process", "its own count", "its own policy"],
)
def test_idle_threads_spin_as_long_as_wanted(code: str, settings: dict[str, str], spins: str) -> None:
    """A process that draws shares its cores. What was said otherwise is read by OpenMP alone, without torch."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env=ours | SHOWN | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
