"""Flux: CLIP and T5 text, a transformer of double- and single-stream blocks on packed latents, flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.base import Control, GenerationParams

from .flow import CELLS, FlowFamily, FlowModel

if TYPE_CHECKING:
    import torch

    from models.control import Steering


class FluxModel(FlowModel):
    """A guidance-distilled transformer takes the scale as an input; another runs a second, unconditional call."""

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer_2

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        embeddings = self._embed(params.prompt)
        if self.runs_twice(params):
            embeddings |= {f"negative_{name}": value for name, value in self._embed(params.negative_prompt).items()}
        return embeddings

    def _embed(self, prompt: str) -> dict[str, torch.Tensor | None]:
        tokens, pooled, _ = self.pipeline.encode_prompt(prompt, max_sequence_length=self.text_length)
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}  # (1, tokens, D), (1, D')

    def steering(self, control: Sequence[Control], params: GenerationParams) -> Steering:
        from models.control import FluxSteering

        given = control, self.controlnets.of(control), self.denoiser, self.device, self.pipeline.vae_scale_factor
        return FluxSteering(*given, pipeline=self.pipeline, guidance_scale=params.guidance_scale)

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        config, tensor = self.pipeline.transformer.config, self.blank
        tokens, text = height * width // CELLS, self.text_length

        given = {
            "hidden_states": tensor(1, tokens, config.in_channels),
            "encoder_hidden_states": tensor(1, text, config.joint_attention_dim),
            "pooled_projections": tensor(1, config.pooled_projection_dim),
            "timestep": tensor(1),
            "img_ids": tensor(tokens, 3),
            "txt_ids": tensor(text, 3),
        }
        return given | ({"guidance": tensor(1)} if config.guidance_embeds else {})

    def guidance(self, params: GenerationParams) -> dict[str, float]:
        scale = params.guidance_scale
        if self.distilled:
            return {"guidance_scale": scale}
        return {"true_cfg_scale": scale if self.runs_twice(params) else 1.0}


FLUX = FlowFamily(  # Black Forest Labs 2024
    name="flux",
    pipeline="FluxPipeline",
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    controlnets=True,
    model_class=FluxModel,
    steps=28,
    guidance_scale=3.5,
)
FLUX_SCHNELL = replace(
    FLUX,
    name="flux-schnell",
    traits={"guidance_embeds": False},
    steps=4,
    guidance_scale=0.0,  # distilled to few steps; a scale above 1 would run it twice a step
)
FLUX_DEV = replace(FLUX, name="flux-dev", traits={"guidance_embeds": True})
FLUX_FILL = replace(
    FLUX_DEV,
    name="flux-fill",
    pipeline="FluxFillPipeline",
    traits={"guidance_embeds": True, "in_channels": 384},
    steps=50,
    guidance_scale=30.0,
)
