"""`python -m app calibrate` and `threshold`: settings that are found by drawing, with a progress bar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import Bar, bar
from app.cli.generate import check_early, with_fields
from app.errors import ServiceError
from app.http.resolve import Limits, resolve
from app.http.schemas import parse
from app.settings import Settings, read_settings
from cache import FirstBlockCache
from models.base import Step

if TYPE_CHECKING:
    from cache.threshold import Found

PROMPTS = ("a snowy island at noon", "misty mountains at sunset", "a clear desert at dawn", "a stormy forest at night")
FIRST_SEED = 100
# What the search sets itself, and what it has no use for.
_LEFT_OUT = "deepcache_.*|fbcache_(enabled|threshold)|prompt|model|num_images|batch_size|output_format|enable_preview"


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
    """Find where DeepCache's computed steps lie best and keep it for the model, for `deepcache_schedule: auto`."""
    settings = read_settings()
    combinations = [(one, other, count) for one in sampler for other in scheduler for count in steps]
    for one, other, count in combinations:
        values = {"prompt": "", "model": model, "sampler": one, "scheduler": other, "steps": count}
        check_early(parse(values), settings)
    path = calibrated(
        model,
        settings,
        combinations,
        intervals=interval,
        depth=depth,
        prompts=prompt,
        seeds=pictures,
        size=None if width is None and height is None else (width or height or 0, height or width or 0),
        guidance_scale=guidance_scale,
    )
    print(path)


@with_fields(leave=_LEFT_OUT)
def threshold(
    model: Annotated[str, typer.Argument(help="A transformer model's name, as `models` lists it.")],
    speedup: Annotated[float, typer.Option(min=1.01, help="Wished speed-up of the denoising, by operations.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: four landscapes.")] = None,
    *,
    fields: dict[str, Any],
) -> None:
    """Find the fbcache_threshold for a wished speed-up from uncached pictures, drawn here; prints JSON."""
    given = {"model": model, "seed": 0, "fbcache_enabled": True, **fields}
    found = found_for(speedup, given, read_settings(), prompt)
    print(json.dumps({name: round(value, 4) for name, value in asdict(found).items()}))


def calibrated(
    name: str,
    settings: Settings,
    combinations: Sequence[tuple[str, str, int]],
    *,
    intervals: Sequence[int],
    depth: int,
    prompts: Sequence[str] | None,
    seeds: int,
    size: tuple[int, int] | None,
    guidance_scale: float | None,
) -> Path:
    """Calibrate each sampler, scheduler and number of steps; returns the file, to which each is added when it is found.

    seeds: pictures of each prompt. size: pixels, None for the model's own.
    Raises ServiceError for a model without a UNet, and what loading and drawing raise.
    """
    from app.engine.runner import runner_here

    with bar("starting") as progress:
        from models import placements
        from models.base import GenerationParams
        from models.calibration import calibrate, generated, rounds
        from models.unet import StableDiffusionModel

        runner = runner_here(settings)
        info = runner.catalogue().models.get(name)
        runner.watch_loading(progress.loading)
        model = runner.model(name)
        if not isinstance(model, StableDiffusionModel) or info is None:
            raise ServiceError(f"{name} has no UNet: DeepCache, and so its calibration, is for UNet models.")
        path = placements.file_of(model.spec)
        width, height = size or info.native_size
        guidance = info.guidance_scale if guidance_scale is None else guidance_scale
        for done, (sampler, scheduler, steps) in enumerate(combinations):
            progress.show(total=len(combinations) * rounds(intervals), completed=done * rounds(intervals))
            params = GenerationParams(
                prompt="",
                width=width,
                height=height,
                steps=steps,
                guidance_scale=guidance,
                seeds=tuple(range(FIRST_SEED, FIRST_SEED + seeds)),
                batch_size=seeds,
                sampler=sampler,
                scheduler=scheduler,
            )
            found = calibrate(
                generated(model, params, prompts or PROMPTS),
                model.denoiser,
                model.pipeline.scheduler,
                sampler=(sampler, scheduler),
                steps=steps,
                intervals=intervals,
                depth=depth,
                progress=partial(_advance, progress, f"{sampler}, {scheduler}, {steps} steps"),
            )
            placements.write(model.spec, found)
        progress.show("done", completed=len(combinations) * rounds(intervals))
    return path


def _advance(progress: Bar, combination: str, stage: str) -> None:
    progress.show(f"{combination}: {stage}")
    progress.advance()


def found_for(
    speedup: float,
    given: dict[str, Any],
    settings: Settings,
    prompts: Sequence[str] | None = None,
) -> Found:
    """`given`: the fields of a request but its prompt; one picture of each of `prompts` is drawn.

    Raises ServiceError and ModelError, which say what to ask instead.
    """
    from app.engine.runner import runner_here
    from models import threshold

    prompts = prompts or threshold.PROMPTS
    request = parse({"prompt": prompts[0], **given})
    check_early(request, settings)
    with bar("starting") as progress:
        runner = runner_here(settings)
        job = resolve(request, runner.catalogue(), Limits.of(settings), "command-line", request.output_format)
        if not isinstance(job.strategy, FirstBlockCache):
            raise ServiceError(f"{job.model} has no first-block cache, so that there is no threshold to find.")
        runner.watch_loading(progress.loading)
        model = runner.model(job.model)
        progress.show(job.model, total=job.params.steps * len(prompts), completed=0)

        def on_step(step: Step) -> None:
            progress.advance()

        return threshold.find(model, job.params, speedup, job.strategy, on_step, prompts)
