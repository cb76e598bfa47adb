"""A file alone is a whole model, with its parts beside it, and draws what it says it predicts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from cache import NoCache
from models.errors import LoadFailed
from models.families import FAMILIES
from models.generation import LoadedModel
from models.libraries import quiet
from models.loading.folder import saved_schedule
from models.sampling.samplers import DIFFUSION, build
from tests.models import original
from tests.models.conftest import BETAS
from tests.models.loading.quantising import narrow_flux
from tests.models.original import checkpoint, hollow, listed, narrow_networks
from tests.models.test_generation import PARAMS, ignore


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with narrow_flux(128):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


def parts_of_flux(folder: Path) -> None:
    made = narrow_networks("flux-dev")
    (folder / "text encoders").mkdir()
    original.save({k: v.half() for k, v in original.clip(made.text_encoder).items()}, folder / "a.safetensors")
    original.save({k: v.half() for k, v in made.text_encoder_2.state_dict().items() if "embed_tokens" not in k},
                  folder / "text encoders" / "b.safetensors")  # fmt: skip
    original.save({k: v.half() for k, v in original.autoencoder(made.vae).items()}, folder / "c.safetensors")


def test_a_bare_flux_finds_its_parts_by_their_tensors(folder: Path) -> None:
    original.save(checkpoint("flux-dev"), folder / "flux.safetensors")
    assert listed(folder)[1] == {
        "flux": "flux.safetensors lacks a text encoder CLIP-L and a text encoder T5-XXL and an autoencoder of 16 "
        "channels (Flux's): put what is missing into the folder of checkpoints, or name it as `text_encoder` and "
        "`text_encoder_2` and `vae` in the models file."
    }
    parts_of_flux(folder)
    found, unserved = listed(folder)
    assert (list(found), set(unserved)) == (["flux"], {"a", "b", "c"})
    assert unserved["c"].startswith("c.safetensors is an autoencoder of 16 channels (Flux's): a part that models here")
    parts = found["flux"].parts
    assert {name: path.name for name, path in parts.items()} == {
        "text_encoder": "a.safetensors",
        "text_encoder_2": "b.safetensors",
        "vae": "c.safetensors",
        "tokenizer_2": "t5",
    }


def test_of_two_text_encoders_the_more_precise_is_taken_and_of_two_autoencoders_none(folder: Path) -> None:
    original.save(checkpoint("flux-dev"), folder / "flux.safetensors")
    parts_of_flux(folder)
    precise = {key: tensor.float() for key, tensor in original.clip(narrow_networks("flux-dev").text_encoder).items()}
    original.save(precise, folder / "precise.safetensors")
    assert listed(folder)[0]["flux"].parts["text_encoder"] == folder / "precise.safetensors"
    shutil.copy(folder / "c.safetensors", folder / "sd3_vae.safetensors")
    found, unserved = listed(folder)
    assert found == {}
    assert "tensors do not tell whether its own is here: c.safetensors, sd3_vae.safetensors" in unserved["flux"]


def test_a_file_without_its_autoencoder_takes_a_whole_ones_of_its_family(folder: Path) -> None:
    pruned = {key: tensor for key, tensor in checkpoint("sd15").items() if not key.startswith("first_stage")}
    original.save(pruned, folder / "pruned.safetensors")
    hollow(folder / "other.safetensors", "sd21")
    assert "pruned.safetensors lacks an autoencoder of Stable Diffusion: put" in listed(folder)[1]["pruned"]
    original.save(checkpoint("sd15"), folder / "whole.safetensors")
    spec = listed(folder)[0]["pruned"]
    assert spec.parts == {"vae": folder / "whole.safetensors"}


@pytest.fixture(scope="module")
def rescaled() -> tuple[Any, torch.Tensor]:
    """Our saved scheduler, and the kept power of signal that diffusers' own flag gives."""
    with quiet():
        saved = EulerDiscreteScheduler(**BETAS, steps_offset=1)
        theirs = EulerDiscreteScheduler(**BETAS, steps_offset=1, rescale_betas_zero_snr=True).alphas_cumprod
    saved_schedule(saved, "v_prediction", True)
    return saved, theirs


@pytest.mark.parametrize("sampler", [name for name in DIFFUSION if name != "lcm"])
def test_every_sampler_ends_in_pure_noise(sampler: str, rescaled: tuple[Any, torch.Tensor]) -> None:
    saved, theirs = rescaled
    with quiet():
        built = build(saved, DIFFUSION, sampler, None, steps=4, seeds=[0])
    assert built.config.prediction_type == "v_prediction"
    assert built.config.timestep_spacing == "trailing"
    assert torch.allclose(built.alphas_cumprod.double(), theirs.double(), rtol=1e-3, atol=1e-6)


def test_weights_that_are_no_numbers_are_an_error_that_says_where(folder: Path) -> None:
    tensors = checkpoint("sd15") | {
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.full((64,), float("nan")).half()
    }
    original.save(tensors, folder / "nan.safetensors")
    model = LoadedModel(FAMILIES["sd15"].load(listed(folder)[0]["nan"], "cpu"))
    with pytest.raises(Exception, match=r"text_encoder"):
        model.generate(replace(PARAMS, width=64, height=64, steps=1), NoCache(), ignore)


def test_a_tensor_of_the_wrong_size_is_refused(folder: Path) -> None:
    name = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    original.save(checkpoint("sd15") | {name: torch.zeros(130, 64).half()}, folder / "odd.safetensors")
    with pytest.raises(LoadFailed, match=r"odd.safetensors"):
        FAMILIES["sd15"].load(listed(folder)[0]["odd"], "cpu")


def test_tensors_that_the_network_does_not_take_are_refused(folder: Path) -> None:
    name = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc3.weight"
    original.save(checkpoint("sd15") | {name: torch.zeros(64, 64).half()}, folder / "more.safetensors")
    with pytest.raises(
        LoadFailed, match=r"more.safetensors holds \d+ numbers for its text_encoder, and the network takes"
    ):
        FAMILIES["sd15"].load(listed(folder)[0]["more"], "cpu")
