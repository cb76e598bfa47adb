"""The command `generate`: pictures drawn here or by a server; and the fields of a request as options of any command.

The options are made from the model of the body, so that there is one list of fields.
"""

from __future__ import annotations

import base64
import functools
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import Bar, bar
from app.client import ApiError, Client, Event, Generated, Job
from app.engine import runner
from app.engine.types import Catalogue, ModelInfo
from app.errors import ServiceError
from app.http.resolve import resolve
from app.http.schemas import GenerateRequest, parse
from app.images import format_of
from app.settings import Settings, read_settings
from models.base import ModelSpec, Step
from models.families import FAMILIES

SHORT = {
    "flux_enabled": "flux",
    "deepcache_enabled": "deepcache",
    "deepcache_preset": "preset",
    "deepcache_interval": "interval",
    "deepcache_depth": "depth",
    "fbcache_enabled": "fbcache",
    "fbcache_threshold": "threshold",
    "fbcache_max_consecutive": "max-consecutive",
    "cache_forecast": "forecast",
}
PICTURES = ("img2img_image", "mask")  # files here, base64 in the body
EDGES = "edges:"
KINDS: dict[str, Any] = {"boolean": bool, "integer": int, "number": float, "string": str}
SCHEMAS = GenerateRequest.model_json_schema()["properties"]
HERE = "command-line"  # the id of a job that is drawn in this process
Command = Callable[..., None]


def with_fields(leave: str) -> Callable[[Command], Command]:
    """Gives a command an option for each field of a request that has a simple value and no name that matches `leave`.

    None for `rerender`, which stands in the prompt's place. Those that are given arrive as `fields`; the others are
    left to the request's defaults.
    """

    def decorate(command: Command) -> Command:
        own = [one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name != "fields"]
        options = [
            option
            for name in GenerateRequest.model_fields
            if not re.fullmatch(f"rerender|{leave}", name) and (option := _option(name)) is not None
        ]

        @functools.wraps(command)
        def called(**values: Any) -> None:
            given = {option.name: values.pop(option.name) for option in options}
            command(**values, fields={name: _value(name, value) for name, value in given.items() if value is not None})

        called.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        return called

    return decorate


def _option(name: str) -> inspect.Parameter | None:
    """None for a field that takes something else than a word, a number, yes or no."""
    field, schema = GenerateRequest.model_fields[name], SCHEMAS[name]
    schema = next((one for one in schema.get("anyOf", ()) if one["type"] != "null"), schema)
    kind, names, metavar = KINDS.get(schema["type"]), [name.replace("_", "-")], None
    if name in SHORT:
        names.append(SHORT[name])
    if name in PICTURES:
        kind, metavar = Path, "FILE"
    elif name == "loras":
        kind, names, metavar = list[str], ["lora"], "NAME:WEIGHT"
    elif name == "control":
        kind, metavar = list[str], "NAME:WEIGHT=FILE"
    elif "enum" in schema:
        metavar = "|".join(map(str, schema["enum"]))
    elif "minimum" in schema and "maximum" in schema:
        metavar = f"{schema['minimum']}..{schema['maximum']}"
    if kind is None:
        return None
    flags = [f"--{one}/--no-{one}" if kind is bool else f"--{one}" for one in names]
    default = "" if field.default in (None, "", False, []) else f" Default: {field.default}."
    told = typer.Option(*flags, help=f"{field.description}{default}", metavar=metavar, show_default=False)
    annotation = Annotated[kind | None, told]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _value(name: str, value: Any) -> Any:
    if name == "loras":
        return [_lora(text) for text in value]
    if name == "control":
        return [_control(text) for text in value]
    return _picture(value, name) if name in PICTURES else value


def _picture(file: Path, name: str) -> str:
    """Base64. Raises ServiceError."""
    try:
        return base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise ServiceError(f"--{name.replace('_', '-')} {file}: {error.strerror}.") from None


def _lora(text: str, name: str = "lora") -> dict[str, Any]:
    """NAME or NAME:WEIGHT. Raises ServiceError."""
    of, _, weight = text.rpartition(":")
    if not of:
        return {"name": text}
    try:
        return {"name": of, "weight": float(weight)}
    except ValueError:
        raise ServiceError(f"--{name} {text}: what follows the colon is no number. Give NAME or NAME:0.8.") from None


def _control(text: str) -> dict[str, Any]:
    """NAME=FILE or NAME:WEIGHT=FILE; of a file after EDGES its edges are shown. Raises ServiceError."""
    unit, found, file = text.partition("=")
    if not found:
        raise ServiceError(f"--control {text}: give NAME=FILE or NAME:0.8=FILE, or NAME={EDGES}FILE for its edges.")
    named = _lora(unit, "control")
    edges = {"edges": True} if file.startswith(EDGES) else {}
    image = _picture(Path(file.removeprefix(EDGES)), "control")
    return {"model": named.pop("name"), "image": image, **named, **edges}


def checked_early(values: dict[str, Any], settings: Settings) -> GenerateRequest:
    """What is wrong with a request, as far as it shows before torch is imported. Raises ServiceError, CannotStart."""
    request = parse(values)
    arguments = runner.runner_arguments(settings)
    configuration = arguments["configuration"]
    models = {spec.name: _info(spec) for spec in arguments["checkpoints"].models(configuration.specs)[0]}
    catalogue = Catalogue(models=models, default=configuration.default, default_flux=configuration.default_flux)
    resolve(request, catalogue, settings, HERE)
    return request


@contextmanager
def runner_here(settings: Settings) -> Iterator[tuple[Bar, runner.RegistryRunner]]:
    """A bar, and what draws in this process and shows on it what is being loaded."""
    with bar("starting") as progress:
        here = runner.runner_here(settings)
        here.watch_loading(progress.loading)
        yield progress, here


def _info(spec: ModelSpec) -> ModelInfo:
    """Without branches and kernels: those take torch to count and to ask."""
    family = FAMILIES[spec.family]
    return ModelInfo(
        name=spec.name,
        family=spec.family,
        native_size=spec.render_sizes[0] if spec.render_sizes else (family.native_size, family.native_size),
        size_multiple=family.size_multiple,
        cache=family.cache,
        steps=spec.steps or family.steps,
        guidance_scale=family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale,
        samplers=family.samplers,
        render_sizes=spec.render_sizes,
    )


@with_fields(leave="prompt|output_format|enable_preview")
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; several get -0, -1, …")] = Path(
        "image.png"
    ),
    server: Annotated[str | None, typer.Option(help="Let the service at this address draw, not this process.")] = None,
    key: Annotated[str | None, typer.Option(envvar="WAVESPEED_KEY", help="The server's API key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Draw pictures in this process, with the checks and the code of the server, or by a server."""
    given = {"prompt": prompt, **fields, "output_format": format_of(output)}
    if "deepcache_preset" in given:
        given.setdefault("deepcache_enabled", True)
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


def drawn_here(values: dict[str, Any], settings: Settings) -> Generated:
    """With the checks and the code of the server. Raises ServiceError, ModelError."""
    from app.jobs.record import drawn

    request = checked_early(values, settings)
    with runner_here(settings) as (progress, here):
        job = resolve(request, here.catalogue(), settings, HERE)
        here.load(job.model)
        progress.show(job.model)

        def on_step(step: Step) -> None:
            progress.show(job.model, completed=step.index + 1, total=step.total, note=step.decision)

        begun = time.monotonic()
        result = here.run(job, on_step)
    one = drawn(job, result, queue_seconds=0.0, total_seconds=time.monotonic() - begun)
    return Generated(one.images, one.report)


def drawn_there(values: dict[str, Any], address: str, key: str | None) -> Generated:
    """By the server at `address`. Interrupted, the job is cancelled there. Raises ClientError."""
    with bar(f"asking {address}") as progress, Client(address, key=key) as client:
        job = client.submit(**values)
        try:
            for event in job.events():
                _tell(progress, job, event)
            return job.result()
        except KeyboardInterrupt:
            _cancel(job)
            raise


def _tell(progress: Bar, job: Job, event: Event) -> None:
    data, model = event.data, job.data["model"]
    match event.name:
        case "queued":
            place = data.get("position")
            progress.show(f"{model}: waiting" + (f", number {place}" if place else ""))
        case "running":
            progress.show(f"{model}: loading, if it is not, and reading the prompt")
        case "progress":
            progress.show(model, completed=data["step"], total=data["total"], note=data["decision"])
        case "done":
            progress.show(f"{model}: fetching the pictures")


def _cancel(job: Job) -> None:
    try:
        job.cancel()
    except ApiError as error:
        if error.type != "job_finished":
            raise


def written(generated: Generated, output: Path) -> list[Path]:
    """The files, as they are: a PNG keeps the settings that it was drawn with."""
    paths = [output]
    if len(generated.images) > 1:
        paths = [output.with_stem(f"{output.stem}-{index}") for index in range(len(generated.images))]
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, picture in zip(paths, generated.images, strict=True):
        path.write_bytes(picture)
    return paths
