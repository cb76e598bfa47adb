"""Flux: CLIP and T5 text, a transformer of double- and single-stream blocks on packed latents, flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.base import UNWATCHED, CacheName, GenerationParams, LoadHooks, ModelSpec
from models.libraries import quiet
from models.loading.file import check_layout
from models.loading.folder import check_class, check_traits, dtype_for, load_pipeline, single_file
from models.pipeline import PipelineModel
from models.sampling.samplers import FLOW_MATCHING, choices
from models.text.prompt import remarks

if TYPE_CHECKING:
    import torch

    from models.layout import Layout

PIPELINE = "FluxPipeline"
LONGEST_TEXT = 512  # T5 tokens, the pipeline's limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Flux:
    """A family of FluxPipeline models (Black Forest Labs 2024).

    `traits`: what the transformer's configuration says in this family and not in its neighbours. `file_has`,
    `file_lacks`: parts of tensor names that tell a single file of it, which holds the transformer alone.
    """

    name: str
    native_size: int = 1024
    traits: Mapping[str, object] = field(default_factory=dict)
    file_has: tuple[str, ...] = ("double_blocks.0.", "single_blocks.0.")
    file_lacks: tuple[str, ...] = ()
    size_multiple: int = 16
    steps: int = 28
    guidance_scale: float = 3.5

    @property
    def cache(self) -> CacheName:
        return "first_block"

    @property
    def samplers(self) -> Mapping[str, tuple[str, ...]]:
        return choices(FLOW_MATCHING)

    def check(self, spec: ModelSpec) -> None:
        """Raise LoadFailed if the files say that they are another family's; reads configurations and headers only."""
        check_class(spec, PIPELINE)
        check_traits(spec, "transformer/config.json", self.traits)
        if (file := single_file(spec)) is not None:
            check_layout(spec, file, self.file_has, self.file_lacks)

    def reuse_costs(self, spec: ModelSpec) -> tuple[float, ...]:
        self.check(spec)
        return ()

    def load(
        self, spec: ModelSpec, device: str, dtype: torch.dtype | None = None, hooks: LoadHooks = UNWATCHED
    ) -> PipelineModel:
        import torch

        from cache import TransformerDenoiser

        self.check(spec)
        with quiet():
            from diffusers import FluxPipeline
            from transformers import CLIPTextModel, T5EncoderModel

            pipeline = load_pipeline(
                FluxPipeline,
                {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel},
                spec,
                device,
                dtype or dtype_for(spec, device, torch.bfloat16),
                hooks,
                single="transformer",
            )
        return FluxModel(spec, pipeline, TransformerDenoiser(pipeline.transformer), FLOW_MATCHING)


FLUX = Flux(name="flux")
FLUX_SCHNELL = Flux(
    name="flux-schnell",
    traits={"guidance_embeds": False},
    file_lacks=("guidance_in.",),
    steps=4,
    guidance_scale=0.0,  # distilled to few steps; a scale above 1 would run it twice a step
)
FLUX_DEV = Flux(
    name="flux-dev",
    traits={"guidance_embeds": True},
    file_has=("double_blocks.0.", "single_blocks.0.", "guidance_in."),
)


class FluxModel(PipelineModel):
    """A guidance-distilled transformer takes the scale as an input; another runs a second, unconditional call."""

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor]:
        embeddings = self._embed(params.prompt)
        if self._runs_twice(params):
            embeddings |= {f"negative_{name}": value for name, value in self._embed(params.negative_prompt).items()}
        return embeddings

    def _embed(self, prompt: str) -> dict[str, torch.Tensor]:
        tokens, pooled, _ = self.pipeline.encode_prompt(prompt, max_sequence_length=self._text_length)
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}  # (1, tokens, D), (1, D')

    @property
    def layout(self) -> Layout:
        from models.layout import Packed

        return Packed()

    def guidance(self, params: GenerationParams) -> dict[str, float]:
        scale = params.guidance_scale
        if self._distilled:
            return {"guidance_scale": scale}
        return {"true_cfg_scale": scale if self._runs_twice(params) else 1.0}

    def from_pictures(self) -> Any:
        """With steps counted as steps: diffusers' pipeline takes the calls of a second-order scheduler for them."""
        pipeline = super().from_pictures()

        def get_timesteps(calls: int, strength: float, device: object) -> tuple[torch.Tensor, int]:
            scheduler = pipeline.scheduler
            steps = -(-calls // scheduler.order)
            begin = steps - self.partial_steps(steps, strength)
            scheduler.set_begin_index(begin * scheduler.order)
            return scheduler.timesteps[begin * scheduler.order :], steps - begin

        pipeline.get_timesteps = get_timesteps
        return pipeline

    def partial_steps(self, steps: int, strength: float) -> int:
        return steps - int(max(steps - min(steps * strength, steps), 0))  # diffusers' rounding for Flux

    @property
    def size_multiple(self) -> int:
        return 2 * super().size_multiple

    def clean(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        config = self.pipeline.vae.config
        latents = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
        scaled: torch.Tensor = latents / config.scaling_factor + config.shift_factor
        return scaled

    def warnings(self, params: GenerationParams) -> list[str]:
        sentences = remarks(f"{params.prompt}\n{params.negative_prompt}", weights=False)
        tokens = len(self.pipeline.tokenizer_2(params.prompt).input_ids)
        if tokens > self._text_length:
            read = f"{self.spec.name} reads {self._text_length} tokens"
            sentences.insert(0, f"{read}; the prompt has {tokens}, and its end was not read.")
        if params.negative_prompt and not self._runs_twice(params):
            reason = "is guidance-distilled" if self._distilled else "runs without guidance at a scale of 1 or less"
            sentences.append(f"The negative prompt has no effect: {self.spec.name} {reason}.")
        return sentences

    @property
    def _distilled(self) -> bool:
        return bool(self.pipeline.transformer.config.guidance_embeds)

    @property
    def _text_length(self) -> int:
        return int(min(self.pipeline.tokenizer_2.model_max_length, LONGEST_TEXT))

    def _runs_twice(self, params: GenerationParams) -> bool:
        return not self._distilled and params.guidance_scale > 1
