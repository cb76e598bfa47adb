"""pyproject.toml, constraints.txt and the scripts agree with one another."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [
    Requirement(line)
    for line in (
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    )
]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin is not None}


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_every_direct_dependency_is_pinned_as_the_constraints_are(requirement: Requirement) -> None:
    assert str(requirement.specifier) == f"=={constraints()[canonicalize_name(requirement.name)]}"


def test_constraints_hold_nothing_but_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len(constraints()) == len([line for line in lines if line and not line.startswith("#")])


@pytest.mark.parametrize(
    "name", ["scripts/run", "scripts/test", "scripts/bench", "scripts/lint", "scripts/venv", ".ci/run"]
)
def test_scripts_can_be_run(name: str) -> None:
    script = ROOT / name
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
