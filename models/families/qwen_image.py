"""Qwen-Image: a language model reads the text, a transformer of joint blocks on packed latents, guidance in two calls.

The guided prediction keeps the length of that with text (Wu et al. 2025, "Qwen-Image Technical Report"). The
autoencoder is one of videos. A text is as long as it is: texts of different length are not drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.base import GenerationParams

from .flow import CELLS, FlowFamily, FlowModel

if TYPE_CHECKING:
    import torch

NATIVE = 1328  # pixels of a side, by the published list of sizes


class QwenImageModel(FlowModel):
    """The prompt stands in a template, whose beginning the transformer is not shown."""

    longest_read = 1024 + 34  # with the template's beginning; half of it is taken

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        embeddings: dict[str, torch.Tensor | None] = {"prompt_embeds": self._embed(params.prompt)}
        if self.runs_twice(params):
            embeddings["negative_prompt_embeds"] = self._embed(params.negative_prompt)
        return embeddings

    def _embed(self, prompt: str) -> torch.Tensor:
        """(1, tokens, D). One text is filled up by nothing, and needs no mask."""
        embedded: torch.Tensor = self.pipeline.encode_prompt(prompt, max_sequence_length=self.text_length)[0]
        return embedded

    def tokens(self, prompt: str) -> int:
        pipeline = self.pipeline
        written = pipeline.prompt_template_encode.format(prompt)
        return len(pipeline.tokenizer(written).input_ids) - int(pipeline.prompt_template_encode_start_idx)

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        config, tensor = self.pipeline.transformer.config, self.blank

        return {
            "hidden_states": tensor(1, height * width // CELLS, config.in_channels),
            "encoder_hidden_states": tensor(1, self.text_length, config.joint_attention_dim),
            "timestep": tensor(1),
            "img_shapes": [[(1, height // 2, width // 2)]],
        }

    @property
    def native_pixels(self) -> int:
        return NATIVE**2

    def guidance(self, params: GenerationParams) -> dict[str, float]:
        return {"true_cfg_scale": params.guidance_scale if self.runs_twice(params) else 1.0}

    def decodable(self, grid: torch.Tensor) -> torch.Tensor:
        mean, gain = self._normal(grid)
        return grid / gain + mean

    def encoded(self, latents: torch.Tensor) -> torch.Tensor:
        mean, gain = self._normal(latents)
        return (latents - mean) * gain

    def _normal(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is taken from each channel, and what it is multiplied by, (1, channels, 1, 1)."""
        import torch

        from cache.transfer import upload

        config = self.pipeline.vae.config
        mean, spread = (
            upload(torch.tensor(values).view(1, -1, 1, 1).to(like.dtype), like.device)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, 1.0 / spread


QWEN_IMAGE = FlowFamily(
    name="qwen-image",
    native_size=NATIVE,
    pipeline="QwenImagePipeline",
    text_encoders={"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
    traits={"guidance_embeds": False, "zero_cond_t": False},
    model_class=QwenImageModel,
    steps=50,
    guidance_scale=4.0,
)
