"""How a process shares its machine's cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOWN = {"OMP_DISPLAY_ENV": "VERBOSE"}  # GNU's OpenMP says at its start what it goes by


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(
    ("settings", "spins"), [({}, "30000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_idle_threads_of_a_drawing_process_spin_as_long_as_wanted(settings: dict[str, str], spins: str) -> None:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = "from app.engine.runner import configured_runner; configured_runner('cpu')"
    done = subprocess.run([sys.executable, "-c", code], env=ours | SHOWN | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
