"""The command line."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

import typer

from app.cli import bar
from app.cli.calibrate import calibrate, threshold
from app.cli.compare import compare, demo
from app.cli.generate import generate
from app.cli.plot import plot
from app.cli.serve import models, serve
from app.client import ClientError
from app.errors import CannotStart, ServiceError
from models.errors import ModelError

cli = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Image generation with feature caching."
)
cli.command()(serve)
cli.command()(generate)
cli.command()(compare)
cli.command()(demo)
cli.command()(plot)
cli.command()(models)
cli.command()(calibrate)
cli.command()(threshold)


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the cache benchmark of a source checkout; further arguments are its own."""
    if find_spec("benchmarks") is None or find_spec("benchmarks.cache") is None:
        raise ServiceError("The benchmarks come with the source checkout only; run this in its folder.")
    with bar("starting"):
        from diffusers import FluxPipeline, StableDiffusionPipeline  # noqa: F401  # the seconds before its first word
    sys.argv = ["benchmarks.cache", *context.args]
    runpy.run_module("benchmarks.cache", run_name="__main__")


def main() -> None:
    """The entry point: errors meant for the user end in one line, not in a stack trace."""
    try:
        cli()
    except CannotStart as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (ServiceError, ClientError, ModelError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
