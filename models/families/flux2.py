"""FLUX.2: one language model reads the text, a transformer of double- and single-stream blocks, normalised latents.

Three layers of the language model are read, 512 tokens whatever the prompt's length. The autoencoder's 32 channels are
two by two a token, 128 numbers, each with its own mean and spread (Black Forest Labs 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.base import GenerationParams, ModelSpec
from models.text import chat

from .flow import KEPT_STREAMS, FlowFamily, FlowModel

if TYPE_CHECKING:
    import torch

    from models.layout import Layout

LONGEST_TEXT = 512  # tokens, the pipelines' limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Flux2Family(FlowFamily):
    """A family of Flux2KleinPipeline models. diffusers' pipelines over pictures take them for references."""

    pipeline: str = "Flux2KleinPipeline"
    draws_over: bool = False

    def model(self, spec: ModelSpec, pipeline: Any) -> Flux2Model:
        from cache import TransformerDenoiser

        return Flux2Model(spec, pipeline, TransformerDenoiser(pipeline.transformer), self.table)


FLUX2_KLEIN = Flux2Family(
    name="flux2-klein",
    text_encoders={"text_encoder": "Qwen3ForCausalLM"},
    settings={"is_distilled": True},
    steps=4,
    guidance_scale=1.0,
)
FLUX2_KLEIN_BASE = Flux2Family(
    name="flux2-klein-base",
    text_encoders={"text_encoder": "Qwen3ForCausalLM"},
    settings={"is_distilled": False},
    steps=50,
    guidance_scale=4.0,
)


class Flux2Model(FlowModel):
    """The base models run a second, unconditional call a step; the distilled one draws in four steps, without."""

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        embeddings: dict[str, torch.Tensor | None] = {"prompt_embeds": self._embed(params.prompt)}
        if self.runs_twice(params):
            embeddings["negative_prompt_embeds"] = self._embed(params.negative_prompt)
        return embeddings

    def _embed(self, prompt: str) -> torch.Tensor:
        """(1, tokens, 3 · width of the language model)"""
        embedded: torch.Tensor = self.pipeline.encode_prompt(prompt, max_sequence_length=self._text_length)[0]
        return embedded

    @property
    def layout(self) -> Layout:
        from models.layout import PackedInTime

        return PackedInTime()

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        import torch

        config, dtype = self.pipeline.transformer.config, self.pipeline.vae.dtype
        tokens, text = height * width // 4, self._text_length

        def tensor(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        return {
            "hidden_states": tensor(1, tokens, config.in_channels),
            "encoder_hidden_states": tensor(1, text, config.joint_attention_dim),
            "timestep": tensor(1),
            "img_ids": tensor(tokens, 4),
            "txt_ids": tensor(text, 4),
        }

    def rows(self, *, guided: bool) -> int:
        return 1  # with guidance in two calls

    @property
    def kept_cells(self) -> int:
        config = self.pipeline.transformer.config
        return KEPT_STREAMS * int(config.num_attention_heads * config.attention_head_dim) // 4  # four cells a token

    def runs_twice(self, params: GenerationParams) -> bool:
        return params.guidance_scale > 1 and not self._distilled

    def guidance(self, params: GenerationParams) -> dict[str, float]:
        return {"guidance_scale": params.guidance_scale}

    def decodable(self, grid: torch.Tensor) -> torch.Tensor:
        mean, spread = self._normal(grid)
        normal: torch.Tensor = self.pipeline._patchify_latents(grid)
        latents: torch.Tensor = self.pipeline._unpatchify_latents(normal * spread + mean)
        return latents

    def encoded(self, latents: torch.Tensor) -> torch.Tensor:
        mean, spread = self._normal(latents)
        patches: torch.Tensor = self.pipeline._patchify_latents(latents)
        normal: torch.Tensor = self.pipeline._unpatchify_latents((patches - mean) / spread)
        return normal

    def _normal(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and spread of the patches' channels, (1, 4 · channels, 1, 1)."""
        vae = self.pipeline.vae
        variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        return vae.bn.running_mean.view(1, -1, 1, 1).to(like), variance.sqrt().to(like)

    def clean(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        return latents  # the pipeline has unpacked them, and undone what was normal

    def warnings(self, params: GenerationParams) -> list[str]:
        tokenizer, negative = self.pipeline.tokenizer, params.negative_prompt
        read = negative if self.runs_twice(params) else ""
        name, longest = self.spec.name, self._text_length
        sentences = chat.warnings(name, tokenizer, params.prompt, read, longest, enable_thinking=False)
        if self._distilled and params.guidance_scale > 1:
            sentences.append(f"The guidance scale has no effect: {name} is distilled, and draws without guidance.")
        if negative and not self.runs_twice(params):
            reason = "is distilled" if self._distilled else "runs without guidance at a scale of 1 or less"
            sentences.append(f"The negative prompt has no effect: {name} {reason}.")
        return sentences

    @property
    def _distilled(self) -> bool:
        return bool(self.pipeline.config.is_distilled)

    @property
    def _text_length(self) -> int:
        return int(min(self.pipeline.tokenizer.model_max_length, LONGEST_TEXT))
