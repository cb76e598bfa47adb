"""What one request gets of the batches that it is drawn in: its rows of their pictures, its part of their reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .acceleration import attention
from .base import Generation, PassReport, Timings

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .stages.drawing import Clock, Drawing

Conditioning = Mapping[str, "torch.Tensor"]
"""A pipeline's arguments for the text, by name; the first dimension is the batch."""


@dataclass(slots=True)
class Share:
    """`conditioning` has one row each; the other fields are filled batch by batch."""

    conditioning: Conditioning
    warnings: list[str]
    seconds: dict[str, float]
    images: list[Image.Image] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    sampling: tuple[str, str] | None = None
    batches: list[int] = field(default_factory=list)

    def take(self, drawing: Drawing, items: slice) -> None:
        """Add the images `items` of a finished batch."""
        self.images += drawing.images[items]
        batch = len(drawing.seeds)
        reports = drawing.passes
        if len(range(batch)[items]) < batch:  # others are drawn in it, whose decisions may differ
            reports = [replace(one, cache=one.cache.of_items(items, batch)) for one in reports]
        self.passes += reports
        self.batches += [batch] if not items.start else []
        self.kernels += drawing.kernels
        self.sampling = drawing.sampling
        said = [*drawing.warnings, *(sentence for one in reports for sentence in one.cache.warnings)]
        self.warnings += [sentence for sentence in dict.fromkeys(said) if sentence not in self.warnings]

    def spend(self, clock: Clock) -> None:
        """Add what `clock` has measured: a batch takes its time for each of its requests."""
        for stage, seconds in clock.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def generation(self) -> Generation:
        return Generation(
            images=self.images,
            passes=self.passes,
            timings=Timings(**{f"{stage}_seconds": seconds for stage, seconds in self.seconds.items()}),
            warnings=self.warnings,
            batches=self.batches,
            sampling=self.sampling,
            attention=next((kernel for kernel in self.kernels if kernel != attention.SDPA), attention.SDPA),
        )


def joined(shares: Sequence[Share], images: Sequence[int]) -> Conditioning:
    """The texts of a batch in which each share has so many images; one row if it is a single text's.

    All must have the same shapes (`alike`).
    """
    import torch

    if len(shares) == 1:
        return shares[0].conditioning
    pairs = list(zip(shares, images, strict=True))
    return {
        name: torch.cat([share.conditioning[name].repeat_interleave(count, dim=0) for share, count in pairs])
        for name in shares[0].conditioning
    }


def alike(shares: Sequence[Share]) -> list[list[int]]:
    """Which shares have texts of the same shapes, by their indices.

    A prompt of several windows has more tokens than one of one. Filled up to the longest, the shorter would be another
    text to a denoiser that attends to all tokens, and the picture would depend on its neighbours.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, share in enumerate(shares):
        shapes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in share.conditioning.items()))
        groups.setdefault(shapes, []).append(index)
    return list(groups.values())
