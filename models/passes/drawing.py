"""One batch on its way through the passes: what they share, and the run of a denoiser that each may make."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from models import samplers
from models.base import GenerationParams, PassReport, Step, StepHook

if TYPE_CHECKING:
    from PIL import Image

    from cache import CacheReport, CacheStrategy
    from models.pipeline import PipelineModel


class Drawing:
    """A batch of pictures while it is drawn. Passes set `latents`, `width` and `height`, and in the end `images`.

    conditioning: the pipeline's arguments for the text, one row each.
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
        self.kernels: list[str] = []  # that computed the attention of each run

    def denoise(
        self, name: str, pipeline: Any, *, steps: int, width: int, height: int, **arguments: Any
    ) -> torch.Tensor:
        """One run of the cache: latents as `pipeline` returns them, one row an image.

        name: of the pass, for the report. steps: how many the pipeline will take, which is less than the schedule has
        where it begins from a picture. The scheduler is this run's own; the saved one is back afterwards.
        """
        params, model = self.params, self.model
        timesteps = samplers.custom_timesteps(params.scheduler, params.steps)
        count = len(self.generators)
        with (
            self.clock("denoise"),
            model.scheduled(pipeline, params, self.seeds),
            model.accelerated(params) as (attention, compiling),
            self.strategy.attach(model.view(params, pipeline.scheduler)) as report,
        ):
            result = pipeline(
                **{key: embedding.repeat_interleave(count, dim=0) for key, embedding in self.conditioning.items()},
                **model.guidance(params),
                **({} if timesteps is None else {"timesteps": timesteps}),
                num_inference_steps=params.steps,
                generator=self.generators,
                width=width,
                height=height,
                output_type="latent",
                callback_on_step_end=self.progress.watch(report, steps),
                **arguments,
            )
        self.clock.move("denoise", "compile", compiling.seconds)
        self.kernels.append(attention.name)
        self.warnings += attention.warnings
        self.passes.append(PassReport(name=name, cache=report, steps=steps, width=width, height=height))
        latents: torch.Tensor = result.images
        return latents

    def decode(self) -> list[Image.Image]:
        """Pictures of width × height pixels. Raises ValueError before anything has been drawn."""
        if self.latents is None:
            raise ValueError("there are no latents to decode: a pass that draws comes first")
        return self.model.decode(self.latents, self.width, self.height)


class Progress:
    """Turns the pipelines' callbacks, one a denoiser evaluation or two, into the request's steps.

    total: denoising steps of all passes over all batches; a pass that finds more to do adds to it.
    """

    def __init__(self, on_step: StepHook, total: int) -> None:
        self.total = total
        self._on_step = on_step
        self._next = 0

    def watch(self, report: CacheReport, steps: int) -> Any:
        """A pipeline's `callback_on_step_end` for one run of `steps` steps."""
        read = 0

        def callback(pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            # The rule of the pipelines' own progress bar: PNDM's extra first call and the two calls of second-order
            # samplers, whose last step has but one, come out as `steps` steps.
            nonlocal read
            order, calls = pipeline.scheduler.order, pipeline.num_timesteps
            warm_up = calls - steps * order
            if index == calls - 1 or (index + 1 > warm_up and (index + 1) % order == 0):
                decision = report.decisions[read:]
                read = len(report.decisions)
                self._on_step(Step(self._next, self.total, decision))
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
