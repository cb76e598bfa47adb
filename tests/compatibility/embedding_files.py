"""Kinds of textual inversion, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.compatibility.rows import FileRow, Group


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRow(FileRow):
    """`tensors`: key → (vectors, width); a width of 0 is that of the model's own encoder of that place."""

    group: Group = "Embedding"
    tensors: Mapping[str, tuple[int, int]]
    dtype: str = "float32"
    bundled: bool = False
    spoilt: str = ""


_WIDE = (
    "The embedding 'ink' cannot be used with this model: {} "
    "Take one that was trained for it, or leave its name out of the prompts."
)


def _embedding(kind: str, model: str, *tensors: tuple[str, int, int], **more: object) -> EmbeddingRow:
    shapes = {key: (vectors, width) for key, vectors, width in tensors}
    return EmbeddingRow(kind=kind, model=model, key=tensors[0][0], tensors=shapes, **more)  # type: ignore[arg-type]


EMBEDDINGS: tuple[EmbeddingRow, ...] = (
    _embedding("AUTOMATIC1111", "sd15", ("emb_params", 2, 0)),
    _embedding("AUTOMATIC1111, float16", "sd15", ("emb_params", 3, 0), dtype="float16"),
    _embedding("diffusers, the token as key", "sd15", ("<style>", 1, 0)),
    _embedding("ComfyUI", "sd15", ("clip_l", 2, 0)),
    _embedding("AUTOMATIC1111", "sd21", ("emb_params", 2, 0)),
    _embedding("kohya, OneTrainer: both encoders", "sdxl", ("clip_l", 2, 0), ("clip_g", 2, 0)),
    _embedding("Replicate: both encoders", "sdxl", ("text_encoders_0", 2, 0), ("text_encoders_1", 2, 0)),
    _embedding("in a LoRA (bundle_emb)", "sd15", ("bundle_emb.ink.string_to_param.*", 2, 0), bundled=True),
    _embedding(
        "in a LoRA of OneTrainer (bundle_emb)",
        "sdxl",
        ("bundle_emb.ink.clip_l", 2, 0),
        ("bundle_emb.ink.clip_g", 2, 0),
        bundled=True,
    ),
    _embedding(
        "made for SDXL",
        "sd15",
        ("clip_l", 2, 768),
        ("clip_g", 2, 1280),
        refused=True,
        said=_WIDE.format("it holds vectors for two text encoders, and this model has one."),
    ),
    _embedding(
        "made for Stable Diffusion 1.5",
        "sdxl",
        ("emb_params", 2, 768),
        refused=True,
        said=_WIDE.format("it does not hold vectors for this model's 2 text encoder(s)."),
    ),
    _embedding(
        "made for Stable Diffusion 2.1",
        "sd15",
        ("emb_params", 2, 1024),
        refused=True,
        said=_WIDE.format("its vectors have 1024 numbers, this model's words 16."),
    ),
    _embedding(
        "NaN",
        "sd15",
        ("emb_params", 2, 0),
        spoilt="NaN",
        refused=True,
        said=_WIDE.format("its vectors hold numbers that are not finite."),
    ),
    _embedding(
        "cut short",
        "sd15",
        ("emb_params", 2, 0),
        spoilt="cut",
        refused=True,
        said=_WIDE.format(
            "its file cannot be read: Error while deserializing header: incomplete metadata, file not fully covered."
        ),
    ),
)
