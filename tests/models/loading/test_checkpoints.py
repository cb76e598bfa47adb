"""A folder of checkpoints: what lies there is a model, or it is said why not; what changes is seen."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.base import ModelSpec
from models.errors import LoadFailed, UnknownModel
from models.families import FAMILIES
from models.loading.checkpoints import CheckpointFolder
from models.loading.folder import configurations_of
from models.loading.header import Header, TensorInfo
from models.loading.recognise import recognise
from models.models_file import read
from models.registry import Registry
from tests.models import original
from tests.models.original import checkpoint, hollow, listed, narrow_networks, write_hollow

UNETS = ("sd15", "sd21", "sdxl", "sdxl-refiner")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


def test_each_file_and_diffusers_folder_is_a_model_of_its_family(folder: Path, family_folders: dict[str, Path]) -> None:
    for family in UNETS:
        hollow(folder / f"{family} file.safetensors", family)
        shutil.copytree(family_folders[family], folder / "people" / f"{family}-folder")
    hollow(folder / "called sdxl" / "dev.SAFETENSORS", "sd15")
    found, unserved = listed(folder)
    families = {name: spec.family for name, spec in found.items()}
    expected = {f"{family} file": family for family in UNETS}
    expected |= {f"{family}-folder": family for family in UNETS}
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


def test_a_name_that_is_no_text_harms_nobody(folder: Path) -> None:
    hollow(Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff.safetensors")))
    assert list(listed(folder)[0]) == ["odd\\udcff"]


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


def test_links_out_of_the_folder_are_refused_and_those_within_are_names(
    folder: Path, tmp_path: Path, family_folders: dict[str, Path]
) -> None:
    outside = tmp_path / "elsewhere"
    hollow(outside / "far.safetensors")
    hollow(folder / "near.safetensors")
    (folder / "far.safetensors").symlink_to(outside / "far.safetensors")
    (folder / "all").symlink_to(outside, target_is_directory=True)
    (folder / "alias.safetensors").symlink_to(folder / "near.safetensors")
    (folder / "gone.safetensors").symlink_to(folder / "nowhere.safetensors")
    (folder / "readme.txt").symlink_to(outside / "far.safetensors")
    shutil.copytree(family_folders["sd15"], folder / "linked")
    (folder / "linked" / "unet" / "extra.safetensors").symlink_to(outside / "far.safetensors")
    found, unserved = listed(folder)
    assert set(found) == {"near", "alias"}
    assert set(unserved) == {"far", "all", "gone", "linked"}
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


def test_the_models_file_names_parts_and_wins_for_its_file(folder: Path, tmp_path: Path) -> None:
    hollow(folder / "pruned.safetensors", "sd15", leave="first_stage_model.")
    write_hollow(folder / "kl.safetensors", original.autoencoder(narrow_networks("sd15").vae))
    assert "whether its own is here: kl.safetensors): put what is missing into" in listed(folder)[1]["pruned"]
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
    with pytest.raises(LoadFailed, match=r"needs an autoencoder of Stable Diffusion as its vae, and .* holds .* and"):
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
    assert (registry.loaded, registry.refresh(), registry.refresh()) == (("mine",), True, False)
    other = {name: tensor + tensor.abs().max() for name, tensor in checkpoint("sd15").items()}
    original.save(other, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)
    assert registry.loaded == ()
    again: Any = registry.get("mine")
    assert again is not model
    bias = other["model.diffusion_model.input_blocks.0.0.bias"].float()
    assert torch.equal(again.pipeline.unet.conv_in.bias, bias)
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


@pytest.mark.parametrize(
    ("family", "header", "expected"),
    [
        ("sdxl", {"modelspec.title": "SD-XL Turbo 1.0"}, ("turbo", 4, 1.0)),
        ("sdxl", {"modelspec.architecture": "stable-diffusion-xl-turbo-v1"}, ("turbo", 4, 1.0)),
        ("sdxl", {"modelspec.title": "RealVis", "modelspec.tags": "photo, Lightning, 8-step"}, ("lightning", 8, 1.0)),
        ("sdxl", {"modelspec.title": "Hyper-SDXL, 1 step"}, ("hyper", 1, 1.0)),
        ("sd15", {"modelspec.title": "Dreams LCM"}, ("lcm", 4, 1.0)),
        ("flux-dev", {"modelspec.title": "Flux turbo"}, ("turbo", 8, None)),
        ("flux-schnell", {"modelspec.title": "Flux turbo"}, (None, None, None)),
        ("sdxl", {"modelspec.title": "Hyperrealism and turbocharged"}, (None, None, None)),
        ("sdxl", {"ss_output_name": "turbo", "modelspec.description": "no turbo"}, (None, None, None)),
    ],
)
def test_a_file_that_says_that_it_is_distilled_has_its_defaults(
    family: str, header: dict[str, str], expected: tuple[object, ...]
) -> None:
    shapes = {name: TensorInfo(tuple(tensor.shape), "F16") for name, tensor in checkpoint(family).items()}
    few = recognise(Header(shapes, header)).few_steps
    assert ((few.kind, few.steps, few.guidance_scale) if few else (None, None, None)) == expected


def test_the_defaults_reach_the_catalogue_but_for_what_the_operator_says(folder: Path) -> None:
    write_hollow(folder / "quick.safetensors", checkpoint("sdxl"), {"modelspec.title": "SDXL Lightning"})
    hollow(folder / "plain.safetensors", "sdxl")
    told = ModelSpec(
        name="told", family="sdxl", source=folder / "plain.safetensors", distilled="turbo", guidance_scale=0.0
    )
    registry = Registry([told], "told", None, checkpoints=CheckpointFolder(folder))
    rows = {row["name"]: row for row in registry.describe()}
    told_of = {name: (row["distilled"], row["steps"], row["guidance_scale"]) for name, row in rows.items()}
    assert told_of == {"quick": ("lightning", 4, 1.0), "told": ("turbo", 4, 0.0)}
    config = configurations_of(listed(folder)[0]["quick"], folder / "quick.safetensors")
    assert config["model_index.json"]["scheduler"][1] == "EulerDiscreteScheduler"
    assert config["scheduler/scheduler_config.json"]["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    ("scheduler", "unet", "expected"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, {}, ("turbo", 4, 1.0)),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, {}, ("turbo", 4, 1.0)),
        ({"_class_name": "LCMScheduler"}, {}, ("lcm", 4, 1.0)),
        ({"_class_name": "LCMScheduler"}, {"time_cond_proj_dim": 256}, ("lcm", 4, None)),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, {}, (None, None, None)),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, {}, (None, None, None)),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
            },
            {},
            (None, None, None),
        ),
    ],
)
def test_a_folder_says_by_its_scheduler_that_it_is_distilled(
    folder: Path, scheduler: dict[str, object], unet: dict[str, object], expected: tuple[object, ...]
) -> None:
    for path, config in (
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}),
        ("unet/config.json", unet),
        ("scheduler/scheduler_config.json", scheduler),
    ):
        (folder / "ink" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "ink" / path).write_text(json.dumps(config))
    spec = listed(folder)[0]["ink"]
    assert (spec.distilled, spec.steps, spec.guidance_scale) == expected


def test_a_full_disk_of_temporary_files_is_a_sentence_and_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hollow(folder / "ink.safetensors")
    registry = Registry([], "ink", None, checkpoints=CheckpointFolder(folder))

    def full(path: Path, text: str, **_: object) -> None:
        with open("/dev/full", "w") as disk:  # every write to it fails as one to a full disk does
            disk.write(text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(LoadFailed, match=r"No space left on device.*TMPDIR"):
            registry.get("ink")
    assert registry.loaded == ()
    assert registry.get("ink").spec.name == "ink"
