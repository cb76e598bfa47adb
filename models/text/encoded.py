"""Encoded texts, kept: most requests come again with a prompt that was read a moment ago.

What is kept is what the encoders made, so that a hit is bit-identical to reading the text anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from models.base import GenerationParams

if TYPE_CHECKING:
    import torch

ENTRIES = 256
BYTES = 64 * 2**20  # on the model's device: about 16 prompts of Flux, with 512 tokens of 4096 numbers, or 160 of SDXL


class TextCache:
    """Conditioning (see `Share`) by what it was made from; the one used longest ago goes when there is no room."""

    def __init__(self, entries: int = ENTRIES, most_bytes: int = BYTES) -> None:
        self._entries = entries
        self._most = most_bytes
        self._kept: OrderedDict[Hashable, Mapping[str, torch.Tensor]] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, encode: Callable[[], Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        """The conditioning of `key`; made by `encode`, whose errors pass, if it is not there. Not to be written to."""
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        made = encode()
        size = _bytes(made)
        if size <= self._most:
            self._kept[key] = made
            self.bytes += size
        while self.bytes > self._most or len(self._kept) > self._entries:
            _, dropped = self._kept.popitem(last=False)
            self.bytes -= _bytes(dropped)
        return made


def key_of(params: GenerationParams) -> Hashable:
    """All that a text's encoding follows from, within one model.

    Adapters change the encoders and the words; their files count as they are now, since an operator may exchange them.
    """
    files = [*(lora.path for lora in params.loras), *(embedding.path for embedding in params.embeddings)]
    return (
        params.prompt,
        params.negative_prompt,
        params.guidance_scale > 1,
        params.clip_skip,
        params.loras,
        params.embeddings,
        tuple(map(_version, files)),
    )


def _version(path: Path) -> tuple[int, int]:
    """Changes when the file is exchanged."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _bytes(conditioning: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in conditioning.values())
