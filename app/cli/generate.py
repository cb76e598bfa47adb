"""The command `generate`: pictures drawn in this process, or by a server; both say what they do meanwhile."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import Bar, bar
from app.cli.options import check_early, with_fields
from app.client import ApiError, Client, Event, Generated, Job
from app.http.resolve import Limits, resolve
from app.http.schemas import parse
from app.images import format_of
from app.settings import Settings, read_settings
from models.base import Step


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
    from app.engine.runner import runner_here
    from app.jobs.record import drawn

    request = parse(values)
    check_early(request, settings)
    with bar("starting") as progress:
        runner = runner_here(settings)
        limits = Limits.of(settings)
        job = resolve(request, runner.catalogue(), limits, "command-line", request.output_format)
        runner.watch_loading(progress.loading)
        runner.load(job.model)
        progress.show(job.model)

        def on_step(step: Step) -> None:
            progress.show(job.model, completed=step.index + 1, total=step.total, note=step.decision)

        begun = time.monotonic()
        result = runner.run(job, on_step)
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
