"""Every kind of LoRA and embedding: its picture beside that of weights merged by hand, or its refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache import NoCache
from models.adapters.lora import applied, read
from models.base import Embedding, GenerationParams, Lora, ModelSpec, Step
from models.errors import AdapterFailed
from models.families import FAMILIES
from models.generation import LoadedModel
from models.text.encoded import TextCache
from tests.compatibility.adapters import Written, vectors
from tests.compatibility.embedding_files import EMBEDDINGS, EmbeddingRow
from tests.compatibility.lora_files import LORAS, LoraRow
from tests.compatibility.rows import FileRow

PARAMS = GenerationParams(prompt="a forest", width=64, height=64, steps=2, guidance_scale=3.0, seeds=(7,))
WEIGHT = 0.7
WORD = "snowstorm"  # its letters are the tiny tokenizers' words
Models = Callable[[str], LoadedModel]


def ignore(step: Step) -> None:
    """A step hook that wants nothing."""


@pytest.fixture(scope="module")
def models(family_folders: dict[str, Path]) -> Models:
    @cache
    def loaded(name: str) -> LoadedModel:
        spec = ModelSpec(name=name, family=name, source=family_folders[name])
        return LoadedModel(FAMILIES[name].load(spec, "cpu"))

    return loaded


@pytest.fixture(scope="module")
def plain(models: Models) -> Callable[[str], np.ndarray]:
    return cache(lambda name: drawn(models(name), PARAMS)[0])


def drawn(model: LoadedModel, params: GenerationParams) -> tuple[np.ndarray, list[str]]:
    made = model.generate(params, NoCache(), ignore)
    return np.asarray(made.images[0]).astype(int), made.warnings


def saved(folder: Path, tensors: dict[str, torch.Tensor], spoilt: str = "", header: Any = None) -> Path:
    """spoilt: NaN in the first tensor, the file cut short, or the first pair without its half."""
    path = folder / "ink.safetensors"
    first = next(iter(tensors))
    if spoilt == "NaN":
        tensors[first] = tensors[first] * torch.nan
    elif spoilt == "half":
        del tensors[first.replace("lora_down", "lora_up")]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=dict(header or {}))
    if spoilt == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    return path


@contextmanager
def merged(model: LoadedModel, changes: Written) -> Iterator[None]:
    """The model with WEIGHT times each change added to its own weights, in float64."""
    before = [(parameter, parameter.data) for module, _, _ in changes.changes for parameter in module.parameters()]
    texts, model._texts = model._texts, TextCache()  # read by these encoders alone
    for module, delta, bias in changes.changes:
        module.weight.data = (module.weight.data.double() + WEIGHT * torch.from_numpy(delta)).float()
        if bias is not None and module.bias is not None:
            module.bias.data = (module.bias.data.double() + WEIGHT * torch.from_numpy(bias)).float()
    try:
        yield
    finally:
        model._texts = texts
        for parameter, data in reversed(before):
            parameter.data = data


def check_layers(model: LoadedModel, lora: Lora, written: Written) -> None:
    """Each layer alone, with the file and with a weight merged by hand, on the same random input."""
    pipeline: Any = model.pipeline  # type: ignore[attr-defined]
    expected = []
    for module, delta, bias in written.changes:
        by_hand = copy.deepcopy(module).double()
        by_hand.weight.data += WEIGHT * torch.from_numpy(delta)
        if bias is not None and by_hand.bias is not None:
            by_hand.bias.data += WEIGHT * torch.from_numpy(bias)
        shape = {1: (2, len(delta), 8), 2: (2, delta.shape[-1]), 4: (2, delta.shape[1 % delta.ndim], 8, 8)}[delta.ndim]
        x = torch.randn(
            shape if isinstance(module, torch.nn.GroupNorm | torch.nn.Linear | torch.nn.Conv2d) else (2, len(delta))
        )
        expected.append((module, x, by_hand(x.double())))
    with applied(pipeline, [read(lora)]):
        for module, x, y in expected:
            assert (module(x) - y).abs().max() < 1e-4 * y.abs().max()


def name_of(row: FileRow) -> str:
    return f"{row.group} {row.kind}, {row.model}"


@pytest.mark.parametrize("row", LORAS, ids=name_of)
def test_a_lora_draws_what_merged_weights_draw(
    row: LoraRow, models: Models, plain: Callable[[str], np.ndarray], tmp_path: Path
) -> None:
    model = models(row.model)
    written = Written(row, model.pipeline)
    assert row.key in written.tensors
    lora = Lora(name="ink", path=saved(tmp_path, written.tensors, row.spoilt, row.header), weight=WEIGHT)
    params = replace(PARAMS, loras=(lora,))
    if row.refused:
        with pytest.raises(AdapterFailed) as failure:
            drawn(model, params)
        assert str(failure.value) == row.said
        return
    with torch.no_grad():
        check_layers(model, lora, written)
    ours, warnings = drawn(model, params)
    with merged(model, written):
        expected, _ = drawn(model, PARAMS)
    assert warnings == ([row.said] if row.said else [])
    assert np.abs(ours - expected).max() <= 1
    assert (expected != plain(row.model)).any()


@pytest.mark.parametrize("row", EMBEDDINGS, ids=name_of)
def test_an_embedding_of_a_words_vectors_draws_that_word(row: EmbeddingRow, models: Models, tmp_path: Path) -> None:
    model = models(row.model)
    tensors = vectors(row, model.pipeline, WORD)
    if row.bundled:
        path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        out, inner = model.pipeline.unet.get_submodule(path).weight.shape  # type: ignore[attr-defined]
        tensors |= {
            f"unet.{path}.lora_A.weight": torch.ones(1, inner),
            f"unet.{path}.lora_B.weight": torch.zeros(out, 1),
        }
    path = saved(tmp_path, tensors, row.spoilt)
    params = replace(PARAMS, prompt="a ink forest")
    if row.bundled:
        params = replace(params, loras=(Lora(name="ink", path=path),))
    else:
        params = replace(params, embeddings=(Embedding(name="ink", path=path),))
    if row.refused:
        with pytest.raises(AdapterFailed) as failure:
            drawn(model, params)
        assert str(failure.value) == row.said
        return
    count = next(iter(row.tensors.values()))[0]
    ours, _ = drawn(model, params)
    expected, _ = drawn(model, replace(PARAMS, prompt=f"a {WORD[:count]} forest"))
    assert np.abs(ours - expected).max() <= 1
    assert (expected != drawn(model, replace(PARAMS, prompt="a ink forest"))[0]).any()
