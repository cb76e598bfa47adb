"""Folders that cannot be loaded are named with their reason; nothing is filled up with random numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base import ModelSpec
from models.errors import LoadFailed
from models.families.flux import FLUX
from models.families.sd import SD
from models.generation import LoadedModel

UNET = "unet/diffusion_pytorch_model.safetensors"


def drop_first_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "model_index.json is missing"),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json is missing"),
    "index of a list": (lambda folder: (folder / "model_index.json").write_text("[]"), "does not hold a JSON object"),
    "index of noise": (lambda folder: (folder / "model_index.json").write_bytes(b"\xff{"), "cannot be read"),
    "no weights": (lambda folder: (folder / UNET).unlink(), "no file named"),
    "weights cut short": (
        lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:5000]),
        "Unable to load weights",
    ),
    "a pickle for weights": (
        lambda folder: (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin"),
        "no file named",
    ),
    "a UNet tensor lacking": (lambda folder: drop_first_tensor(folder / UNET), "1 tensors are missing, unet."),
    "a text tensor lacking": (
        lambda folder: drop_first_tensor(folder / "text_encoder/model.safetensors"),
        "1 tensors are missing, text_encoder.",
    ),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer/ holds none of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_with_its_reason(damage: str, sd_folder: Path, tmp_path: Path) -> None:
    hurt, reason = DAMAGE[damage]
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    hurt(folder)
    with pytest.raises(LoadFailed) as failure:
        SD.load(ModelSpec(name="hurt", family="sd", source=folder), "cpu")
    assert reason in str(failure.value)
    assert "'hurt'" in str(failure.value)


def test_a_folder_of_another_family_is_refused(flux_folder: Path, sd_folder: Path) -> None:
    with pytest.raises(LoadFailed, match=r"is a FluxPipeline, but its family 'sd' loads StableDiffusionPipeline"):
        SD.load(ModelSpec(name="wrong", family="sd", source=flux_folder), "cpu")
    with pytest.raises(LoadFailed, match=r"is a StableDiffusionPipeline, but its family 'flux' loads FluxPipeline"):
        FLUX.reuse_costs(ModelSpec(name="wrong", family="flux", source=sd_folder))


def test_half_precision_files_run_in_float32_on_the_cpu(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(sd_folder, folder)
    for file in folder.glob("*/*.safetensors"):
        tensors = load_file(file)
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(halves, file, metadata={"format": "pt"})
    pipeline = SD.load(ModelSpec(name="half", family="sd", source=folder), "cpu").pipeline
    stored = load_file(folder / UNET)
    loaded = pipeline.unet.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], stored[name].float()) for name in stored)
    assert pipeline.text_encoder.dtype == pipeline.vae.dtype == torch.float32


def test_files_of_the_fp16_variant_are_found(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "variant"
    shutil.copytree(sd_folder, folder)
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    model = SD.load(ModelSpec(name="variant", family="sd", source=folder), "cpu")
    expected = load_file(sd_folder / UNET)
    assert torch.equal(model.pipeline.unet.state_dict()["conv_in.weight"], expected["conv_in.weight"])


def test_loading_says_nothing(sd_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    SD.load(ModelSpec(name="silent", family="sd", source=sd_folder), "cpu")
    assert capfd.readouterr() == ("", "")


def test_loaded_modules_are_ready_to_infer(sd: LoadedModel, flux: LoadedModel) -> None:
    for model in (sd, flux):
        modules = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert len(modules) >= 3
        assert not any(part.training for module in modules for part in module.modules())
        assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())


def test_reuse_costs_need_no_weights(sd_folder: Path, tmp_path: Path, sd: LoadedModel) -> None:
    (tmp_path / "unet").mkdir()
    for file in ("model_index.json", "unet/config.json"):
        shutil.copy(sd_folder / file, tmp_path / file)
    costs = SD.reuse_costs(ModelSpec(name="bare", family="sd", source=tmp_path))
    assert costs == pytest.approx(sd.denoiser.branch_costs)
    assert list(costs) == sorted(costs)
    assert 0 < costs[0] < costs[-1] < 1
    (tmp_path / "unet/config.json").write_text(json.dumps({"cross_attention_dim": "wide"}))
    with pytest.raises(LoadFailed, match="unet"):
        SD.reuse_costs(ModelSpec(name="bare", family="sd", source=tmp_path))
