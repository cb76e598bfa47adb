"""The command line: serve, generate, models, calibrate, threshold, compare, plot, bench."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from app.errors import CannotStart, ServiceError
from app.settings import read_settings

cli = typer.Typer(no_args_is_help=True, add_completion=False, help="Image generation with feature caching.")
_log = logging.getLogger("app")


def main() -> None:
    """The entry point: errors meant for the user end in one line, not in a stack trace."""
    from app.client import ClientError
    from models.base import ModelError

    try:
        cli()
    except CannotStart as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (ServiceError, ClientError, ModelError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _given(**options: Any) -> dict[str, Any]:
    """Those that are set: an option left out is left to the defaults of the settings or of the request."""
    return {name: value for name, value in options.items() if value is not None}


def _fields(context: typer.Context, **others: Any) -> dict[str, Any]:
    """Of a request: a command's options that have the names of its fields, and `others`; None leaves one out."""
    from app.http.schemas import GenerateRequest

    options = {name: value for name, value in context.params.items() if name in GenerateRequest.model_fields}
    return _given(**options | others)


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; overrides WAVESPEED_HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; overrides WAVESPEED_PORT.")] = None,
) -> None:
    """Serve the HTTP API until interrupted. Settings come from WAVESPEED_* variables and .env."""
    from app.cli.serve import check_devices
    from app.engine.runner import runner_factory
    from app.engine.supervisor import local_engine
    from app.http.app import create_app
    from app.http.server import serve_until_told
    from app.log import logging_to

    settings = read_settings(**_given(host=host, port=port))
    check_devices(settings.devices)
    factory = runner_factory(settings)
    with logging_to(settings.log_folder, settings.log_level, settings.log_format, whole_stderr=True) as path:
        _log.info("log file %s, settings changed: %s", path, ", ".join(sorted(settings.model_fields_set)) or "none")
        engine = local_engine(settings, factory)
        serve_until_told(create_app(settings, engine), settings, engine)


@cli.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; several get -0, -1, …")] = Path(
        "image.png"
    ),
    model: Annotated[str | None, typer.Option(help="A name that `models` lists.")] = None,
    flux: Annotated[bool, typer.Option("--flux", help="The configured Flux model.")] = False,
    width: int = 512,
    height: int = 512,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    seed: int | None = None,
    num_images: int = 1,
    sampler: str | None = None,
    scheduler: str | None = None,
    deepcache: Annotated[bool, typer.Option("--deepcache/--no-deepcache", help="Cache UNet features.")] = False,
    preset: Annotated[str | None, typer.Option(help="balanced, max_speed, max_quality or partial.")] = None,
    interval: int | None = None,
    depth: int | None = None,
    fbcache: Annotated[bool | None, typer.Option("--fbcache/--no-fbcache", help="First-block cache.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of the first-block cache.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="NAME or NAME:WEIGHT; may be given several times.")] = None,
    clip_skip: int | None = None,
    server: Annotated[str | None, typer.Option(help="Let the service at this address draw, not this process.")] = None,
    key: Annotated[str | None, typer.Option(envvar="WAVESPEED_KEY", help="The server's API key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Draw pictures in this process, with the checks and the code of the server, or by a server."""
    from app.cli.generate import drawn_here, drawn_there, written
    from app.cli.generate import lora as lora_of
    from app.images import format_of

    given = _fields(
        context,
        flux_enabled=flux,
        deepcache_enabled=deepcache or preset is not None,
        deepcache_preset=preset,
        deepcache_interval=interval,
        deepcache_depth=depth,
        fbcache_enabled=fbcache,
        fbcache_threshold=threshold,
        loras=[lora_of(text) for text in lora or ()],
        output_format=format_of(output),
    )
    drawn = drawn_here(given, read_settings()) if server is None else drawn_there(given, server, key)
    paths, report = written(drawn, output), drawn.report
    if as_json:
        print(json.dumps({"files": [str(path) for path in paths], **report}))
        return
    for path, seed_used in zip(paths, report["seeds"], strict=True):
        print(f"{path} seed={seed_used}")
    for sentence in report["warnings"]:
        print(f"note: {sentence}", file=sys.stderr)
    cache, timings = report["cache"], report["timings"]
    print(
        f"cache strategy={cache['strategy']} computed={cache['computed']} reused={cache['reused']} "
        f"hit_rate={cache['hit_rate']:.2f} denoise_seconds={timings['denoise_seconds']:.2f}"
    )


@cli.command()
def compare(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the pictures show.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The sheet: .png, .jpg or .webp.")] = Path(
        "comparison.png"
    ),
    model: Annotated[str | None, typer.Option(help="A name that `models` lists.")] = None,
    flux: Annotated[bool, typer.Option("--flux", help="The configured Flux model.")] = False,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own size.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own size.")] = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    sampler: str | None = None,
    scheduler: str | None = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each setting; their median time counts.")] = 1,
    difference: Annotated[bool, typer.Option("--difference", help="Show how far each is from uncached.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Draw one prompt uncached and under the presets, on a sheet with times, PSNR, hit rates and every decision."""
    from app.cli.compare import compared, sheet
    from app.images import encode, format_of

    output_format = format_of(output)
    comparison = compared(_fields(context, flux_enabled=flux), read_settings(), repeats)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(encode(sheet(comparison, difference=difference), output_format))
    for sentence in comparison.warnings:
        print(f"note: {sentence}", file=sys.stderr)
    if as_json:
        print(json.dumps({**comparison.as_dict(), "sheet": str(output)}))
        return
    for row in comparison.rows:
        likeness = "identical" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
        print(f"{row.name:<15} {row.seconds:6.2f} s {row.speedup:5.2f}× {likeness:>10}  {row.decisions}")
    print(output)


@cli.command()
def plot(
    source: Annotated[Path, typer.Argument(help="An answer's JSON, or a PNG that the service wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plot: .png, .jpg or .webp.")] = Path("plot.png"),
) -> None:
    """Plot what the cache did in one request: each call's decision, and what it was decided by."""
    from app.cli.plot import read, timeline
    from app.images import encode, format_of

    picture = encode(timeline(read(source)), format_of(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(picture)
    print(output)


@cli.command()
def models() -> None:
    """List the models as GET /api/models does, as JSON."""
    from dataclasses import asdict

    from app.cli import bar
    from app.engine.runner import runner_factory

    with bar("reading the models"):
        catalogue = runner_factory(read_settings())("cpu").catalogue()
    print(json.dumps([asdict(info) for info in catalogue.models.values()], indent=2))


@cli.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A UNet model's name, as `models` lists it.")],
    sampler: Annotated[list[str], typer.Option(help="Repeat for several.")] = ["euler"],  # noqa: B006
    scheduler: Annotated[list[str], typer.Option(help="Repeat for several.")] = ["normal"],  # noqa: B006
    steps: Annotated[list[int], typer.Option(min=2, help="Repeat for several.")] = [20],  # noqa: B006
    interval: Annotated[list[int], typer.Option(min=2, max=10, help="Repeat for several.")] = [2, 3, 5],  # noqa: B006
    depth: Annotated[int, typer.Option(min=0, max=12, help="DeepCache's depth.")] = 2,
    prompt: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: four landscapes.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of each prompt, denoised together.")] = 2,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own size.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own size.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
) -> None:
    """Find where DeepCache's computed steps lie best and keep it beside the model, for `deepcache_schedule: auto`."""
    from app.cli.calibrate import calibrated

    size = None if width is None and height is None else (width or height or 0, height or width or 0)
    combinations = [(one, other, count) for one in sampler for other in scheduler for count in steps]
    path = calibrated(
        model,
        read_settings(),
        combinations,
        intervals=interval,
        depth=depth,
        prompts=prompt,
        seeds=pictures,
        size=size,
        guidance_scale=guidance_scale,
    )
    print(path)


@cli.command()
def threshold(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A transformer model's name, as `models` lists it.")],
    speedup: Annotated[float, typer.Option(min=1.01, help="Wished speed-up of the denoising, by operations.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: four landscapes.")] = None,
    width: int = 512,
    height: int = 512,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    max_consecutive: Annotated[int | None, typer.Option(help="As fbcache_max_consecutive.")] = None,
    forecast: Annotated[str | None, typer.Option(help="As cache_forecast.")] = None,
) -> None:
    """Find the fbcache_threshold for a wished speed-up from uncached pictures, drawn here; prints JSON."""
    from dataclasses import asdict

    from app.cli.calibrate import found_for

    given = _fields(
        context, prompt=None, fbcache_enabled=True, fbcache_max_consecutive=max_consecutive, cache_forecast=forecast
    )
    found = found_for(speedup, given, read_settings(), prompt)
    print(json.dumps({name: round(value, 4) for name, value in asdict(found).items()}))


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the cache benchmark of a source checkout; further arguments are its own."""
    if find_spec("benchmarks") is None or find_spec("benchmarks.cache") is None:
        raise ServiceError("The benchmarks come with the source checkout only; run this in its folder.")
    from app.cli import bar

    with bar("starting"):
        from diffusers import FluxPipeline, StableDiffusionPipeline  # noqa: F401  # the seconds before its first word
    sys.argv = ["benchmarks.cache", *context.args]
    runpy.run_module("benchmarks.cache", run_name="__main__")


if __name__ == "__main__":
    main()
