"""Tokenizers for models that come as files of weights alone."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from models.base import Hub, ModelSpec
from models.errors import LoadFailed

from .hub import fetch_file

T5 = Hub("google-t5/t5-small", "df1b051c49625cf57a3d0d8d3863ed4d13564fe4")  # the tokenizer of every T5; 1.4 MB
_MERGES = 48894  # of the file's lines; the rest were never used
T5_FOLDER = Path("tokenizers") / "t5"  # within the folder of checkpoints
_T5_TOKENS = {"flux-schnell": 256}  # as published; 512 for the others


def tokenizers(spec: ModelSpec, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Those that go with the text encoders of these configurations (`shapes.py`), by component. Raises LoadFailed."""
    made: dict[str, Any] = {}
    for path, config in files.items():
        if path.startswith("text_encoder"):
            component = path.partition("/")[0].replace("text_encoder", "tokenizer")
            padding = "!" if config.get("pad_token_id") == 0 else "<|endoftext|>"
            made[component] = _t5(spec, component) if config["model_type"] == "t5" else clip_tokenizer(padding)
    return made


def clip_tokenizer(padding: str) -> Any:
    """CLIP's, from the merges that OpenAI's package brings. padding: the word that fills a text up to 77."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_words()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=77)


@cache
def _clip_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces → their numbers, and the pairs in the order in which they are joined (Radford et al. 2021)."""
    from tokenizers.pre_tokenizers import ByteLevel

    file = distribution("openai-clip").locate_file("clip/bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(str(file), "rt", encoding="utf-8") as opened:
        lines = opened.read().split("\n")
    letters = sorted(ByteLevel.alphabet())
    merges = [(left, right) for left, right in map(str.split, lines[1 : _MERGES + 1])]
    words = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    return {word: at for at, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def _t5(spec: ModelSpec, component: str) -> Any:
    from transformers import T5Tokenizer

    file = spec.parts.get(component, T5_FOLDER) / "tokenizer.json"
    if not file.is_file():
        try:
            file = fetch_file(spec, T5, "tokenizer.json")
        except LoadFailed as error:
            raise LoadFailed(
                f"T5's tokenizer is not on this machine. {error} Without a network, put tokenizer.json of "
                f"{T5.repository}, or of the folder tokenizer_2 of any Flux, at {file}."
            ) from error
    longest = _T5_TOKENS.get(spec.family, 512)
    return T5Tokenizer.from_pretrained(file.parent, local_files_only=True, model_max_length=longest)
