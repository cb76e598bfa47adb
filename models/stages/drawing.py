"""One batch on its way through the stages: what they share, and the run of a denoiser that each may make."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image

from cache import CacheStrategy
from models import finite
from models.base import Fill, GenerationParams, StageReport, Step
from models.run import Begun, Run

from .fill import noise_within
from .model import Model, Sizes
from .multiscale import Scales
from .preview import Previews
from .region import Region


@dataclass(frozen=True, slots=True)
class SecondModel:
    """A second model, and the batch's text as that one reads it."""

    model: Model
    conditioning: Mapping[str, torch.Tensor]


@dataclass(slots=True)
class Drawing:
    """A batch of pictures while it is drawn. Stages set `latents` and their `size`, and in the end `images`.

    conditioning: the pipeline's arguments for the text, each with a row an image. size: (width, height), pixels.
    generators: one an image, on the CPU, seeded once and drawn from by all stages in turn, so that a picture is the
        same on every device and whatever it is batched with.
    region: what of the answer is drawn, where it is a part: `images` show its frame until it is put back. mask: what is
        drawn anew in the frame, hard, at the drawing's aspect.
    sampling: sampler and scheduler by name, of the last run. kernels: what computed the attention of each run.
    """

    model: Model
    params: GenerationParams
    seeds: tuple[int, ...]
    conditioning: Mapping[str, torch.Tensor]
    strategy: CacheStrategy
    size: tuple[int, int]
    clock: Clock
    progress: Progress
    refiner: SecondModel | None = None
    latents: torch.Tensor | None = None
    region: Region | None = None
    mask: Image.Image | None = None
    images: list[Image.Image] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sampling: tuple[str, str] | None = None
    kernels: list[str] = field(default_factory=list)
    generators: list[torch.Generator] = field(init=False)

    def __post_init__(self) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]

    def from_noise(self, name: str, *, until: float = 1.0) -> torch.Tensor:
        """Latents drawn from nothing: the steps of the schedule `until` that share of it is over."""
        return self._denoise(name, slice(None), self.size, until=until)

    def refined(self, name: str, strength: float, since: float) -> torch.Tensor:
        """The latents, gone on with by the refiner from the share `since` of the schedule on.

        strength: the last part of the schedule that they were begun in. Raises ValueError where nothing was begun, or
        there is no refiner.
        """
        if self.latents is None or self.refiner is None:
            raise ValueError("a stage that draws comes first, and a refiner is needed")
        whole = self.model.partial_steps(self.params.steps, strength)
        first = self.model.steps_before(self.params, strength, since)
        begun = Begun(self.latents, first, whole, self.model.pipeline.scheduler)
        return self._denoise(name, slice(None), self.size, begun=begun)

    def from_pictures(
        self,
        name: str,
        pictures: Sequence[Image.Image],
        strength: float,
        *,
        until: float = 1.0,
        only: int | None = None,
        mask: Image.Image | None = None,
        fill: Fill = "original",
    ) -> torch.Tensor:
        """Latents drawn over `pictures`, which are of one size that the model can draw at.

        They are encoded and noised to where the last `strength` of the schedule begins, and denoised from there. There
        is one an image of the batch, or a single one for the image `only`. mask: what of them is drawn, a hard one of
        their aspect; it begins from them or from noise alone (`fill`).
        """
        images = slice(None) if only is None else slice(only, only + 1)
        return self._denoise(name, images, pictures[0].size, pictures, strength, until, mask=mask, fill=fill)

    def _denoise(
        self,
        name: str,
        images: slice,
        size: tuple[int, int],
        pictures: Sequence[Image.Image] = (),
        strength: float = 1.0,
        until: float = 1.0,
        begun: Begun | None = None,
        mask: Image.Image | None = None,
        fill: Fill = "original",
    ) -> torch.Tensor:
        """One run of the cache, reported under the stage's `name`: latents, one row for each of `images`."""
        params, seeds = self.params, self.seeds[images]
        source = self if begun is None or self.refiner is None else self.refiner
        model = source.model
        decoder = self.model.preview_decoder if params.preview else None
        with (
            self.clock("denoise"),
            model.run(params, seeds, self.strategy, size, pictures, strength, until, begun, mask) as run,
            noise_within(run, self.generators[images]) if fill == "noise" else nullcontext(),
            self._scales(run) as scales,
            Previews(decoder, run.steps).watching(run, model.layout) as previews,
        ):
            self.sampling = run.sampling
            pipeline = type(run.pipeline).__name__
            self.warnings += [f"{one} had no effect in the pass {name}: {pipeline} has none." for one in run.ignored]
            latents = run(
                {key: rows[images] for key, rows in source.conditioning.items()},
                self.generators[images],
                self.progress.watch(run, previews),
            )
        report = run.report
        if run.scheduler.order > 1 and report.strategy != "none":
            report.warn(
                f"The sampler makes two evaluations a step: the cache counted the {len(report.decisions)} calls of the "
                f"denoiser, not the {run.steps} steps."
            )
        self.stages.append(
            StageReport(
                name=name,
                cache=report,
                steps=run.steps,
                width=size[0],
                height=size[1],
                sizes="" if scales is None else scales.letters,
                small_share=1.0 if scales is None else scales.share,
                halves=run.guidance.letters,
            )
        )
        self.clock.move("denoise", "compile", run.compilation.seconds)
        self.kernels.append(run.attention.name)
        self.warnings += [*run.attention.warnings, *run.guidance.remarks(run.steps)]
        made_by = ("vae", "unet", "transformer") if pictures else ("unet", "transformer")
        finite.check([latents], f"The latents of the pass {name} are", run.pipeline, made_by)
        return latents

    @contextmanager
    def _scales(self, run: Run) -> Iterator[Scales | None]:
        """The run's sizes, where it has several: multi-scale acts in the first one."""
        settings = self.params.multiscale
        if settings is None or self.stages:
            yield None
            return
        scales = Scales(self.model, settings, run, self.model.prediction(run.scheduler))
        with scales.attached():
            yield scales
        if "S" not in scales.letters:
            self.warnings.append(
                f"Multi-scale had no effect: none of the {run.steps} steps lies between the first "
                f"{settings.fullres_start} and the last {settings.fullres_end}, or the factor is 1. Use more steps or "
                "fewer at full size."
            )

    def decode(self) -> list[Image.Image]:
        """The latents as pictures. Raises ValueError before anything has been drawn."""
        if self.latents is None:
            raise ValueError("there are no latents to decode: a stage that draws comes first")
        return self.model.decode(self.latents, *self.size)


class Stage(Protocol):
    """Stateless: what belongs to a batch is in its Drawing."""

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        """Denoising steps for one batch, as far as they are known before it is drawn. Raises TooFewSteps."""
        ...

    def run(self, drawing: Drawing) -> None: ...


class Progress:
    """Tells the requests in a batch of the steps that its runs make.

    on_steps: hears of each step, once for each request: their decisions may differ.
    total: denoising steps of all stages over all batches; a stage that finds more to do adds to it.
    items: each request's images in the batch.
    """

    def __init__(self, on_steps: Callable[[Sequence[Step]], None], total: int) -> None:
        self.total = total
        self.items: Sequence[slice] = (slice(None),)
        self._on_steps = on_steps
        self._next = 0

    def watch(self, run: Run, previews: Previews) -> Callable[[], None]:
        """What `run` is to call after each step."""
        read = 0

        def stepped() -> None:
            nonlocal read
            preview = previews.after(run.done)
            decisions = [run.report.decisions_of(items)[read:] for items in self.items]
            read = len(run.report.decisions)
            self._on_steps([Step(self._next, self.total, decision, preview) for decision in decisions])
            self._next += 1

        return stepped


class Clock:
    """Seconds by part of the work; waits for the device's queue, so that a part is charged for its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0, "compile": 0.0}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[part] += self._now() - started

    def move(self, source: str, target: str, seconds: float) -> None:
        """Charge what was measured within one part to another."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
