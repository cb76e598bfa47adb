"""Every kind of checkpoint: dropped into a folder, it is loaded as the numbers that it stands for, or refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from transformers.initialization import no_init_weights

from cache import NoCache
from models.base import GenerationParams
from models.embedded import FOLDER
from models.families import FAMILIES
from models.generation import LoadedModel
from models.libraries import quiet
from models.loading.header import read_header
from models.loading.shapes import configurations
from models.loading.tokenizers import T5_FOLDER, clip_tokenizer
from models.sampling.samplers import build
from tests.compatibility.checkpoint_files import CHECKPOINTS
from tests.compatibility.checkpoint_rows import BESIDE, CheckpointRow
from tests.compatibility.layouts import in_folders, only
from tests.models import original
from tests.models.loading.quantising import Tensors, narrow_flux, save_gguf, save_scaled
from tests.models.original import listed, narrow_networks

PARAMS = GenerationParams(prompt="a forest", width=64, height=64, steps=2, guidance_scale=3.0, seeds=(7,))
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "fp8 e4m3fn": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
}


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with narrow_flux(128):
        yield


def written(tensors: Tensors, stem: Path, precision: str, header: dict[str, str] | None = None) -> Tensors:
    """Saves them beside `stem` in that precision; the numbers that the file stands for."""
    file = stem.with_suffix(".safetensors")
    if precision.startswith("GGUF"):
        return save_gguf(tensors, stem.with_suffix(".gguf"), precision.removeprefix("GGUF "))
    if precision.startswith("scaled fp8"):
        return save_scaled(tensors, file, "new" if precision.endswith("newer names") else "old")
    kept = {
        name: (tensor.to(DTYPES[precision]) if tensor.is_floating_point() else tensor).clone()
        for name, tensor in tensors.items()
    }
    original.save(kept, file, header)
    return {name: tensor.float() for name, tensor in kept.items()}


def saved(row: CheckpointRow, folder: Path) -> Tensors:
    """The row's file or folder, `ink`, and what lies beside it; the numbers of all, by role and name."""
    made = narrow_networks(row.model)
    tensors = row.layout(made)
    if row.layout is in_folders:
        save_folder(made, folder / "ink")
        return {name: tensor.half().float() for name, tensor in tensors.items()}
    meant = written(tensors, folder / "ink", row.precision, dict(row.header))
    for role, precision in row.beside.items():
        numbers = written((BESIDE | row.others)[role](made), folder / f"part {role}", precision)
        meant |= {f"{role} {name}": tensor for name, tensor in taken(role, numbers).items()}
    (folder / T5_FOLDER).mkdir(parents=True)
    shutil.copy(FOLDER / "tiny-flux" / "tokenizer_2" / "tokenizer.json", folder / T5_FOLDER)
    return meant


def save_folder(made: Any, folder: Path) -> None:
    networks = {name: copy.deepcopy(network).half() for name, network in vars(made).items()}
    scheduler = PNDMScheduler(**configurations("sd15", {})["scheduler/scheduler_config.json"])
    parts = {**networks, "tokenizer": clip_tokenizer("<|endoftext|>"), "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder, variant="fp16")


@cache
def blank(family: str) -> SimpleNamespace:
    """Plain networks of the family, to be filled."""
    networks = copy.deepcopy(narrow_networks(family))
    for network in vars(networks).values():
        network.eval()  # T5 drops out otherwise
    return networks


def unpacked(family: str, pipeline: Any) -> SimpleNamespace:
    """Plain networks with the numbers of those that were loaded; GGUF's blocks by the package's own formulas."""

    def numbers(tensor: Any) -> torch.Tensor:
        if not hasattr(tensor, "quant_type"):
            return tensor  # type: ignore[no-any-return]
        blocks = tensor.as_tensor().numpy()
        return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(tensor.quant_type)))

    networks = blank(family)
    for component, network in vars(networks).items():
        loaded = getattr(pipeline, component).state_dict()
        network.load_state_dict({name: numbers(tensor) for name, tensor in loaded.items()})
    return networks


def named(row: CheckpointRow, networks: Any) -> Tensors:
    """The networks' numbers by the names that they have in the row's files."""
    tensors = dict(row.layout(networks))
    for role in row.beside:
        tensors |= {
            f"{role} {name}": tensor for name, tensor in taken(role, (BESIDE | row.others)[role](networks)).items()
        }
    return tensors


def taken(role: str, tensors: Tensors) -> Tensors:
    """What is read of a file that lies beside: of a whole checkpoint, its autoencoder."""
    return only(lambda _: tensors, "first_stage_model.")(None) if role == "vae4" else tensors


def drawn(model: LoadedModel) -> np.ndarray:
    made = model.generate(PARAMS, NoCache(), lambda step: None)
    return np.asarray(made.images[0]).astype(int)


def name_of(row: CheckpointRow) -> str:
    return f"{row.model} {row.kind}"


@pytest.mark.parametrize("row", [row for row in CHECKPOINTS if not row.refused], ids=name_of)
def test_a_checkpoint_is_loaded_as_the_numbers_that_it_stands_for(row: CheckpointRow, tmp_path: Path) -> None:
    meant = saved(row, tmp_path)
    found, _ = listed(tmp_path)
    spec = found["ink"]
    family = FAMILIES[row.model]
    assert spec.family == row.model
    assert isinstance(spec.source, Path)
    assert row.key in (meant if spec.source.is_dir() else read_header(spec.source))
    with no_init_weights():  # half of the time, for numbers that are replaced
        model: Any = family.load(spec, "cpu")
    with quiet():
        schedule = build(model.pipeline.scheduler, family.table, None, None, steps=4, seeds=[0])
    assert schedule.config.get("prediction_type", "epsilon") == row.prediction
    assert row.scheduler in ("", type(model.pipeline.scheduler).__name__)
    assert bool(row.scheduler) == (spec.distilled is not None)
    assert row.terminal_snr == (hasattr(schedule, "alphas_cumprod") and float(schedule.alphas_cumprod[-1]) < 1e-6)

    packed = row.precision.startswith("GGUF")
    networks = unpacked(row.model, model.pipeline) if packed or row.drawn else model.pipeline
    tensors = named(row, networks)
    assert tensors.keys() == meant.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, meant[name])] == []

    if row.drawn:
        pipeline = type(model.pipeline)(**{**model.pipeline.components, **vars(networks)})
        expected = drawn(LoadedModel(family.model(spec, pipeline)))
        assert np.abs(drawn(LoadedModel(model)) - expected).max() <= 1
        assert expected.std() > 0


@pytest.mark.parametrize("row", [row for row in CHECKPOINTS if row.refused], ids=name_of)
def test_a_checkpoint_that_is_not_served_says_why(row: CheckpointRow, tmp_path: Path) -> None:
    tensors = row.layout(narrow_networks(row.model) if row.model else None)
    assert row.key in tensors or not tensors
    original.write_hollow(tmp_path / "ink.safetensors", tensors)
    assert listed(tmp_path) == ({}, {"ink": row.said})
