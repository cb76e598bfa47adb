"""What families of transformers on flow matching share (Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.base import CacheName, DtypeName, FreeU
from models.pipeline import PipelineModel
from models.run import Kind
from models.sampling.samplers import FLOW_MATCHING, Sampler

from .family import ModelFamily

if TYPE_CHECKING:
    import torch


KEPT_STREAMS = 10  # the first-block cache's residuals and references, in two calls, and what is made of them


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowFamily(ModelFamily):
    """A transformer whose tokens are two by two latents of an autoencoder of factor 8."""

    native_size: int = 1024
    network: str = "transformer"
    half: DtypeName = "bfloat16"
    cache: CacheName = "first_block"
    table: Mapping[str, Sampler] = field(default_factory=lambda: FLOW_MATCHING)
    size_multiple: int = 16
    freeu: FreeU | None = None


class FlowModel(PipelineModel):
    """Its pipelines over pictures cut a schedule of steps, where diffusers' cut one of calls."""

    def sibling(self, kind: Kind) -> Any:
        """With steps counted as steps, where diffusers' pipelines take a second-order scheduler's calls for them."""
        pipeline = super().sibling(kind)

        def get_timesteps(calls: int, strength: float, device: object) -> tuple[torch.Tensor, int]:
            scheduler = pipeline.scheduler
            steps = -(-calls // scheduler.order)
            begin = steps - self.partial_steps(steps, strength)
            scheduler.set_begin_index(begin * scheduler.order)
            return scheduler.timesteps[begin * scheduler.order :], steps - begin

        pipeline.get_timesteps = get_timesteps
        return pipeline

    def partial_steps(self, steps: int, strength: float) -> int:
        return steps - int(max(steps - min(steps * strength, steps), 0))  # diffusers' rounding for flow matching
