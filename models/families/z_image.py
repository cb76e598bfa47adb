"""Z-Image: one language model reads the text, a transformer of single-stream blocks over image and text together.

Image and text are each refined by two blocks first. The transformer takes and gives a list of items, and time from 0,
pure noise, to 1; the text's tokens are as many as the prompt has, filled up to a multiple of 32 (Tongyi Lab 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.base import GenerationParams
from models.text import chat

from .flow import CELLS, KEPT_STREAMS, FlowFamily, FlowModel

if TYPE_CHECKING:
    import torch

    from cache.prediction import Prediction
    from models.layout import Layout

NATIVE = 1024  # pixels of a side
FILLED = 32  # the transformer fills both streams up to a multiple of so many tokens


class ZImageModel(FlowModel):
    """Guidance at any scale s above 0: p + s (p - n), with both predictions of one batch, that with text first."""

    unguided = 0.0

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        embeddings = self._embed("prompt", params.prompt)
        if self.runs_twice(params):
            embeddings |= self._embed("negative_prompt", params.negative_prompt)
        return embeddings

    def _embed(self, name: str, prompt: str) -> dict[str, torch.Tensor | None]:
        """(1, tokens, D), filled up as the transformer will, and how many of them are the prompt's."""
        import torch
        from torch.nn.functional import pad

        (tokens,) = self.pipeline._encode_prompt([prompt], max_sequence_length=self.text_length)
        filled = pad(tokens, (0, 0, 0, -len(tokens) % FILLED))
        return {f"{name}_embeds": filled[None], f"{name}_tokens": torch.tensor([len(tokens)])}

    def texts(self, rows: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        return {
            f"{name}_embeds": [
                row[:tokens]
                for row, tokens in zip(rows[f"{name}_embeds"], rows[f"{name}_tokens"].tolist(), strict=True)
            ]
            for name in ("prompt", "negative_prompt")
            if f"{name}_embeds" in rows
        }

    @property
    def layout(self) -> Layout:
        from models.layout import Listed

        return Listed()

    def prediction(self, scheduler: Any) -> Prediction:
        from cache.prediction import ReversedFlow

        return ReversedFlow()

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        config, tensor = self.pipeline.transformer.config, self.blank

        return {
            "x": [tensor(config.in_channels, 1, height, width)],
            "t": tensor(1),
            "cap_feats": [tensor(self.text_length, config.cap_feat_dim)],
        }

    def rows(self, *, guided: bool) -> int:
        return 2 if guided else 1

    @property
    def kept_cells(self) -> int:
        return KEPT_STREAMS * int(self.pipeline.transformer.config.dim) // CELLS

    @property
    def native_pixels(self) -> int:
        return NATIVE**2

    def tokens(self, prompt: str) -> int:
        return chat.tokens(self.pipeline.tokenizer, prompt, thinking=True)


Z_IMAGE = FlowFamily(
    name="z-image",
    pipeline="ZImagePipeline",
    text_encoders={"text_encoder": "Qwen3Model"},
    model_class=ZImageModel,
    view={"takes": ("hidden_states",)},
    steps=50,
    guidance_scale=4.0,
)
Z_IMAGE_TURBO = replace(Z_IMAGE, name="z-image-turbo", steps=9, guidance_scale=0.0)
