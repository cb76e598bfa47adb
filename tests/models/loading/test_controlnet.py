"""ControlNets from files and folders: which fit a model, and the sentence on each that does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, FluxControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

from models.base import Control
from models.errors import ControlFailed
from models.generation import LoadedModel
from models.libraries import quiet
from models.loading.controlnet import find, load
from tests.models.original import unet_name

CPU = torch.device("cpu")
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(
    sd: LoadedModel, sdxl: LoadedModel, flux: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Random ControlNets in diffusers' folders, by the model that they were made for."""
    folder = tmp_path_factory.mktemp("controlnets")
    torch.manual_seed(6)
    with quiet():
        networks = {
            "sd": ControlNetModel.from_unet(sd.pipeline.unet),
            "sdxl": ControlNetModel.from_unet(sdxl.pipeline.unet),
            "flux": FluxControlNetModel.from_transformer(
                flux.pipeline.transformer, 1, 0, attention_head_dim=8, num_attention_heads=2
            ),
        }
        for name, network in networks.items():
            network.save_pretrained(folder / name)
    return {name: folder / name for name in networks}


def loaded(path: Path, model: LoadedModel) -> Any:
    control = Control(name="mine", path=path, image=Image.new("RGB", (8, 8)))
    with quiet():
        return load(
            find(control), model.pipeline.components.get("unet") or model.pipeline.transformer, torch.float32, CPU
        )


def original(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ControlNet of four levels of two layers under CompVis's names, as its authors publish them."""
    names = {"conv_in": "0", "conv_out": "14"} | {f"blocks.{index}": str(2 * index + 2) for index in range(6)}
    tensors = {}
    for key, tensor in load_file(path).items():
        if key.startswith("controlnet_cond_embedding."):
            layer, _, leaf = key.removeprefix("controlnet_cond_embedding.").rpartition(".")
            named = f"input_hint_block.{names[layer]}.{leaf}"
        elif place := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(\w+)", key):
            named = f"zero_convs.{place[1]}.0.{place[2]}"
        elif key.startswith("controlnet_mid_block."):
            named = key.replace("controlnet_mid_block", "middle_block_out.0")
        else:
            named = unet_name(key, 2, [])
        tensors[f"control_model.{named}"] = tensor
    return tensors


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_a_file_alone_is_as_good_as_its_folder(
    family: str, saved: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    model: LoadedModel = request.getfixturevalue(family)
    whole, alone = loaded(saved[family], model), loaded(saved[family] / NAME, model)
    assert whole.state_dict().keys() == alone.state_dict().keys()
    assert all(map(torch.equal, whole.state_dict().values(), alone.state_dict().values()))
    kept = {key: value for key, value in alone.config.items() if not key.startswith("_")}
    plain = {key: list(one) if isinstance(one, tuple) else one for key, one in kept.items()}
    given = json.loads((saved[family] / "config.json").read_text())
    levels = len(given.get("block_out_channels", ()))
    for key, value in given.items():
        if not key.startswith("_") and key in plain:  # diffusers writes what its class does not take, too
            found = plain.get(key)
            if key == "transformer_layers_per_block":  # one a level, or one for all of those that attend
                attend = [kind.startswith("Cross") for kind in given["down_block_types"]]
                value = [value] * levels if isinstance(value, int) else value
                value = [one if attends else 1 for one, attends in zip(value, attend, strict=True)]
                found = found[:-1] + value[-1:] if not attend[-1] else found
            assert found == value, key


def test_a_file_in_the_names_of_its_first_publication(sd: LoadedModel, saved: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    tensors = {key: tensor.clone() for key, tensor in original(saved["sd"] / NAME).items()}
    save_file(tensors, file)
    network, whole = loaded(file, sd), loaded(saved["sd"], sd)
    assert all(torch.equal(whole.state_dict()[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("sdxl", "sd", "The ControlNet mine was made for SDXL, and this model is Stable Diffusion 1."),
        ("sd", "sdxl", "The ControlNet mine was made for Stable Diffusion 1, and this model is SDXL."),
        ("flux", "sd", "The ControlNet mine was made for Flux, and this model is Stable Diffusion 1."),
        ("sd", "flux", "The ControlNet mine was made for Stable Diffusion 1, and this model is Flux."),
    ],
)
@pytest.mark.parametrize("part", ["", NAME], ids=["folder", "file"])
def test_one_of_another_family_is_told(
    theirs: str, ours: str, said: str, part: str, saved: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ControlFailed, match=f"^{re.escape(said)}$"):
        loaded(saved[theirs] / part, request.getfixturevalue(ours))


def _truncated(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / NAME)
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:-100])


def _lacking(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    tensors.pop("mid_block.resnets.0.conv1.weight")
    save_file(tensors, folder / NAME)


def _not_finite(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    tensors["controlnet_mid_block.weight"][0] = torch.nan
    save_file(tensors, folder / NAME)


def _narrow(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"block_out_channels": [8, 8, 16, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / NAME)


def _adapter(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "T2IAdapter"}')


def _pooling(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"global_pool_conditions": True}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / NAME)


def _union(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors | {"control_add_embedding.linear_1.weight": torch.zeros(1)}, folder / NAME)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_truncated, "cannot be read: its file is no whole safetensors file"),
        (_lacking, "does not load: Missing key.*mid_block.resnets.0.conv1.weight"),
        (_not_finite, "holds numbers that are none: its file is damaged."),
        (_narrow, "made for Stable Diffusion 1 of another width or depth than this model's"),
        (_adapter, "mine is no ControlNet that is supported: its folder says 'T2IAdapter'."),
        (_pooling, "pools its map"),
        (_union, "mine is a union of ControlNets, not supported."),
        (lambda tensors, folder: (folder / "config.json").write_text("{"), "its config.json is damaged"),
        (lambda tensors, folder: None, "its folder holds no .safetensors file"),
        (
            lambda tensors, folder: save_file({"a": torch.zeros(1)}, folder / NAME),
            "is no ControlNet that is known here",
        ),
        (lambda tensors, folder: (folder / NAME).write_bytes(b"PK" + bytes(99)), "it is a pickle under another name"),
    ],
    ids=["truncated", "lacking", "nan", "narrow", "adapter", "pooling", "union", "config", "empty", "other", "pickle"],
)
def test_what_is_wrong_with_its_files_is_told(
    spoil: Callable[[dict[str, torch.Tensor], Path], Any],
    said: str,
    sd: LoadedModel,
    saved: dict[str, Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text((saved["sd"] / "config.json").read_text())
    spoil(load_file(saved["sd"] / NAME), tmp_path)
    with pytest.raises(ControlFailed, match=said) as raised:
        loaded(tmp_path, sd)
    assert str(tmp_path) not in str(raised.value)


def test_a_file_that_is_gone_is_told(sd: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ControlFailed, match=r"^The ControlNet mine cannot be read: No such file or directory\.$"):
        loaded(tmp_path / "gone.safetensors", sd)
