"""`python -m app calibrate` and `threshold`: settings that are found by drawing, with a progress bar."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from app.cli.generate import HERE, checked_early, runner_here, with_fields
from app.errors import ServiceError
from app.http.resolve import resolve
from app.settings import read_settings
from cache import FirstBlockCache
from models.base import Step

PROMPTS = ("a snowy island at noon", "misty mountains at sunset", "a clear desert at dawn", "a stormy forest at night")
THRESHOLD_PROMPTS = (
    "a misty forest at twilight",
    "a clear sea at noon",
    "a snowy island at dawn",
    "a stormy desert at sunset",
)
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
        checked_early({"prompt": "", "model": model, "sampler": one, "scheduler": other, "steps": count}, settings)
    with runner_here(settings) as (progress, runner):
        from cache import UNetDenoiser
        from models.base import GenerationParams
        from models.tuning import calibration, placements

        info = runner.catalogue().models[model]
        loaded = runner.model(model)
        if not isinstance(loaded.denoiser, UNetDenoiser):
            raise ServiceError(f"{model} has no UNet: DeepCache, and so its calibration, is for UNet models.")
        path = placements.file_of(loaded.spec)
        if width is None and height is None:
            width, height = info.native_size
        rounds = calibration.rounds(interval)
        for done, (one, other, count) in enumerate(combinations):
            progress.show(total=len(combinations) * rounds, completed=done * rounds)
            params = GenerationParams(
                prompt="",
                width=width or height or 0,
                height=height or width or 0,
                steps=count,
                guidance_scale=info.guidance_scale if guidance_scale is None else guidance_scale,
                seeds=tuple(range(FIRST_SEED, FIRST_SEED + pictures)),
                batch_size=pictures,
                sampler=one,
                scheduler=other,
            )
            found = calibration.calibrate(
                calibration.generated(loaded, params, prompt or PROMPTS),
                loaded.denoiser,
                loaded.pipeline.scheduler,
                sampler=(one, other),
                steps=count,
                intervals=interval,
                depth=depth,
                progress=partial(progress.reach, f"{one}, {other}, {count} steps"),
            )
            placements.write(loaded.spec, found)  # each when it is found
        progress.show("done", completed=len(combinations) * rounds)
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
