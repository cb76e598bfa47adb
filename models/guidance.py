"""Guidance in a part of a run (Kynkäänniemi et al. 2024): outside of it the denoiser is spared the half without text.

A pipeline's loop guides in every step. Where the run does not, it is given the prediction with text in the other one's
place, and u + g (c - u) is c.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import GenerationParams

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .layout import Layout

WITHOUT_TEXT = "uncond"  # the lane, in diffusers' pipelines


@dataclass(slots=True)
class Guidance:
    """Where in a run guidance acts: in the steps that `start` ≤ share < `end` is true of: of all steps, those before.

    A run may be the first or the last part of a picture's drawing: its own shares are from `begun` to below `ended`.

    twice: whether the pipeline runs the denoiser with text and without.
    letters: of a run that is guided in a part, one for each call of the denoiser: B with both halves in a batch, T with
        text alone, N with none.
    """

    twice: bool
    start: float
    end: float
    begun: float = 0.0
    ended: float = 1.0
    letters: str = ""
    _at: Callable[[], float] | None = None

    @classmethod
    def of(cls, params: GenerationParams, begun: float, ended: float, *, twice: bool) -> Guidance:
        return cls(twice, params.guidance_start, params.guidance_end, begun, ended)

    @property
    def is_whole(self) -> bool:
        return self.start <= 0 and self.end >= 1

    def acts(self) -> bool:
        """Whether the present step is guided."""
        return self.twice and (self.is_whole or self._at is None or self.start <= self._at() < self.end)

    @contextmanager
    def attached(self, at: Callable[[], float], root: nn.Module, layout: Layout) -> Iterator[None]:
        """Within the context, calls of `root` compute what their step needs; a cache is attached before.

        at: the share of all steps that lies before the present one.
        """
        if self.is_whole or not self.twice:
            yield
            return
        from cache.patching import shadowed

        self._at = at
        try:
            with shadowed([(root, "forward", _Spared(root.forward, self, layout))]):
                yield
        finally:
            self._at = None

    def remarks(self, steps: int) -> list[str]:
        """What to tell the user of a finished run of so many steps."""
        names = "guidance_start and guidance_end"
        if self.is_whole:
            return []
        if not self.twice:
            return [f"{names} had no effect: the run has no half without text that it could be spared."]
        meant = (self.start < self.ended or self.ended == 1) and (self.begun < self.end or self.begun == 0)
        if meant and not set(self.letters) & set("BN"):
            return [f"Nothing was guided: none of the {steps} steps lies between {names}."]
        return []


class _Spared:
    """Stands in for `root.forward`. `lane` is that of the call, as a cache's interception tells it."""

    def __init__(self, forward: Callable[..., Any], guidance: Guidance, layout: Layout) -> None:
        functools.update_wrapper(self, forward)  # pipelines read the signature
        self._forward, self._guidance, self._layout = forward, guidance, layout
        self._with_text: Tensor | None = None

    @property
    def lane(self) -> str | None:
        return getattr(self._forward, "lane", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        guidance, lane = self._guidance, self.lane
        if guidance.acts():
            guidance.letters += "B" if lane is None else "N" if lane == WITHOUT_TEXT else "T"
            return self._forward(*args, **kwargs)
        if lane == WITHOUT_TEXT:
            answer, self._with_text = self._with_text, None
            return (answer,)
        guidance.letters += "T"
        if lane is not None:
            self._with_text = self._forward(*args, **kwargs)[0]
            return (self._with_text,)
        args, kwargs = self._layout.with_text(args, kwargs)
        with_text = self._forward(*args, **kwargs)[0]
        if isinstance(with_text, list):
            return ([*with_text, *with_text],)
        import torch

        return (torch.cat([with_text, with_text]),)
