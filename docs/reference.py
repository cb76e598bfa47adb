"""The API reference, from the docstrings: `scripts/docs` writes it to build/reference. Any warning is an error."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

import cache

# Two packages for programs of one's own, and of the service what is built upon from outside.
MODULES = (
    "cache",
    "models",
    "!models.embedded.recipe",  # a training script
    "app.http.app",
    "app.settings",
    "app.errors",
    "app.http.schemas",
    "app.engine.types",
    "app.engine.runner",
    "app.client",
    "app.cli.plot",
)
OUTPUT = Path(__file__).resolve().parents[1] / "build" / "reference"


def build(output: Path, modules: tuple[str, ...] = MODULES, *, source: bool = True) -> None:
    """Write HTML into the folder `output`, with each `source` beside its docstring; warnings are raised."""
    for name in cache.__all__:
        getattr(cache, name)  # some are imported when first asked for; pdoc sees what is there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.render.configure(show_source=source)
        pdoc.pdoc(*modules, output_directory=output)


if __name__ == "__main__":
    build(OUTPUT)
    sys.stdout.write(f"{OUTPUT / 'index.html'}\n")
