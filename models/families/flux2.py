"""FLUX.2: one language model reads the text, a transformer of double- and single-stream blocks, normalised latents.

Three layers of the language model are read, 512 tokens whatever the prompt's length. The autoencoder's 32 channels are
two by two a token, 128 numbers, each with its own mean and spread (Black Forest Labs 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.base import GenerationParams
from models.text import chat

from .flow import CELLS, FlowFamily, FlowModel

if TYPE_CHECKING:
    import torch

    from models.layout import Layout


class Flux2Model(FlowModel):
    """The base models run a second, unconditional call a step; the distilled ones draw in four steps, without."""

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        embeddings: dict[str, torch.Tensor | None] = {"prompt_embeds": self._embed(params.prompt)}
        if self.runs_twice(params):
            embeddings["negative_prompt_embeds"] = self._embed(params.negative_prompt)
        return embeddings

    def _embed(self, prompt: str) -> torch.Tensor:
        """(1, tokens, 3 · width of the language model)"""
        embedded: torch.Tensor = self.pipeline.encode_prompt(prompt, max_sequence_length=self.text_length)[0]
        return embedded

    @property
    def layout(self) -> Layout:
        from models.layout import PackedInTime

        return PackedInTime()

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        config, tensor = self.pipeline.transformer.config, self.blank
        tokens, text = height * width // CELLS, self.text_length

        return {
            "hidden_states": tensor(1, tokens, config.in_channels),
            "encoder_hidden_states": tensor(1, text, config.joint_attention_dim),
            "timestep": tensor(1),
            "img_ids": tensor(tokens, 4),
            "txt_ids": tensor(text, 4),
        }

    @property
    def distilled(self) -> bool:
        return bool(self.pipeline.config.is_distilled)

    def clean(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        return latents  # the pipeline itself has unpacked them, and undone what was normal

    def decodable(self, grid: torch.Tensor) -> torch.Tensor:
        mean, spread = self._normal(grid)
        latents: torch.Tensor = self.pipeline._unpatchify_latents(self.pipeline._patchify_latents(grid) * spread + mean)
        return latents

    def encoded(self, latents: torch.Tensor) -> torch.Tensor:
        mean, spread = self._normal(latents)
        grid: torch.Tensor = self.pipeline._unpatchify_latents(
            (self.pipeline._patchify_latents(latents) - mean) / spread
        )
        return grid

    def _normal(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and spread of a patch's numbers, (1, 4 · channels, 1, 1)."""
        vae = self.pipeline.vae
        variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        return vae.bn.running_mean.view(1, -1, 1, 1).to(like), variance.sqrt().to(like)

    def tokens(self, prompt: str) -> int:
        return chat.tokens(self.pipeline.tokenizer, prompt, thinking=False)

    def warnings(self, params: GenerationParams) -> list[str]:
        sentences = super().warnings(params)
        if self.distilled and params.guidance_scale > self.unguided:
            sentences.append(f"The guidance scale has no effect: {self.spec.name} is guidance-distilled.")
        return sentences


FLUX2_KLEIN = FlowFamily(
    name="flux2-klein",
    pipeline="Flux2KleinPipeline",
    text_encoders={"text_encoder": "Qwen3ForCausalLM"},
    settings={"is_distilled": True},
    model_class=Flux2Model,
    steps=4,
    guidance_scale=1.0,
    draws_over=False,  # what diffusers' pipelines do with pictures is take them for references
)
FLUX2_KLEIN_BASE = replace(
    FLUX2_KLEIN, name="flux2-klein-base", settings={"is_distilled": False}, steps=50, guidance_scale=4.0
)
