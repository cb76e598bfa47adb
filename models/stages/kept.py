"""Finished runs, kept for a while: a request that differs in what comes after them goes on from there.

What is kept is all that a later stage sees of a drawing, so that going on is bit-identical to drawing the whole. Runs
are found by their parameters: all of them but those that act later alone, so that a new parameter tells runs apart
until somebody decides otherwise.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from models.base import GenerationParams, StageReport
from models.loading.checkpoints import stamp_of
from models.recent import Recent

from . import hires
from .drawing import Drawing, Stage
from .hires import HiresFix
from .region import Region

OF_HIRES = {"hires_fix", "hires_upscaler"}
AFTER = {"adetailer", "face_detector", "upscale"}
TOLD_OTHERWISE = {"width", "height", "seeds", "batch_size", "vae_tiling"}  # by the drawing: its sizes, its own seeds
OF_FRAME = {"width", "height"}  # of a mask, which lies on a picture of the size that was asked for
OF_NO_PICTURE = {"preview"}


@dataclass(frozen=True, slots=True)
class KeptRun:
    """A drawing between two stages. latents: on the CPU; generators: their states; the rest as in Drawing."""

    latents: torch.Tensor
    generators: tuple[torch.Tensor, ...]
    size: tuple[int, int]
    region: Region | None
    mask: Image.Image | None
    stages: tuple[StageReport, ...]
    warnings: tuple[str, ...]
    kernels: tuple[str, ...]
    sampling: tuple[str, str] | None

    @classmethod
    def of(cls, drawing: Drawing) -> KeptRun:
        """Raises ValueError before anything has been drawn."""
        if drawing.latents is None:
            raise ValueError("there are no latents to keep: a stage that draws comes first")
        return cls(
            latents=drawing.latents.to("cpu", copy=True),
            generators=tuple(generator.get_state() for generator in drawing.generators),
            size=drawing.size,
            region=drawing.region,
            mask=drawing.mask,
            stages=tuple(replace(one, kept=True) for one in drawing.stages),
            warnings=tuple(drawing.warnings),
            kernels=tuple(drawing.kernels),
            sampling=drawing.sampling,
        )

    def restore(self, drawing: Drawing) -> None:
        """Bring a drawing that has not begun to where this one was."""
        drawing.latents = self.latents.to(drawing.model.device, copy=True)
        for generator, state in zip(drawing.generators, self.generators, strict=True):
            generator.set_state(state)
        drawing.size, drawing.sampling = self.size, self.sampling
        drawing.region, drawing.mask = self.region, self.mask
        drawing.stages = list(self.stages)
        drawing.warnings, drawing.kernels = list(self.warnings), list(self.kernels)

    @property
    def bytes(self) -> int:
        tensors = (self.latents, *self.generators)
        return sum(tensor.nbytes for tensor in tensors) + len(
            pickle.dumps((self.stages, self.warnings, self.region, self.mask))
        )


class KeptRuns:
    """One model's, of at most `most_bytes` of main memory; the one used longest ago goes when there is no room."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._runs: Recent[KeptRun] = Recent(most_bytes)

    def asked(self, params: GenerationParams) -> Mapping[str, Hashable] | None:
        """What is asked for, as `draw` takes it; to be called before the files that it names are read."""
        return exactly(params) if params.owner is not None and self._most_bytes else None

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def bytes(self) -> int:
        return self._runs.bytes

    def draw(self, drawing: Drawing, stages: Sequence[Stage], asked: Mapping[str, Hashable] | None) -> None:
        """Take `drawing` through the stages that make its latents, as many of them as were not run before.

        asked: what was asked for, by `exactly`; None: nothing is kept, nor looked for.
        """
        if asked is None:
            for stage in stages:
                stage.run(drawing)
            return
        keys = [_key(drawing, asked, stages[:number]) for number in range(1, len(stages) + 1)]
        known = [(number, run) for number, key in enumerate(keys, 1) if (run := self._runs.get(key)) is not None]
        done = 0
        if known:
            done, run = known[-1]
            run.restore(drawing)
            drawing.progress.total -= sum(one.steps(drawing.model, drawing.params) for one in stages[:done])
        for stage, key in zip(stages[done:], keys[done:], strict=True):
            stage.run(drawing)
            run = KeptRun.of(drawing)
            self._runs.put(key, run, run.bytes + len(pickle.dumps(key)))


def exactly(params: GenerationParams) -> dict[str, Hashable]:
    """What was asked for, by name: pictures by what they show, files as they are now, since they may be exchanged."""
    return {field.name: _exactly(getattr(params, field.name)) for field in fields(params)}


def _exactly(value: object) -> Hashable:
    if isinstance(value, Image.Image):
        return value.mode, value.size, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, Path):
        return value, stamp_of(value)
    if is_dataclass(value):
        return tuple(_exactly(getattr(value, field.name)) for field in fields(value))
    return tuple(map(_exactly, value)) if isinstance(value, tuple) else value


def _key(drawing: Drawing, asked: Mapping[str, Hashable], stages: Sequence[Stage]) -> Hashable:
    """All that the latents follow from, within one model, when `stages` have run on a drawing that has not begun."""
    enlarged = any(isinstance(one, HiresFix) for one in stages)
    # Where a refiner goes on with the first run follows from whether a second one comes, and at which size.
    enlarged = enlarged or (drawing.refiner is not None and drawing.params.hires_fix)
    masked = drawing.params.img2img is not None and drawing.params.img2img.inpaint is not None
    told = TOLD_OTHERWISE - (OF_FRAME if masked else set())
    later = AFTER | told | OF_NO_PICTURE | (set() if enlarged else OF_HIRES)
    return (
        len(stages),
        drawing.strategy,
        drawing.seeds,
        hires.sizes(drawing.model, drawing.params) if enlarged else drawing.size,
        drawing.model.tiled,
        tuple((name, value) for name, value in asked.items() if name not in later),
    )
