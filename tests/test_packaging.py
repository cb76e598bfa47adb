"""pyproject.toml, constraints.txt and the scripts agree with one another."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
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
        "scripts/test",
        "scripts/bench",
        "scripts/gpu-check",
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


def test_the_name_is_not_that_of_another_companys_package_and_the_command_stays() -> None:
    assert canonicalize_name(PROJECT["name"]) not in ("wavespeed", *(requirement.name for requirement in DIRECT))
    assert PROJECT["scripts"] == {"wavespeed": "app.__main__:main"}


def asked_of_the_index(line: str) -> list[str]:
    """What a `pip install` takes that is neither an option nor a path."""
    words = shlex.split(line, comments=True)
    named = []
    for before, word in itertools.pairwise(["", *words]):
        if word in ("&&", ";", "|"):
            break
        is_value = before in ("--constraint", "-c", "--requirement", "-r", "--index-url", "--extra-index-url", "--dest")
        if not is_value and not word.startswith(("-", ".", "/", "git+")):
            named.append(re.split(r"[\[=<>]", word)[0])
    return named


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--constraint constraints.txt --editable '.[otel]'", []),
        ('"wavespeed[ray]"', ["wavespeed"]),
        ("-c x.txt wavespeed-diffusion-server==0.1 openai", ["wavespeed-diffusion-server", "openai"]),
        ("/srv/wavespeed && wavespeed serve", []),
    ],
)
def test_what_pip_asks_the_index_for_is_seen(line: str, named: list[str]) -> None:
    assert asked_of_the_index(line) == named


def test_documents_install_the_project_from_a_checkout() -> None:
    """On the package index its name may be anybody's."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    lines = [
        line
        for document in documents
        for line in re.findall(r"pip install ((?:[^`\n]|\\\n)*)", document.read_text(encoding="utf-8"))
    ]
    named = {name for line in lines for name in asked_of_the_index(line.replace("\\\n", " "))}
    assert len(lines) > 3
    assert {name for name in named if "wavespeed" in name} == set()


def test_the_quick_tests_are_where_the_script_says() -> None:
    """A file that moves would else be an error of pytest's in the edit loop alone, which CI does not run."""
    script = (ROOT / "scripts" / "test").read_text(encoding="utf-8")
    listed = re.search(r"^quick=\(\n(.*?)^\)", script, re.MULTILINE | re.DOTALL)
    assert listed is not None
    paths = listed[1].split()
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_public_runner_runs_the_suite_on_the_oldest_python_without_secrets() -> None:
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the word `on` as a truth value
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    (job,) = workflow["jobs"].values()
    checkout, python, suite = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert python["uses"].startswith("actions/setup-python@")
    assert f">={python['with']['python-version']}" == PROJECT["requires-python"]
    assert python["with"]["cache"] == "pip"
    assert all((ROOT / path).is_file() for path in python["with"]["cache-dependency-path"].split())
    assert suite["run"].split()[0] == "scripts/test"


# Declared, and used by diffusers on our behalf instead of being imported here.
READ_AS_DATA = {"openai-clip"}
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
    lines = [*PROJECT["dependencies"], *(line for name in ("int8", "ray", "ui", "upscale") for line in extras[name])]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    imported = set().union(*(imported_distributions(package) for package in ("app", "cache", "models")))
    assert declared - imported - USED_BY_DIFFUSERS - READ_AS_DATA == set(), "declared, but nothing imports it"
    assert imported - declared - PART_OF_ANOTHER == set(), "imported, but not declared"
