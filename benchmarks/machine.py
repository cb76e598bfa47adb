"""What a figure was measured on: without it no figure is worth printing."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from app.cli.compare import processor, versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "DeepCache", "cache-dit")


def commit() -> str:
    """The checkout's commit, with a + if tracked files differ from it; "unknown" outside of a checkout."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions and commit, ready for JSON."""
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit(),
    }
