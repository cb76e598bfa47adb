"""What a batch of pictures goes through: one pass a file, run in the order of `chain`.

A pass is a frozen setting with two methods: `steps`, the denoising steps that it is known to take for one batch, and
`run`, which moves the batch's `Drawing` on. Every call of `Drawing.denoise` is one run of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .base import Base
from .decode import Decode

if TYPE_CHECKING:
    from models.base import GenerationParams

    from .drawing import Drawing


class Pass(Protocol):
    """A stage of a generation. Stateless: what belongs to a batch is in its Drawing."""

    def steps(self, params: GenerationParams) -> int:
        """Denoising steps for one batch, as far as they are known before it is drawn."""
        ...

    def run(self, drawing: Drawing) -> None: ...


def chain(params: GenerationParams) -> tuple[Pass, ...]:
    """The passes of a request in their order."""
    return (Base(), Decode())
