"""`python -m app calibrate`: a model, the combinations to calibrate, a progress bar, the file they are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cli import Bar, bar
from app.errors import ServiceError
from app.http.resolve import Limits, resolve
from app.http.schemas import parse
from app.settings import Settings
from cache import FirstBlockCache
from models import threshold
from models.base import Step

if TYPE_CHECKING:
    from cache.threshold import Found

PROMPTS = ("a snowy island at noon", "misty mountains at sunset", "a clear desert at dawn", "a stormy forest at night")
FIRST_SEED = 100


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

    prompts = prompts or threshold.PROMPTS
    request = parse({"prompt": prompts[0], **given})
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
