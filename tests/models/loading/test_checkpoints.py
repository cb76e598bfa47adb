"""A folder of checkpoints: what lies there is a model, or it is said why not; what changes is seen."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import types
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.loaders import single_file_model

from cache import NoCache
from models.base import LoadFailed, ModelSpec, UnknownModel
from models.embedded import FOLDER
from models.families import FAMILIES
from models.generation import LoadedModel
from models.loading.checkpoints import CheckpointFolder
from models.loading.folder import saved_schedule
from models.models_file import read
from models.registry import Registry
from models.sampling.samplers import DIFFUSION, build
from tests.models import original
from tests.models.conftest import BETAS
from tests.models.original import Tensors, write_hollow
from tests.models.test_generation import PARAMS, ignore, pixels


@cache
def narrow(family: str) -> SimpleNamespace:
    """Its networks, with random weights that half precision holds exactly."""
    torch.manual_seed(7)
    made = original.networks(original.narrow(family), "cpu")
    for network in vars(made).values():
        network.half().float()
    return made


@cache
def checkpoint(family: str) -> Tensors:
    made = narrow(family)
    tensors = original.flux(made.transformer) if family.startswith("flux") else original.stable_diffusion(made)
    return {name: tensor.half() for name, tensor in tensors.items()}


@pytest.fixture(autouse=True)
def _narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' conversion of Flux splits its joined matrices at the published width, 3072; ours are 128 wide."""
    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = known["checkpoint_mapping_fn"]
    constants = tuple(128 if value == 3072 else value for value in convert.__code__.co_consts)
    small = types.FunctionType(convert.__code__.replace(co_consts=constants), convert.__globals__)
    monkeypatch.setitem(known, "checkpoint_mapping_fn", small)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


def listed(folder: Path, *configured: ModelSpec) -> tuple[dict[str, ModelSpec], dict[str, str]]:
    checkpoints = CheckpointFolder(folder)
    checkpoints.scan()
    served, unserved = checkpoints.models(configured)
    return {spec.name: spec for spec in served}, unserved


def hollow(file: Path, family: str = "sd15", leave: str = "nothing") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_hollow(file, {key: tensor for key, tensor in checkpoint(family).items() if not key.startswith(leave)})
    return file


def test_each_file_and_diffusers_folder_is_a_model_of_its_family(folder: Path, family_folders: dict[str, Path]) -> None:
    for family in ("sd15", "sd21", "sdxl"):
        hollow(folder / f"{family} file.safetensors", family)
        shutil.copytree(family_folders[family], folder / "people" / f"{family}-folder")
    hollow(folder / "called sdxl" / "dev.SAFETENSORS", "sd15")
    found, unserved = listed(folder)
    families = {name: spec.family for name, spec in found.items()}
    expected = {f"{family} file": family for family in ("sd15", "sd21", "sdxl")}
    expected |= {f"{family}-folder": family for family in ("sd15", "sd21", "sdxl")}
    assert families == expected | {"dev": "sd15"}
    assert unserved == {}


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert listed(tmp_path / "absent") == ({}, {})


def test_two_of_one_name_are_told_apart_by_their_folders(folder: Path, sd_spec: ModelSpec) -> None:
    for name in ("x.safetensors", "a/x.safetensors", "a/y.safetensors", "b/y.safetensors", "b/random-sd.safetensors"):
        hollow(folder / name)
    write_hollow(folder / "b" / "z.safetensors", {"lora_unet_conv_in.lora_down.weight": torch.empty(1)})
    found, unserved = listed(folder, sd_spec)
    assert set(found) == {"random-sd", "x", "a/x", "a/y", "b/y", "b/random-sd"}
    assert found["a/x"].source == folder / "a" / "x.safetensors"
    assert unserved == {"z": "b/z.safetensors is a LoRA: put it into the folder of LoRAs."}


def lying(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
    text = repr({"x": entry}).replace("'", '"').encode()
    return len(text).to_bytes(8, "little") + text + b"1234"


BAD: dict[str, tuple[str, bytes, str]] = {
    "zero bytes": ("a.safetensors", b"", "is empty. Fetch it again."),
    "a few bytes": ("a.safetensors", b"abc", "is no whole safetensors file"),
    "text": ("a.safetensors", b"<html>404 not found, and a page on why</html>", "is no whole safetensors file"),
    "a pickle": ("a.ckpt", b"", "is refused: a .ckpt file is a pickle"),
    "a pickle renamed": ("a.safetensors", b"PK\x03\x04archive/data.pkl", "is refused: it is a pickle under another"),
    "an old pickle renamed": ("a.safetensors", b"\x80\x02}q\x00.", "is refused: it is a pickle under another name"),
    "a huge header": ("a.safetensors", (2**40).to_bytes(8, "little") + b"{}", "is no whole safetensors file"),
    "a header that ends late": ("a.safetensors", (900).to_bytes(8, "little") + b"{}", "is no whole safetensors file"),
    "a shape that lies": ("a.safetensors", lying(shape=[2**40]), "is no whole safetensors file"),
    "a place that lies": ("a.safetensors", lying(data_offsets=[0, 8], shape=[2]), "is no whole safetensors file"),
    "an unknown precision": ("a.safetensors", lying(dtype="Q7"), "is no whole safetensors file"),
    "another kind": ("a.safetensors", lying(), "is none of the kinds of files that are known here"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_listed_with_its_reason_and_its_neighbour_is_served(kind: str, folder: Path) -> None:
    name, content, reason = BAD[kind]
    (folder / name).write_bytes(content)
    hollow(folder / "good.safetensors")
    found, unserved = listed(folder)
    assert list(found) == ["good"]
    assert unserved["a"].startswith(f"{name} {reason}")
    assert unserved["a"].endswith(".")
    assert str(folder) not in unserved["a"]


def test_a_file_cut_short_is_listed(folder: Path) -> None:
    file = hollow(folder / "cut.safetensors")
    os.truncate(file, file.stat().st_size - 1000)
    found, unserved = listed(folder)
    assert (found, list(unserved)) == ({}, ["cut"])
    assert "file not fully covered" in unserved["cut"]


def test_diffusers_folders_that_are_not_whole_or_not_ours_are_listed(
    folder: Path, family_folders: dict[str, Path]
) -> None:
    for name in ("indexless", "unetless", "strange"):
        shutil.copytree(family_folders["sd15"], folder / name)
    (folder / "indexless" / "model_index.json").unlink()
    (folder / "unetless" / "unet" / "config.json").unlink()
    (folder / "strange" / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    found, unserved = listed(folder)
    assert found == {}
    assert unserved["indexless"].startswith("indexless is a diffusers folder without its model_index.json")
    assert unserved["unetless"].startswith("unetless lacks unet/config.json: fetch the whole folder")
    assert unserved["strange"].startswith("strange is a KolorsPipeline")


def test_links_out_of_the_folder_are_refused_and_those_within_are_names(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    hollow(outside / "far.safetensors")
    hollow(folder / "near.safetensors")
    (folder / "far.safetensors").symlink_to(outside / "far.safetensors")
    (folder / "all").symlink_to(outside, target_is_directory=True)
    (folder / "alias.safetensors").symlink_to(folder / "near.safetensors")
    (folder / "gone.safetensors").symlink_to(folder / "nowhere.safetensors")
    found, unserved = listed(folder)
    assert set(found) == {"near", "alias"}
    assert set(unserved) == {"far", "all", "gone"}
    assert unserved["far"].startswith("far.safetensors is a link that leads out of the folder of checkpoints")
    assert unserved["all"].startswith("all is a link that leads out of the folder of checkpoints")
    assert unserved["gone"].startswith("gone.safetensors cannot be read (No such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_listed(folder: Path) -> None:
    hollow(folder / "closed.safetensors").chmod(0)
    hollow(folder / "room" / "in.safetensors").parent.chmod(0)
    found, unserved = listed(folder)
    (folder / "room").chmod(0o700)
    assert (found, set(unserved)) == ({}, {"closed", "room"})
    assert "cannot be read (Permission denied)" in unserved["closed"]


def parts_of_flux(folder: Path) -> None:
    made = narrow("flux-dev")
    (folder / "text encoders").mkdir()
    original.save({k: v.half() for k, v in original.clip(made.text_encoder).items()}, folder / "a.safetensors")
    original.save({k: v.half() for k, v in made.text_encoder_2.state_dict().items() if "embed_tokens" not in k},
                  folder / "text encoders" / "b.safetensors")  # fmt: skip
    original.save({k: v.half() for k, v in original.autoencoder(made.vae).items()}, folder / "c.safetensors")
    (folder / "tokenizers" / "t5").mkdir(parents=True)
    shutil.copy(FOLDER / "tiny-flux" / "tokenizer_2" / "tokenizer.json", folder / "tokenizers" / "t5")


def same(loaded: Any, made: torch.nn.Module) -> None:
    state, expected = loaded.state_dict(), made.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_file_alone_is_a_whole_model(family: str, folder: Path) -> None:
    original.save(checkpoint(family), folder / "one.safetensors")
    model: Any = FAMILIES[family].load(listed(folder)[0]["one"], "cpu")
    for component, made in vars(narrow(family)).items():
        same(getattr(model.pipeline, component), made)
    drawn = LoadedModel(model).generate(replace(PARAMS, width=64, height=64, steps=2), NoCache(), ignore)
    assert pixels(drawn.images).std() > 0


def test_a_bare_flux_finds_its_parts_by_their_tensors(folder: Path) -> None:
    original.save(checkpoint("flux-dev"), folder / "flux.safetensors")
    assert listed(folder)[1] == {
        "flux": "flux.safetensors lacks a text encoder CLIP-L: put it into the folder of checkpoints, or name the file "
        "as `text_encoder` in the models file."
    }
    parts_of_flux(folder)
    found, unserved = listed(folder)
    assert (list(found), set(unserved)) == (["flux"], {"a", "b", "c"})
    assert unserved["c"].startswith("c.safetensors is an autoencoder of 16 channels (Flux's): a part that models here")
    model: Any = FAMILIES["flux-dev"].load(found["flux"], "cpu")
    for component, made in vars(narrow("flux-dev")).items():
        same(getattr(model.pipeline, component), made)
    drawn = LoadedModel(model).generate(replace(PARAMS, width=64, height=64, steps=2), NoCache(), ignore)
    assert pixels(drawn.images).std() > 0


def test_of_two_text_encoders_the_more_precise_is_taken_and_of_two_autoencoders_none(folder: Path) -> None:
    original.save(checkpoint("flux-dev"), folder / "flux.safetensors")
    parts_of_flux(folder)
    precise = {key: tensor.float() for key, tensor in original.clip(narrow("flux-dev").text_encoder).items()}
    original.save(precise, folder / "precise.safetensors")
    assert listed(folder)[0]["flux"].parts["text_encoder"] == folder / "precise.safetensors"
    shutil.copy(folder / "c.safetensors", folder / "sd3_vae.safetensors")
    found, unserved = listed(folder)
    assert found == {}
    assert "tensors do not tell which of those here is its own (c.safetensors, sd3_vae.safetensors)" in unserved["flux"]


def test_a_file_without_its_autoencoder_takes_a_whole_ones_of_its_family(folder: Path) -> None:
    pruned = {key: tensor for key, tensor in checkpoint("sd15").items() if not key.startswith("first_stage")}
    original.save(pruned, folder / "pruned.safetensors")
    hollow(folder / "other.safetensors", "sd21")
    assert "pruned.safetensors lacks an autoencoder of Stable Diffusion: put it" in listed(folder)[1]["pruned"]
    original.save(checkpoint("sd15"), folder / "whole.safetensors")
    spec = listed(folder)[0]["pruned"]
    assert spec.parts == {"vae": folder / "whole.safetensors"}
    model: Any = FAMILIES["sd15"].load(spec, "cpu")
    same(model.pipeline.vae, narrow("sd15").vae)


def test_the_models_file_names_parts_and_wins_for_its_file(folder: Path, tmp_path: Path) -> None:
    hollow(folder / "pruned.safetensors", "sd15", leave="first_stage_model.")
    write_hollow(folder / "kl.safetensors", original.autoencoder(narrow("sd15").vae))
    assert "name the file as `vae` in the models file" in listed(folder)[1]["pruned"]
    (tmp_path / "models.toml").write_text(
        'default = "mine"\n[[models]]\nname = "mine"\nfile = "checkpoints/pruned.safetensors"\n'
        'vae = "checkpoints/kl.safetensors"\nsteps = 7\n'
        'prediction_type = "v_prediction"\nrescale_betas_zero_snr = true\n'
    )
    configuration = read(tmp_path / "models.toml")
    found, unserved = listed(folder, *configuration.specs)
    assert (set(found), set(unserved)) == ({"mine", "tiny-sd", "tiny-flux"}, {"kl"})
    mine = found["mine"]
    assert (mine.family, mine.steps, mine.prediction_type, mine.rescale_betas_zero_snr) == (
        "sd15",
        7,
        "v_prediction",
        True,
    )
    assert mine.parts == {"vae": folder / "kl.safetensors"}
    wrong = replace(mine, parts={"vae": folder / "pruned.safetensors"})
    with pytest.raises(
        LoadFailed, match=r"needs an autoencoder of Stable Diffusion as its vae, and .* holds a UNet and"
    ):
        FAMILIES["sd15"].load(wrong, "cpu")


def test_the_folders_models_can_be_the_default_ones(folder: Path, tmp_path: Path) -> None:
    hollow(folder / "mine.safetensors")
    checkpoints = CheckpointFolder(folder)
    checkpoints.scan()
    (tmp_path / "models.toml").write_text('default = "mine"\n')
    configuration = read(tmp_path / "models.toml", checkpoints)
    assert (configuration.default, configuration.default_flux) == ("mine", "tiny-flux")
    (tmp_path / "models.toml").write_text("embedded = false\n")
    assert read(tmp_path / "models.toml", checkpoints).default == "mine"


@pytest.fixture
def registry(folder: Path, sd_spec: ModelSpec) -> Registry:
    return Registry([sd_spec], "random-sd", None, checkpoints=pickle.loads(pickle.dumps(CheckpointFolder(folder))))


def test_files_that_come_change_and_go_are_seen(registry: Registry, folder: Path) -> None:
    assert (registry.names, registry.refresh()) == (("random-sd",), False)
    file = folder / "mine.safetensors"
    original.save(checkpoint("sd15"), file)
    model = registry.get("mine")  # a name that is not known is looked for at once
    assert (registry.loaded, registry.refresh()) == (("mine",), False)
    other = {name: tensor + tensor.abs().max() for name, tensor in checkpoint("sd15").items()}
    original.save(other, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)
    assert registry.loaded == ()
    again: Any = registry.get("mine")
    assert again is not model
    bias = other["model.diffusion_model.input_blocks.0.0.bias"].float()
    assert torch.equal(again.pipeline.pipeline.unet.conv_in.bias, bias)
    assert registry.refresh()
    file.unlink()
    assert (registry.refresh(), registry.names, registry.loaded) == (True, ("random-sd",), ())
    with pytest.raises(UnknownModel):
        registry.get("mine")
    registry.get("random-sd")
    assert registry.held == registry._sizes["random-sd"]


def test_a_default_model_whose_file_is_gone_keeps_its_row(folder: Path) -> None:
    file = hollow(folder / "mine.safetensors")
    registry = Registry([], "mine", None, checkpoints=CheckpointFolder(folder))
    assert registry.describe()[0]["error"] is None
    file.unlink()
    assert registry.refresh()
    assert "mine.safetensors is missing" in registry.describe()[0]["error"]


def with_key(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: torch.zeros(0) for key in keys}


def spread(tensors: Tensors) -> Tensors:
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    return tensors | {name: torch.linspace(-0.3, 0.3, len(tensors[name])).half()}


@pytest.mark.parametrize(
    ("family", "change", "prediction", "terminal"),
    [
        ("sd15", with_key(), "epsilon", False),
        ("sd21", with_key(), "epsilon", False),
        ("sd21", spread, "v_prediction", False),
        ("sdxl", with_key("v_pred"), "v_prediction", False),
        ("sdxl", with_key("v_pred", "ztsnr"), "v_prediction", True),
    ],
)
def test_what_the_file_says_it_predicts_is_drawn(
    family: str, change: Callable[[Tensors], Tensors], prediction: str, terminal: bool, folder: Path
) -> None:
    original.save(change(checkpoint(family)), folder / "one.safetensors")
    model: Any = FAMILIES[family].load(listed(folder)[0]["one"], "cpu")
    scheduler = model.pipeline.scheduler
    assert (scheduler.config.prediction_type, bool(scheduler.config.trained_betas)) == (prediction, terminal)


@pytest.fixture(scope="module")
def rescaled() -> tuple[Any, torch.Tensor]:
    """Our saved scheduler, and the kept power of signal that diffusers' own flag gives."""
    saved = EulerDiscreteScheduler(**BETAS, steps_offset=1)
    theirs = EulerDiscreteScheduler(**BETAS, steps_offset=1, rescale_betas_zero_snr=True).alphas_cumprod
    saved_schedule(saved, "v_prediction", True)
    return saved, theirs


@pytest.mark.parametrize("sampler", [name for name in DIFFUSION if name != "lcm"])
def test_every_sampler_ends_in_pure_noise(sampler: str, rescaled: tuple[Any, torch.Tensor]) -> None:
    saved, theirs = rescaled
    built = build(copy.deepcopy(saved), DIFFUSION, sampler, None, steps=4, seeds=[0])
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
