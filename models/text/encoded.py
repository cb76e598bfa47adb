"""Encoded texts, kept: most requests come again with a prompt that was read a moment ago.

What is kept is what the encoders made, so that a hit is bit-identical to reading the text anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING

from models.base import GenerationParams
from models.loading.checkpoints import stamp_of
from models.recent import Recent

if TYPE_CHECKING:
    import torch

ENTRIES = 256
BYTES = 64 * 2**20  # on the model's device: about 16 prompts of Flux, with 512 tokens of 4096 numbers, or 160 of SDXL


class TextCache:
    """Conditioning (see `Share`) by what it was made from; the one used longest ago goes when there is no room."""

    def __init__(self, entries: int = ENTRIES, most_bytes: int = BYTES) -> None:
        self._kept: Recent[Mapping[str, torch.Tensor]] = Recent(most_bytes, entries)
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        return self._kept.bytes

    def get(self, key: Hashable, encode: Callable[[], Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        """The conditioning of `key`; made by `encode`, whose errors pass, if it is not there. Not to be written to."""
        if (known := self._kept.get(key)) is not None:
            self.hits += 1
            return known
        self.misses += 1
        made = encode()
        self._kept.put(key, made, sum(tensor.nbytes for tensor in made.values()))
        return made


def key_of(params: GenerationParams, *, guided: bool) -> Hashable:
    """All that a text's encoding follows from, within one model. guided: whether the negative prompt is encoded too.

    Adapters change the encoders and the words; their files count as they are now, since an operator may exchange them.
    """
    files = [*(lora.path for lora in params.loras), *(embedding.path for embedding in params.embeddings)]
    return (
        params.prompt,
        params.negative_prompt,
        guided,
        params.clip_skip,
        params.loras,
        params.embeddings,
        stamp_of(*files),
    )
