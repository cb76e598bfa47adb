"""Models in one file: the same pictures as from the folder, no network, and each bad file refused by name."""

from __future__ import annotations

import json
import shutil
import socket
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_model
from safetensors.torch import load_file, save_file

from cache import DeepCache, FirstBlockCache, NoCache
from models.base import Img2Img, ModelSpec, Step
from models.errors import LoadFailed
from models.families import FAMILIES
from models.generation import LoadedModel
from tests.models import original
from tests.models.stages.test_stages import picture
from tests.models.test_generation import PARAMS as FOUR_STEPS
from tests.models.test_generation import ignore, pixels

PARAMS = replace(FOUR_STEPS, steps=2)
NAMES = ("sd15", "sd21", "sdxl", "sdxl-refiner", "flux-dev", "flux-schnell")


@pytest.fixture(scope="module")
def files(family_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → its weights in one file of the published layout."""
    folder = tmp_path_factory.mktemp("files")
    files = {name: folder / f"{name}.safetensors" for name in NAMES}
    for name, file in files.items():
        pipeline: Any = FAMILIES[name].load(ModelSpec(name=name, family=name, source=family_folders[name]), "cpu")
        if not name.startswith("flux"):
            original.save_stable_diffusion(pipeline.pipeline, file)
        else:
            original.save_flux(pipeline.pipeline.transformer, file)
    return files


@pytest.fixture(autouse=True)
def _small_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' conversion of Flux splits its joined matrices at the published width, 3072; ours are 16 wide."""
    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = known["checkpoint_mapping_fn"]
    constants = tuple(16 if value == 3072 else value for value in convert.__code__.co_consts)
    small = types.FunctionType(convert.__code__.replace(co_consts=constants), convert.__globals__)
    monkeypatch.setitem(known, "checkpoint_mapping_fn", small)


def weightless(source: Path, tmp_path: Path) -> Path:
    """The folder without a weight in it."""
    folder = tmp_path / "bare"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def bare(family_folders: dict[str, Path], tmp_path: Path) -> Path:
    return weightless(family_folders["sd15"], tmp_path)


@pytest.mark.parametrize("family", NAMES)
def test_one_file_draws_what_the_folder_draws(
    family: str,
    files: dict[str, Path],
    family_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it went to the network"))
    config = family_folders[family] if family.startswith("flux") else weightless(family_folders[family], tmp_path)
    one = ModelSpec(name="one", family=family, source=files[family], config=config)
    many = ModelSpec(name="many", family=family, source=family_folders[family])
    single, whole = (LoadedModel(FAMILIES[family].load(spec, "cpu")) for spec in (one, many))
    strategy = FirstBlockCache(threshold=0.5) if family.startswith("flux") else DeepCache(interval=2)
    over = Img2Img(picture=picture(64, 64), denoise=1.0) if FAMILIES[family].needs_picture else None
    for cache in (NoCache(), strategy):
        drawn, expected = (model.generate(replace(PARAMS, img2img=over), cache, ignore) for model in (single, whole))
        assert np.array_equal(pixels(drawn.images), pixels(expected.images))
    assert pixels(drawn.images).std() > 0


def test_costs_are_read_from_the_configuration(files: dict[str, Path], bare: Path) -> None:
    costs = FAMILIES["sd15"].reuse_costs(ModelSpec(name="one", family="sd15", source=files["sd15"], config=bare))
    assert len(costs) == 12


def test_a_file_cut_short_is_refused(files: dict[str, Path], bare: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files["sd15"].read_bytes()[:-1000])
    with pytest.raises(LoadFailed, match=r"no whole safetensors file .* Fetch it again"):
        FAMILIES["sd15"].load(ModelSpec(name="cut", family="sd15", source=cut, config=bare), "cpu")


def test_a_file_that_lacks_a_tensor_is_refused(files: dict[str, Path], bare: Path, tmp_path: Path) -> None:
    tensors = load_file(files["sd15"])
    del tensors["model.diffusion_model.middle_block.1.proj_in.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(LoadFailed, match=r"less.safetensors lacks tensors"):
        FAMILIES["sd15"].load(
            ModelSpec(name="less", family="sd15", source=tmp_path / "less.safetensors", config=bare), "cpu"
        )


@pytest.mark.parametrize(
    ("family", "given", "reason"),
    [
        ("sd21", "sd15", "use_linear_projection"),
        ("flux-schnell", "flux-dev", "guidance_embeds"),
        ("sdxl", "sd15", "is a StableDiffusionPipeline"),
    ],
)
def test_a_config_of_another_family_is_told(
    family: str, given: str, reason: str, files: dict[str, Path], family_folders: dict[str, Path]
) -> None:
    spec = ModelSpec(name="wrong", family=family, source=files[family], config=family_folders[given])
    with pytest.raises(LoadFailed, match=reason):
        FAMILIES[family].load(spec, "cpu")


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("sd21", "sd15"),
        ("sd15", "sdxl"),
        ("sd15", "flux-dev"),
        ("flux-dev", "flux-schnell"),
        ("flux-schnell", "flux-dev"),
    ],
)
def test_a_file_of_another_family_is_told_by_its_tensors(
    family: str, given: str, files: dict[str, Path], family_folders: dict[str, Path]
) -> None:
    spec = ModelSpec(name="wrong", family=family, source=files[given], config=family_folders[family])
    with pytest.raises(LoadFailed, match=f"not of family '{family}': by its tensors it is '{given}'"):
        FAMILIES[family].reuse_costs(spec)


def test_code_named_by_the_folder_is_not_run(family_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "trap"
    shutil.copytree(family_folders["sd15"], folder)
    (folder / "unet" / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Net: ...\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["trap", "Net"]}))
    with pytest.raises(LoadFailed, match="no network of diffusers"):
        FAMILIES["sd15"].load(ModelSpec(name="trap", family="sd15", source=folder), "cpu")
    assert not (tmp_path / "sprung").exists()


def test_stages_are_told_before_each_part(family_folders: dict[str, Path]) -> None:
    from models.base import LoadHooks

    heard: list[str] = []
    sizes: list[int] = []
    hooks = LoadHooks(stage=heard.append, room=sizes.append)
    model: Any = FAMILIES["sdxl"].load(
        ModelSpec(name="xl", family="sdxl", source=family_folders["sdxl"]), "cpu", hooks=hooks
    )
    assert heard == ["unet", "vae", "text_encoder", "text_encoder_2", "moving to cpu"]
    modules = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    parameters = sum(p.numel() * p.element_size() for part in modules for p in part.parameters())
    assert sizes[0] == pytest.approx(parameters, rel=0.01), "the estimate is what the weights take"


def test_a_prediction_type_can_be_set(family_folders: dict[str, Path]) -> None:
    spec = ModelSpec(name="v", family="sd15", source=family_folders["sd15"])
    plain = LoadedModel(FAMILIES["sd15"].load(spec, "cpu"))
    velocity = LoadedModel(FAMILIES["sd15"].load(replace(spec, prediction_type="v_prediction"), "cpu"))
    steps: list[Step] = []
    one, other = plain.generate(PARAMS, NoCache(), ignore), velocity.generate(PARAMS, NoCache(), steps.append)
    assert not np.array_equal(pixels(one.images), pixels(other.images))
    assert velocity.pipeline.scheduler.config.prediction_type == "v_prediction"  # type: ignore[attr-defined]
