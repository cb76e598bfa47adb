"""Stable Diffusion 3.5: two CLIPs and T5, a transformer of joint blocks on latents, flow matching (Esser et al. 2024).

Guidance runs both halves in one batch. T5 may be missing: the pipeline then has zeros in the place of its states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from models.base import GenerationParams

from .flow import FlowFamily, FlowModel

if TYPE_CHECKING:
    import torch

    from models.layout import Layout


class StableDiffusion3Model(FlowModel):
    """The CLIPs read the beginning of a prompt, T5 reads most of it."""

    longest_text: ClassVar[int] = 256

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer_3 or self.pipeline.tokenizer

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        positive, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=params.prompt,
            prompt_2=None,
            prompt_3=None,
            negative_prompt=params.negative_prompt,
            do_classifier_free_guidance=self.runs_twice(params),
            max_sequence_length=self._t5_length,
        )  # (1, tokens, D), pooled (1, D'); None for the negative ones without guidance
        return {
            "prompt_embeds": positive,
            "negative_prompt_embeds": negative,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    @property
    def _t5_length(self) -> int:
        return self.longest_text if self.pipeline.tokenizer_3 is None else self.text_length

    @property
    def layout(self) -> Layout:
        from models.layout import Spatial

        trained = int(self.pipeline.scheduler.config.num_train_timesteps)
        return Spatial("hidden_states", self.pipeline.patch_size, trained)

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        config, tensor = self.pipeline.transformer.config, self.blank
        text = self.pipeline.tokenizer_max_length + self._t5_length

        return {
            "hidden_states": tensor(1, config.in_channels, height, width),
            "encoder_hidden_states": tensor(1, text, config.joint_attention_dim),
            "pooled_projections": tensor(1, config.pooled_projection_dim),
            "timestep": tensor(1),
        }

    def rows(self, *, guided: bool) -> int:
        return 2 if guided else 1


SD35 = FlowFamily(  # 3.5 large and medium, and 3 medium (Stability AI 2024)
    name="sd3.5",
    pipeline="StableDiffusion3Pipeline",
    text_encoders={
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    extras={"image_encoder": None, "feature_extractor": None},
    model_class=StableDiffusion3Model,
    steps=28,
    guidance_scale=3.5,
)
