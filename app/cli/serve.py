"""`python -m app serve`: the service on this machine."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from app.errors import CannotStart


def check_devices(devices: Sequence[str]) -> None:
    """Raises CannotStart for a CUDA device that there is not, as the driver counts them: torch takes seconds to import.

    Where the driver cannot be asked (AMD's, another system) the worker finds out.
    """
    if sys.platform != "linux" or Path("/dev/kfd").exists():
        return
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            count.value = 0
    except OSError:
        pass  # without a driver there is none
    for device in devices:
        kind, _, number = device.partition(":")
        if kind == "cuda" and int(number or 0) >= count.value:
            raise CannotStart(
                f"WAVESPEED_DEVICES: there is no {device!r}; this machine has {count.value} CUDA devices."
            )
