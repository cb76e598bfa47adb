"""What a batch of pictures goes through: one pass a file, run in the order of `chain`.

A pass is a frozen setting with two methods: `steps`, the denoising steps that it is known to take for one batch, and
`run`, which moves the batch's `Drawing` on. The order:

    base or img2img (multi-scale acts in it) → hires_fix → decode, resample to the size asked for → adetailer

Each but decode is a run of the denoiser with a scheduler and a cache run of its own; previews come from all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from models import faces

from .decode import Decode
from .detail import ADetailer
from .hires import HiresFix
from .noise import Base
from .picture import FromPicture

if TYPE_CHECKING:
    from models.base import GenerationParams
    from models.pipeline import PipelineModel

    from .drawing import Drawing


class Pass(Protocol):
    """A stage of a generation. Stateless: what belongs to a batch is in its Drawing."""

    def steps(self, model: PipelineModel, params: GenerationParams) -> int:
        """Denoising steps for one batch, as far as they are known before it is drawn. Raises TooFewSteps."""
        ...

    def run(self, drawing: Drawing) -> None: ...


def chain(params: GenerationParams) -> tuple[Pass, ...]:
    """The passes of a request in their order. Raises DetectorFailed."""
    first: Pass = Base() if params.img2img is None else FromPicture(params.img2img)
    enlarged = (HiresFix(),) if params.hires_fix else ()
    detailed = (ADetailer(faces.finder(params.face_detector)),) if params.adetailer else ()
    return (first, *enlarged, Decode(), *detailed)
