"""The text cache: a hit is what reading the text anew would give, and what it holds is bounded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache import NoCache
from models.base import Embedding, GenerationParams, Lora
from models.generation import LoadedModel
from models.text.encoded import TextCache, key_of
from tests.models.test_generation import PARAMS, ignore, pixels


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The number of rows of each call of the model's first text encoder."""
    calls: list[int] = []
    hook = model.pipeline.text_encoder.register_forward_hook(lambda module, inputs, output: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_a_text_is_read_once_and_the_pictures_are_the_same(family: str, request: pytest.FixtureRequest) -> None:
    model: LoadedModel = request.getfixturevalue(family)
    params = replace(PARAMS, prompt=f"a text of {family}", negative_prompt="rain", steps=1)
    with counted(model) as calls:
        first = model.generate(params, NoCache(), ignore)
        read = len(calls)
        second = model.generate(params, NoCache(), ignore)
        together = model.generate_together([params, replace(params, seeds=(7, 8))], NoCache(), lambda steps: None)
        assert len(calls) == read > 0
        model.generate(replace(params, prompt="another text"), NoCache(), ignore)
        assert len(calls) == 2 * read
    assert np.array_equal(pixels(first.images), pixels(second.images))
    assert len(together) == 2


def test_what_an_encoding_follows_from_is_in_the_key(tmp_path: Path) -> None:
    lora, word = tmp_path / "l.safetensors", tmp_path / "w.safetensors"
    for path in (lora, word):
        path.write_bytes(b"1")
    params = GenerationParams(prompt="a")
    changes: list[dict[str, Any]] = [
        {"prompt": "b"},
        {"negative_prompt": "b"},
        {"clip_skip": 2},
        {"loras": (Lora(name="l", path=lora),)},
        {"loras": (Lora(name="l", path=lora, weight=0.5),)},
        {"embeddings": (Embedding(name="w", path=word),)},
    ]
    whole, *others = [key_of(replace(params, **change), guided=True) for change in ({}, *changes)]
    assert len({whole, key_of(params, guided=False), *others}) == len(changes) + 2
    assert key_of(replace(params, steps=3, seeds=(1, 2), guidance_scale=2.0), guided=True) == whole
    adapted = replace(params, loras=(Lora(name="l", path=lora),))
    before = key_of(adapted, guided=True)
    os.utime(lora, ns=(1, 1))  # exchanged for another file
    assert key_of(adapted, guided=True) != before


def made(numbers: int) -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(1, numbers), "b": torch.zeros(1, numbers)}  # 8 bytes a number


def test_the_entries_are_bounded_and_the_oldest_go() -> None:
    texts = TextCache(entries=2)
    for key in "abac":
        texts.get(key, lambda: made(1))
    assert (len(texts), texts.hits, texts.misses) == (2, 1, 3)
    texts.get("a", lambda: pytest.fail("it was used last"))
    texts.get("b", lambda: made(1))
    assert (texts.hits, texts.misses) == (2, 4)


def test_the_bytes_are_bounded() -> None:
    texts = TextCache(most_bytes=100)
    for key in "abc":
        texts.get(key, lambda: made(5))
    assert (len(texts), texts.bytes) == (2, 80)
    large = made(50)
    assert texts.get("d", lambda: large) is large
    assert (len(texts), texts.bytes) == (2, 80)  # too large to be kept, and no reason to drop the others


def test_a_text_that_cannot_be_read_is_not_kept() -> None:
    texts = TextCache()

    def fails() -> dict[str, torch.Tensor]:
        raise ValueError("unreadable")

    for _ in range(2):
        with pytest.raises(ValueError, match="unreadable"):
            texts.get("a", fails)
    assert (len(texts), texts.misses) == (0, 2)
