"""One batch on its way through the passes: what they share, and the run of a denoiser that each may make."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cache.prediction import prediction_of
from models import finite
from models.base import GenerationParams, PassReport, Step
from models.sampling import samplers

from .multiscale import Scales
from .preview import Previews

if TYPE_CHECKING:
    from PIL import Image

    from cache import CacheReport, CacheStrategy
    from models.pipeline import PipelineModel


class Drawing:
    """A batch of pictures while it is drawn. Passes set `latents`, `width` and `height`, and in the end `images`.

    conditioning: the pipeline's arguments for the text, each with one row for all images or one an image.
    generators: one an image, on the CPU, seeded once and drawn from by all passes in turn, so that a picture is the
        same on every device and whatever it is batched with.
    width, height: of `latents`, in pixels.
    """

    def __init__(
        self,
        model: PipelineModel,
        params: GenerationParams,
        seeds: tuple[int, ...],
        conditioning: Mapping[str, torch.Tensor],
        strategy: CacheStrategy,
        size: tuple[int, int],
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.model = model
        self.params = params
        self.seeds = seeds
        self.conditioning = conditioning
        self.strategy = strategy
        self.width, self.height = size
        self.clock = clock
        self.progress = progress
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.latents: torch.Tensor | None = None
        self.images: list[Image.Image] = []
        self.passes: list[PassReport] = []
        self.warnings: list[str] = []
        self.sampling: tuple[str, str] | None = None  # sampler and scheduler by name, of the last run
        self.kernels: list[str] = []  # that computed the attention of each run

    def from_noise(self, name: str) -> torch.Tensor:
        """Latents of width × height pixels, drawn from nothing: all steps of the schedule."""
        size = {"width": self.width, "height": self.height}
        return self._denoise(name, self.model.pipeline, self.params.steps, slice(None), **size)

    def from_pictures(
        self, name: str, pictures: Sequence[Image.Image], strength: float, *, only: int | None = None
    ) -> torch.Tensor:
        """Latents drawn over `pictures`, which are of one size that the model can draw at.

        They are encoded and noised to where the last `strength` of the schedule begins, as in diffusers' img2img
        pipelines, and denoised from there. There is one an image of the batch, or a single one for the image `only`.
        """
        images = slice(None) if only is None else slice(only, only + 1)
        width, height = pictures[0].size
        return self._denoise(
            name,
            self.model.from_pictures(),
            self.model.partial_steps(self.params.steps, strength),
            images,
            width=width,
            height=height,
            image=list(pictures),
            strength=strength,
        )

    def _denoise(
        self,
        name: str,
        pipeline: Any,
        steps: int,
        images: slice,
        *,
        width: int,
        height: int,
        **start: Any,
    ) -> torch.Tensor:
        """One run of the cache: latents as `pipeline` returns them, one row for each of `images` of the batch.

        name: of the pass, for the report. steps: how many the pipeline takes, which is less than the schedule has where
        it begins from a picture. The scheduler is this run's own; the saved one is back afterwards.
        """
        params, model = self.params, self.model
        generators, seeds = self.generators[images], self.seeds[images]
        takes = inspect.signature(type(pipeline).__call__).parameters
        if "height" in takes:  # else they are the picture's
            start |= {"width": width, "height": height}
        guidance = model.guidance(params)
        for setting in guidance.keys() - takes.keys():  # diffusers would take it as **kwargs, and not read it
            del guidance[setting]
            self.warnings.append(f"{setting} had no effect in the pass {name}: {type(pipeline).__name__} has none.")
        timesteps = samplers.custom_timesteps(params.scheduler, params.steps, model.published_timesteps)
        grid = (height // model.pipeline.vae_scale_factor, width // model.pipeline.vae_scale_factor)
        previews = Previews(model.preview_decoder if params.preview else None, steps)
        with (
            self.clock("denoise"),
            model.scheduled(pipeline, params, seeds) as scheduler,
            model.accelerated(params) as (attention, compiling),
            self.strategy.attach(model.view(params, scheduler).sampled(partial(model.responses, scheduler))) as report,
            self._scales(name, steps, scheduler, *grid) as scales,
            previews.watching(model, scheduler, *grid),
        ):
            self.sampling = samplers.names(scheduler, model.choices, params.sampler, params.scheduler)

            def finished(done: int) -> bytes | None:
                if scales is not None:
                    scales.step = done
                return previews.after(done)

            result = pipeline(
                **{key: _rows(tensor, images, len(seeds)) for key, tensor in self.conditioning.items()},
                **guidance,
                **({} if timesteps is None else {"timesteps": timesteps}),
                **start,
                num_inference_steps=params.steps,
                generator=generators,
                output_type="latent",
                callback_on_step_end=self.progress.watch(report, steps, finished),
            )
            second_order = pipeline.scheduler.order > 1
        if second_order and report.strategy != "none":
            report.warn(
                f"The sampler makes two evaluations a step: the cache counted the {len(report.decisions)} calls of the "
                f"denoiser, not the {steps} steps."
            )
        self.passes.append(
            PassReport(
                name=name,
                cache=report,
                steps=steps,
                width=width,
                height=height,
                sizes="" if scales is None else scales.letters,
                small_share=1.0 if scales is None else scales.share,
            )
        )
        self.clock.move("denoise", "compile", compiling.seconds)
        self.kernels.append(attention.name)
        self.warnings += attention.warnings
        latents: torch.Tensor = result.images
        made_by = ("vae", "unet", "transformer") if "image" in start else ("unet", "transformer")
        finite.check([latents], f"The latents of the pass {name} are", model.pipeline, made_by)
        return latents

    @contextmanager
    def _scales(self, name: str, steps: int, scheduler: Any, height: int, width: int) -> Iterator[Scales | None]:
        """The run's sizes, where it has several: multi-scale acts in the first pass."""
        settings = self.params.multiscale
        if settings is None or self.passes:
            yield None
            return
        scales = Scales(self.model, settings, steps, prediction_of(scheduler), height, width)
        with scales.attached():
            yield scales
        if "S" not in scales.letters:
            self.warnings.append(
                f"Multi-scale had no effect: none of the {steps} steps lies between the first {settings.fullres_start} "
                f"and the last {settings.fullres_end}, or the factor is 1. Use more steps or fewer at full size."
            )

    def decode(self) -> list[Image.Image]:
        """Pictures of width × height pixels. Raises ValueError before anything has been drawn."""
        if self.latents is None:
            raise ValueError("there are no latents to decode: a pass that draws comes first")
        return self.model.decode(self.latents, self.width, self.height)


def _rows(conditioning: torch.Tensor, images: slice, count: int) -> torch.Tensor:
    """Those of `images`, which are `count`."""
    return conditioning.repeat_interleave(count, dim=0) if len(conditioning) == 1 else conditioning[images]


class Progress:
    """Turns the pipelines' callbacks, one a denoiser evaluation or two, into the steps of the requests in a batch.

    on_steps: hears of each step what it was to each request, which differ in their decisions at most.
    total: denoising steps of all passes over all batches; a pass that finds more to do adds to it.
    items: each request's images in the batch.
    """

    def __init__(self, on_steps: Callable[[Sequence[Step]], None], total: int) -> None:
        self.total = total
        self.items: Sequence[slice] = (slice(None),)
        self._on_steps = on_steps
        self._next = 0

    def watch(self, report: CacheReport, steps: int, finished: Callable[[int], bytes | None]) -> Any:
        """A pipeline's `callback_on_step_end` for one run of `steps` steps.

        finished: is told how many of them are done, and may answer with a preview.
        """
        read = done = 0

        def callback(pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            # The rule of the pipelines' own progress bar: PNDM's extra first call and the two calls of second-order
            # samplers, whose last step has but one, come out as `steps` steps.
            nonlocal read, done
            order, calls = pipeline.scheduler.order, pipeline.num_timesteps
            warm_up = calls - steps * order
            if index == calls - 1 or (index + 1 > warm_up and (index + 1) % order == 0):
                done += 1
                preview = finished(done)
                decisions = [report.decisions_of(items)[read:] for items in self.items]
                read = len(report.decisions)
                self._on_steps([Step(self._next, self.total, decision, preview) for decision in decisions])
                self._next += 1
            return tensors

        return callback


class Clock:
    """Seconds by stage; waits for the device's queue, so that a stage is charged for its own work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0, "compile": 0.0}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[stage] += self._now() - started

    def move(self, source: str, target: str, seconds: float) -> None:
        """Charge what was measured within one stage to another."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
