"""The house rules that a reader of docs/architecture.md relies on, read from the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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
        ("from cache.flops import branch_costs", {"cache"}),
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


ROOMS = ("ground", "ui", "engine", "jobs", "http", "ray", "cli", "__main__")
"""Of app/, from the bottom up; what lies in app/ itself is the ground floor."""
DOORS = {
    "ground": {"ground"},
    "engine": {"ground", "engine"},
    "jobs": {"ground", "engine", "jobs"},
    "http": {"ground", "engine", "jobs", "http"},
    "ray": {"ground", "engine", "jobs", "http", "ray"},
    "cli": {"ground", "ui", "engine", "jobs", "http", "cli"},
    "ui": {"ground", "ui"},
    "__main__": set(ROOMS),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def graph_of(package: str) -> dict[str, set[str]]:
    """Module → the modules of its own package that it imports, wherever in its code."""
    paths = {module_of(path): path for path in modules_of(package)}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = folder.split(".")[: len(folder.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*parts, *([node.module] if node.module else [])])
                found.update(f"{base}.{a.name}" if f"{base}.{a.name}" in paths else base for a in node.names)
        graph[module] = (found & paths.keys()) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left when modules that nothing else of the rest imports, or that import nothing of it, are taken away."""
    rest = {module: set(targets) for module, targets in graph.items()}
    while True:
        imported = set().union(*rest.values()) if rest else set()
        outer = {module for module, targets in rest.items() if not targets or module not in imported}
        if not outer:
            return [sorted(rest)] if rest else []
        rest = {module: targets - outer for module, targets in rest.items() if module not in outer}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "ground"


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}, [["b", "c"]]),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b"]]),
    ],
)
def test_the_search_for_circles_finds_them(graph: dict[str, set[str]], expected: list[list[str]]) -> None:
    assert circles(graph) == expected


@pytest.mark.parametrize("package", ["app", "cache", "models"])
def test_no_module_imports_itself_in_a_circle(package: str) -> None:
    assert circles(graph_of(package)) == []


def test_the_model_does_not_know_the_way_of_a_request_nor_a_stage_the_model() -> None:
    graph = graph_of("models")

    def importing(*rooms: str) -> set[str]:
        return {m for m, targets in graph.items() if any(t.startswith(rooms) for t in targets | {m})}

    assert importing("models.stages") & importing("models.pipeline", "models.families") == {"models.generation"}


@pytest.mark.parametrize(("room", "other"), [(one, two) for one in ROOMS for two in ROOMS if two not in DOORS[one]])
def test_no_arrow_of_app_points_up(room: str, other: str) -> None:
    graph = graph_of("app")
    assert {room_of(module) for module in graph} == set(ROOMS)
    wrong = {
        module: sorted(target for target in targets if room_of(target) == other)
        for module, targets in graph.items()
        if room_of(module) == room
    }
    assert {module: targets for module, targets in wrong.items() if targets} == {}


def test_the_page_knows_the_client_alone() -> None:
    graph = graph_of("app")
    outside = {target for module, targets in graph.items() if room_of(module) == "ui" for target in targets}
    assert {target for target in outside if room_of(target) != "ui"} <= {"app", "app.client"}


def test_app_has_at_most_fifty_files_beside_the_page() -> None:
    assert len([module for module in graph_of("app") if room_of(module) != "ui"]) <= 50


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
        "import sys, app.http.app, app.__main__, app.engine.supervisor, app.engine.runner, app.ui.application\n"
        "print(*sorted({'torch', 'diffusers', 'transformers', 'streamlit'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.stdout.strip(), ran.returncode) == ("", 0), ran.stderr
