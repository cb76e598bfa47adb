"""`python -m app bench`: the cache benchmark."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

import typer

from app.cli import bar
from app.errors import ServiceError


def bench(context: typer.Context) -> None:
    """Run the cache benchmark of a source checkout; further arguments are its own."""
    if find_spec("benchmarks") is None or find_spec("benchmarks.cache") is None:
        raise ServiceError("The benchmarks come with the source checkout only; run this in its folder.")
    with bar("starting"):
        from diffusers import FluxPipeline, StableDiffusionPipeline  # noqa: F401  # the seconds before its first word
    sys.argv = ["benchmarks.cache", *context.args]
    runpy.run_module("benchmarks.cache", run_name="__main__")
