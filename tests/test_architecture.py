"""The house rules that a reader of docs/architecture.md relies on, read from the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUR_PACKAGES = ("app", "benchmarks", "cache", "models")
LONGEST_MODULE = 400  # lines
VAGUE_NAMES = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}

# What each package must not know, by top-level module name, imports under TYPE_CHECKING included.
WEB = {"fastapi", "starlette", "uvicorn", "httpx", "httpx2", "prometheus_client", "pydantic_settings"}
FORBIDDEN = {
    "cache": {"app", "benchmarks", "models", "diffusers", "transformers", "accelerate"} | WEB,
    "models": {"app", "benchmarks"} | WEB,
    "app": {"benchmarks"},
}


def imported_modules(source: str) -> set[str]:
    """Top-level names of the modules that `source` imports from outside its own package, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found.update(alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                found.add(module.partition(".")[0])
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ) if not module.startswith("."):
                found.add(module.partition(".")[0])
    return found


def modules_of(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


ALL_MODULES = sorted(path for package in (*OUR_PACKAGES, "tests") for path in modules_of(package))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import models.base as b, json", {"models", "json"}),
        ("from cache.cost import branch_costs", {"cache"}),
        ("from . import cost\nfrom .cost import x", set()),
        ("if TYPE_CHECKING:\n    from app.http.app import create_app", {"app"}),
        ("def f():\n    import diffusers.models", {"diffusers"}),
        ("importlib.import_module('app.engine')", {"app"}),
        ("import_module('.engine', __name__)", set()),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, expected: set[str]) -> None:
    assert imported_modules(source) == expected


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_down(package: str) -> None:
    modules = list(modules_of(package))
    assert modules, f"{package}/ holds no module: is the test looking at the right folder?"
    offenders = {
        str(path.relative_to(ROOT)): sorted(wrong)
        for path in modules
        if (wrong := imported_modules(path.read_text(encoding="utf-8")) & FORBIDDEN[package])
    }
    assert offenders == {}


def test_modules_are_short_enough_to_read_at_once() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_MODULE} == {}


def test_modules_are_named_after_what_they_hold() -> None:
    vague = {
        str(path.relative_to(ROOT))
        for path in ALL_MODULES
        if VAGUE_NAMES & {part.lower() for part in path.relative_to(ROOT).with_suffix("").parts}
    }
    assert vague == set()


def test_the_http_process_needs_neither_torch_nor_diffusers() -> None:
    """A refusal costs milliseconds, and the server is up before the models are."""
    check = (
        "import sys, app.http.app, app.__main__, app.engine.supervisor, app.engine.runner\n"
        "print(*sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.stdout.strip(), ran.returncode) == ("", 0), ran.stderr
