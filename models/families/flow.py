"""Flow matching (Lipman et al. 2023) on a transformer: what diffusers' pipelines of such models share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from models.base import CacheName, DtypeName, FreeU, GenerationParams, ModelSpec
from models.pipeline import PipelineModel
from models.run import Kind
from models.sampling.samplers import FLOW_MATCHING, Sampler
from models.text.prompt import remarks

from .family import ModelFamily

if TYPE_CHECKING:
    import torch

    from cache import Denoiser, TransformerDenoiser
    from models.guidance import Guidance
    from models.layout import Layout

KEPT_STREAMS = 10  # the first-block cache's residuals and references, in two calls, and what is made of them
CELLS = 4  # of the latents' grid, in a token


class FlowModel(PipelineModel):
    """Where the scale of guidance is no input of the network, a scale above 1 runs it with text and without, apart.

    unguided: the highest scale that does not. longest_text: how many tokens the pipeline takes of a prompt.
    """

    denoiser: TransformerDenoiser
    unguided: ClassVar[float] = 1.0
    longest_text: ClassVar[int] = 512

    @property
    def layout(self) -> Layout:
        from models.layout import Packed

        return Packed()

    def rows(self, *, guided: bool) -> int:
        return 1

    @property
    def kept_cells(self) -> int:
        config = self.pipeline.transformer.config
        return KEPT_STREAMS * int(config.num_attention_heads * config.attention_head_dim) // CELLS

    def blank(self, *shape: int) -> torch.Tensor:
        """An input of the network without values, on the meta device, for `inputs`."""
        import torch

        return torch.empty(shape, dtype=self.pipeline.vae.dtype, device="meta")

    def view(self, scheduler: Any, sampling: tuple[str, str], guidance: Guidance) -> Denoiser:
        return self.denoiser if self.rows(guided=True) == 1 else self.denoiser.guided_by(guidance.acts)

    @property
    def distilled(self) -> bool:
        """Whether the scale of guidance is an input of the network."""
        return bool(self.pipeline.transformer.config.get("guidance_embeds"))

    def runs_twice(self, params: GenerationParams) -> bool:
        return not self.distilled and params.guidance_scale > self.unguided

    def guidance(self, params: GenerationParams) -> dict[str, float]:
        return {"guidance_scale": params.guidance_scale}

    def sibling(self, kind: Kind) -> Any:
        """With steps counted as steps, where diffusers' pipelines take a second-order scheduler's calls for them."""
        pipeline = super().sibling(kind)

        def get_timesteps(_: int, strength: float, device: object) -> tuple[torch.Tensor, int]:
            scheduler = pipeline.scheduler
            steps = -(-len(scheduler.timesteps) // scheduler.order)
            begin = steps - self.partial_steps(steps, strength)
            scheduler.set_begin_index(begin * scheduler.order)
            return scheduler.timesteps[begin * scheduler.order :], steps - begin

        pipeline.get_timesteps = get_timesteps
        return pipeline

    def partial_steps(self, steps: int, strength: float) -> int:
        return steps - int(max(steps - min(steps * strength, steps), 0))  # diffusers' rounding in these pipelines

    @property
    def tokenizer(self) -> Any:
        """The one that reads most of a prompt."""
        return self.pipeline.tokenizer

    @property
    def text_length(self) -> int:
        """Tokens that are read of a prompt."""
        return min(int(self.tokenizer.model_max_length), self.longest_text)

    def tokens(self, prompt: str) -> int:
        """How many the prompt has."""
        return len(self.tokenizer(prompt).input_ids)

    def warnings(self, params: GenerationParams) -> list[str]:
        sentences = []
        guided = self.runs_twice(params)
        read = {"prompt": params.prompt, **({"negative prompt": params.negative_prompt} if guided else {})}
        for name, prompt in read.items():
            if (tokens := self.tokens(prompt)) > self.text_length:
                reads = f"{self.spec.name} reads {self.text_length} tokens"
                sentences.append(f"{reads}; the {name} has {tokens}, and its end was not read.")
        sentences += remarks(f"{params.prompt}\n{params.negative_prompt}", weights=False)
        if params.negative_prompt and not guided:
            scale = f"a scale of {self.unguided:g} or less"
            reason = "is guidance-distilled" if self.distilled else f"runs without guidance at {scale}"
            sentences.append(f"The negative prompt has no effect: {self.spec.name} {reason}.")
        return sentences


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowFamily(ModelFamily):
    """A family of such models. view: how its network is laid out, where TransformerDenoiser has to be told."""

    native_size: int = 1024
    network: str = "transformer"
    half: DtypeName = "bfloat16"
    cache: CacheName = "first_block"
    table: Mapping[str, Sampler] = field(default_factory=lambda: FLOW_MATCHING)
    size_multiple: int = 16
    freeu: FreeU | None = None
    model_class: type[FlowModel] = FlowModel  # type: ignore[type-abstract]  # each family has its own
    view: Mapping[str, Any] = field(default_factory=dict)

    def model(self, spec: ModelSpec, pipeline: Any) -> FlowModel:
        from cache import TransformerDenoiser

        return self.model_class(spec, pipeline, TransformerDenoiser(pipeline.transformer, **self.view), self.table)
