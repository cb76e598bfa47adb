"""pyproject.toml, constraints.txt and the scripts agree with one another."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_architecture import OUR_PACKAGES, imported_modules

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
    "name",
    [
        "scripts/run",
        "scripts/run-ray",
        "scripts/ui",
        "scripts/test",
        "scripts/bench",
        "scripts/lint",
        "scripts/venv",
        "scripts/check-image",
        ".ci/run",
    ],
)
def test_scripts_can_be_run(name: str) -> None:
    script = ROOT / name
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


# Declared, and used by diffusers on our behalf instead of being imported here.
USED_BY_DIFFUSERS = {
    "accelerate",  # loads weights without a second copy in memory
    "safetensors",  # the weights' format
    "scipy",  # beta and LMS noise schedules
    "torchsde",  # the Brownian tree of the SDE samplers
}
# Imported, and pinned by the package that is made of it: FastAPI by Starlette, Pydantic by its core.
PART_OF_ANOTHER = {"starlette", "pydantic-core"}
# Top-level names that many distributions share, and the one of them that is imported here.
NAMESPACES = {"opentelemetry": ["opentelemetry-api"]}


def imported_distributions(package: str) -> set[str]:
    """Distributions that the package's modules import, by canonical name."""
    providers = packages_distributions()
    modules = {
        name
        for path in (ROOT / package).rglob("*.py")
        for name in imported_modules(path.read_text(encoding="utf-8"))
        if name not in sys.stdlib_module_names and name not in OUR_PACKAGES
    }
    return {
        canonicalize_name(provider)
        for name in modules
        for provider in NAMESPACES.get(name) or providers.get(name, [name])
    }


def test_the_service_declares_what_it_imports_and_nothing_else() -> None:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["ray"], *extras["ui"]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    imported = set().union(*(imported_distributions(package) for package in ("app", "cache", "models")))
    assert declared - imported - USED_BY_DIFFUSERS == set(), "declared, but nothing imports it"
    assert imported - declared - PART_OF_ANOTHER == set(), "imported, but not declared"
