"""A loaded diffusers pipeline that draws pictures under a cache strategy: what all families share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import limits, samplers
from .base import Generation, GenerationParams, ModelSpec, Step, StepHook, Timings
from .loading import quiet

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from cache import CacheReport, CacheStrategy, Denoiser


class PipelineModel(ABC):
    """Encode the prompt, denoise batch by batch, decode; the pipeline's own loop does the denoising.

    Neither a scheduler nor a random generator outlives a batch: each image draws from a generator of its own seed, on
    the CPU, so that it is the same on every device and whatever it is batched with.
    """

    def __init__(
        self, spec: ModelSpec, pipeline: Any, denoiser: Denoiser, choices: Mapping[str, samplers.Sampler]
    ) -> None:
        self.spec = spec
        self.pipeline = pipeline
        self.choices = choices
        self._denoiser = denoiser

    @property
    def denoiser(self) -> Denoiser:
        return self._denoiser

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        """One picture a seed, in their order.

        Raises UnsupportedSampler before anything is drawn; what `on_step` raises passes through, and leaves the model
        as it was.
        """
        import torch

        samplers.check(samplers.choices(self.choices), params.sampler, params.scheduler)
        width, height = limits.render_size(self.spec, params.width, params.height)
        batches = [params.seeds[at : at + params.batch_size] for at in range(0, len(params.seeds), params.batch_size)]
        clock = _Clock(self.pipeline.device)
        images: list[Image.Image] = []
        reports: list[CacheReport] = []
        with torch.no_grad(), quiet():
            with clock("text"):
                conditioning = self._encode(params)
                warnings = limits.warnings(self.spec, params.prompt, params.width, params.height)
                warnings += self._warnings(params)
            for number, seeds in enumerate(batches):
                progress = _Progress(on_step, params.steps, number, len(batches))
                with clock("denoise"), self._scheduler(params, seeds), strategy.attach(self._denoiser) as report:
                    latents = self._denoise(conditioning, params, seeds, width, height, progress.watch(report))
                reports.append(report)
                warnings += [sentence for sentence in report.warnings if sentence not in warnings]
                with clock("decode"):
                    drawn = self._decode(latents, width, height)
                    images += [limits.fit(image, params.width, params.height) for image in drawn]
        timings = Timings(**{f"{stage}_seconds": seconds for stage, seconds in clock.seconds.items()})
        return Generation(images=images, reports=reports, timings=timings, warnings=warnings)

    def _denoise(
        self,
        conditioning: Mapping[str, torch.Tensor],
        params: GenerationParams,
        seeds: tuple[int, ...],
        width: int,
        height: int,
        callback: Any,
    ) -> torch.Tensor:
        """Latents as the pipeline returns them, one row a seed."""
        import torch

        timesteps = samplers.custom_timesteps(params.scheduler, params.steps)
        result = self.pipeline(
            **{name: embedding.repeat_interleave(len(seeds), dim=0) for name, embedding in conditioning.items()},
            **self._guidance(params),
            **({} if timesteps is None else {"timesteps": timesteps}),
            num_inference_steps=params.steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            width=width,
            height=height,
            output_type="latent",
            callback_on_step_end=callback,
        )
        latents: torch.Tensor = result.images
        return latents

    @contextmanager
    def _scheduler(self, params: GenerationParams, seeds: tuple[int, ...]) -> Iterator[None]:
        """The pipeline with a scheduler of this batch's own; the saved one is back afterwards."""
        saved = self.pipeline.scheduler
        self.pipeline.scheduler = samplers.build(
            saved, self.choices, params.sampler, params.scheduler, steps=params.steps, seeds=seeds
        )
        try:
            yield
        finally:
            self.pipeline.scheduler = saved

    def _truncation(self, tokenizer: Any, prompt: str, limit: int) -> list[str]:
        tokens = len(tokenizer(prompt).input_ids)
        if tokens <= limit:
            return []
        return [f"{self.spec.name} reads {limit} tokens; the prompt has {tokens}, and its end was not read."]

    @abstractmethod
    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor]:
        """The pipeline's arguments for the text, each with one row (1, …)."""

    @abstractmethod
    def _guidance(self, params: GenerationParams) -> dict[str, float]:
        """The pipeline's arguments for guidance."""

    @abstractmethod
    def _decode(self, latents: torch.Tensor, width: int, height: int) -> list[Image.Image]:
        """Pictures of width × height pixels."""

    @abstractmethod
    def _warnings(self, params: GenerationParams) -> list[str]:
        """What of the request this family cannot honour."""


class _Progress:
    """Turns the pipeline's callbacks, one a denoiser evaluation or two, into the request's steps."""

    def __init__(self, on_step: StepHook, steps: int, batch: int, batches: int) -> None:
        self._on_step = on_step
        self._steps = steps
        self._next = batch * steps
        self._total = batches * steps
        self._read = 0

    def watch(self, report: CacheReport) -> Any:
        def callback(pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            # The rule of the pipelines' own progress bar: PNDM's extra first call and the two calls of second-order
            # samplers, whose last step has but one, come out as `steps` steps.
            order, calls = pipeline.scheduler.order, pipeline.num_timesteps
            warm_up = calls - self._steps * order
            if index == calls - 1 or (index + 1 > warm_up and (index + 1) % order == 0):
                decision = report.decisions[self._read :]
                self._read = len(report.decisions)
                self._on_step(Step(self._next, self._total, decision))
                self._next += 1
            return tensors

        return callback


class _Clock:
    """Seconds by stage; waits for the device's queue, so that a stage is charged for its own work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[stage] += self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        return time.perf_counter()
