"""Chroma: T5 text with a mask, Flux's blocks modulated by one small network, guidance in two calls (Rock 2025).

Of the tokens that fill a text up, the transformer is shown the first alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.base import GenerationParams, ModelSpec
from models.sampling.samplers import Sampler

from .flow import CELLS, FlowFamily, FlowModel

if TYPE_CHECKING:
    import torch

    from cache import Denoiser
    from cache.patching import Shadow


class ChromaModel(FlowModel):
    """Texts are filled up to one length, so that those of different length are drawn together."""

    def __init__(self, spec: ModelSpec, pipeline: Any, denoiser: Denoiser, choices: Mapping[str, Sampler]) -> None:
        super().__init__(spec, pipeline, denoiser, choices)
        if "guidance_embeds" not in pipeline.transformer.config:  # diffusers' ChromaInpaintPipeline asks for it
            pipeline.transformer.register_to_config(guidance_embeds=False)

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        embeds, _, mask, negative, _, negative_mask = self.pipeline.encode_prompt(
            params.prompt,
            params.negative_prompt,
            do_classifier_free_guidance=self.runs_twice(params),
            max_sequence_length=self.text_length,
        )  # (1, tokens, D), (1, tokens); None for the negative ones without guidance
        return {
            "prompt_embeds": embeds,
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": negative,
            "negative_prompt_attention_mask": negative_mask,
        }

    def shadows(self) -> Sequence[Shadow]:
        """The host would wait for an embedding that each call makes on the CPU."""
        from cache.transfer import upload

        embedding = self.pipeline.transformer.time_text_embed
        own: Callable[[torch.Tensor], torch.Tensor] = embedding.guidance_proj
        return [(embedding, "guidance_proj", lambda guidance: upload(own(guidance), self.device))]

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        config, tensor = self.pipeline.transformer.config, self.blank
        tokens, text = height * width // CELLS, self.text_length

        return {
            "hidden_states": tensor(1, tokens, config.in_channels),
            "encoder_hidden_states": tensor(1, text, config.joint_attention_dim),
            "attention_mask": tensor(1, text + tokens),
            "timestep": tensor(1),
            "img_ids": tensor(tokens, 3),
            "txt_ids": tensor(text, 3),
        }


CHROMA = FlowFamily(
    name="chroma",
    pipeline="ChromaPipeline",
    text_encoders={"text_encoder": "T5EncoderModel"},
    extras={"image_encoder": None, "feature_extractor": None},
    model_class=ChromaModel,
    steps=40,
    guidance_scale=3.0,
)
