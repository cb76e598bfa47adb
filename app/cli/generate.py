"""The command `generate`: pictures drawn in this process, or by a server; both say what they do meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from app.cli import Bar, bar
from app.client import ApiError, Client, Event, Generated, Job
from app.errors import ServiceError
from app.settings import Settings


def drawn_here(values: dict[str, Any], settings: Settings) -> Generated:
    """With the checks and the code of the server. Raises ServiceError, ModelError."""
    from app.engine.runner import runner_here
    from app.http.resolve import Limits, resolve
    from app.http.schemas import parse
    from app.jobs.record import drawn
    from models.base import Step

    request = parse(values)
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


def lora(text: str) -> dict[str, Any]:
    """NAME or NAME:WEIGHT. Raises ServiceError."""
    name, _, weight = text.rpartition(":")
    if not name:
        return {"name": text}
    try:
        return {"name": name, "weight": float(weight)}
    except ValueError:
        raise ServiceError(f"--lora {text}: what follows the colon is no number. Give NAME or NAME:0.8.") from None
