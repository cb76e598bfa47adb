"""`python -m app calibrate` and `threshold`: settings that are found by drawing, with a progress bar."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Annotated, Any

import typer

from app.cli.generate import HERE, checked_early, runner_here, with_fields
from app.errors import ServiceError
from app.http.resolve import resolve
from app.settings import read_settings
from cache import FirstBlockCache
from models.base import GenerationParams, Step

PROMPTS = ("a snowy island at noon", "misty mountains at sunset", "a clear desert at dawn", "a stormy forest at night")
THRESHOLD_PROMPTS = (
    "a misty forest at twilight",
    "a clear sea at noon",
    "a snowy island at dawn",
    "a stormy desert at sunset",
)
FIRST_SEED = 100
# What the search sets itself, and what it has no use for.
_LEFT_OUT = (
    "deepcache_.*|fbcache_(enabled|threshold)|cache_(speedup|floor)|prompt|model|num_images|batch_size|output_format|"
    "enable_preview"
)


def calibrate(
    model: Annotated[str, typer.Argument(help="A model's name, as `models` lists it.")],
    sampler: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: the model's own.")] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: as saved.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=2, help="Repeat for several. Default: the model's.")] = None,
    interval: Annotated[
        list[int], typer.Option(min=2, max=10, help="Whose computed steps are placed. Repeat for several.")
    ] = [2, 3, 5],  # noqa: B006
    depth: Annotated[int, typer.Option(min=0, max=12, help="DeepCache's depth, at which they are placed.")] = 2,
    prompt: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: four landscapes.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of each prompt, denoised together.")] = 2,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own size.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own size.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Then it stops. Called again, it goes on from there.")] = 60,
) -> None:
    """Find where computed steps lie best and which settings give which speed; keep it in the model's profile."""
    settings = read_settings()
    own: list[str | None] = [None]
    sampling = list(product(sampler or own, scheduler or own))
    for one, other in sampling:
        checked_early({"prompt": "", "model": model, "sampler": one, "scheduler": other}, settings)
    with runner_here(settings) as (progress, runner):
        from models.tuning.halving import OutOfTime
        from models.tuning.measuring import Measuring
        from models.tuning.profile import file_of, of_user
        from models.tuning.unfinished import Unfinished

        info = runner.catalogue().models[model]
        loaded = runner.model(model)
        path = file_of(loaded.spec)
        of_user(loaded.spec)  # one that is damaged is told of before anything is drawn
        kept = Unfinished(path.with_name(f"{path.name}.unfinished"))
        if width is None and height is None:
            width, height = info.native_size
        given: dict[str, Any] = {
            "prompt": "",
            "width": width or height,
            "height": height or width,
            "guidance_scale": info.guidance_scale if guidance_scale is None else guidance_scale,
            "seeds": tuple(range(FIRST_SEED, FIRST_SEED + pictures)),
            "batch_size": pictures,
        }
        whole = [
            GenerationParams(**given, sampler=one, scheduler=other, steps=count)
            for (one, other), count in product(sampling, steps or [info.steps])
        ]
        end = time.monotonic() + 60 * minutes

        def tick(work: str, stage: str) -> None:
            if time.monotonic() > end:
                raise OutOfTime
            progress.reach(work, stage)

        every = [
            Measuring(loaded, params, prompt or PROMPTS, runner.device, kept, partial(tick, _name(params)))
            for params in whole
        ]
        progress.show(total=sum(each.most(interval) for each in every), completed=0)
        finished = False
        with suppress(OutOfTime):
            for each in every:
                each.placements(interval, depth)
                each.front()
            kept.forget()
            finished = True
        progress.show("done" if finished else "out of time", completed=progress.task.total if finished else None)
    print(path)
    if not finished:
        print(f"stopped after {minutes:g} minutes; the same command goes on from there", file=sys.stderr)


def _name(params: GenerationParams) -> str:
    names = [name for name in (params.sampler, params.scheduler) if name is not None]
    return ", ".join([*names, f"{params.steps} steps"])


@with_fields(leave=_LEFT_OUT)
def threshold(
    model: Annotated[str, typer.Argument(help="A transformer model's name, as `models` lists it.")],
    speedup: Annotated[float, typer.Option(min=1.01, help="Wished speed-up of the denoising, by operations.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: four landscapes.")] = None,
    *,
    fields: dict[str, Any],
) -> None:
    """Find the fbcache_threshold for a wished speed-up from uncached pictures, drawn here; prints JSON."""
    prompts, settings = prompt or THRESHOLD_PROMPTS, read_settings()
    given = {"prompt": prompts[0], "model": model, "seed": 0, "fbcache_enabled": True, **fields}
    request = checked_early(given, settings)
    with runner_here(settings) as (progress, runner):
        job = resolve(request, runner.catalogue(), settings, HERE)
        if not isinstance(job.strategy, FirstBlockCache):
            raise ServiceError(f"{job.model} has no first-block cache, so that there is no threshold to find.")
        from models.tuning.calibration import find_threshold

        loaded = runner.model(job.model)
        progress.show(job.model, total=job.params.steps * len(prompts), completed=0)

        def on_step(step: Step) -> None:
            progress.advance()

        found = find_threshold(loaded, job.params, speedup, job.strategy, on_step, prompts)
    print(json.dumps({name: round(value, 4) for name, value in asdict(found).items()}))
