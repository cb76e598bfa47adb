"""Each published family: its true topology at small width, loaded by its own loader, equal to the plain pipeline."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache import DeepCache, FirstBlockCache, NoCache
from models.base import ModelSpec
from models.errors import LoadFailed
from models.families import FAMILIES
from models.generation import LoadedModel
from models.registry import Registry
from models.text.encoded import TextCache
from tests.models.test_generation import PARAMS as FOUR_STEPS
from tests.models.test_generation import ignore, pixels, plain

PARAMS = replace(FOUR_STEPS, steps=4)

PUBLISHED = ("sd15", "sd21", "sdxl", "flux-schnell", "flux-dev")


@pytest.fixture(scope="module")
def loaded(family_folders: dict[str, Path]) -> dict[str, LoadedModel]:
    return {
        name: LoadedModel(FAMILIES[name].load(ModelSpec(name=name, family=name, source=family_folders[name]), "cpu"))
        for name in PUBLISHED
    }


@functools.cache
def uncached(model: LoadedModel) -> np.ndarray:
    """The pictures of the module's first run of PARAMS."""
    return pixels(model.generate(PARAMS, NoCache(), ignore).images)


def expected(model: Any, **changes: Any) -> np.ndarray:
    """What diffusers draws by itself."""
    params = replace(PARAMS, **changes)
    if model.spec.family == "flux-dev":
        guidance = {"guidance_scale": params.guidance_scale, "true_cfg_scale": 1.0, "negative_prompt": None}
        return pixels(plain(model, params, **guidance))
    if model.spec.family == "sdxl" and not params.negative_prompt:
        return pixels(plain(model, params, negative_prompt=None))  # as its pipeline's own default: zeros
    return pixels(plain(model, params))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"width": 96, "negative_prompt": "rain"}], ids=str)
def test_without_a_cache_the_plain_pipelines_pictures_come_out(
    loaded: dict[str, LoadedModel], name: str, changes: dict[str, Any]
) -> None:
    changes = {"steps": 2, **changes}
    drawn = loaded[name].generate(replace(PARAMS, **changes), NoCache(), ignore)
    assert np.array_equal(pixels(drawn.images), expected(loaded[name], **changes))
    assert pixels(drawn.images).std() > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_cache_acts_and_leaves_no_trace(loaded: dict[str, LoadedModel], name: str) -> None:
    model = loaded[name]
    strategy = DeepCache(interval=2) if FAMILIES[name].cache == "deepcache" else FirstBlockCache(threshold=1.0)
    before = uncached(model)
    cached = model.generate(PARAMS, strategy, ignore)
    assert cached.reports[0].reused > 0
    assert not np.array_equal(pixels(cached.images), before)
    after = model.generate(PARAMS, NoCache(), ignore)
    assert np.array_equal(pixels(after.images), before)


def test_sd21_predicts_velocity_and_deepcache_knows_its_network(loaded: dict[str, LoadedModel]) -> None:
    model: Any = loaded["sd21"]
    assert model.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert model.pipeline.unet.config.use_linear_projection
    assert len(model.denoiser.branch_costs) == 12


def test_sdxl_has_nine_branches_and_reads_two_texts(
    loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = loaded["sdxl"]
    assert len(model.denoiser.branch_costs) == 9
    depths = [
        len(layer.transformer_blocks) for block in model.pipeline.unet.down_blocks[1:] for layer in block.attentions
    ]
    assert depths == [2, 2, 10, 10]
    one = uncached(model)
    monkeypatch.setattr(model, "_texts", TextCache(entries=0))  # what encoders that change have read is not kept
    for encoder in ("text_encoder", "text_encoder_2"):
        whole = getattr(model.pipeline, encoder)
        weight = next(whole.parameters())
        saved = weight.clone()
        weight.data.mul_(3)
        other = model.generate(PARAMS, NoCache(), ignore)
        weight.data.copy_(saved)
        assert not np.array_equal(pixels(other.images), one), encoder


def test_schnell_runs_once_a_step_and_dev_takes_the_scale_as_an_input(loaded: dict[str, LoadedModel]) -> None:
    schnell = loaded["flux-schnell"].generate(
        replace(PARAMS, guidance_scale=FAMILIES["flux-schnell"].guidance_scale), FirstBlockCache(threshold=0.0), ignore
    )
    assert schnell.reports[0].decisions == "C" * PARAMS.steps
    dev = loaded["flux-dev"].generate(PARAMS, FirstBlockCache(threshold=0.0), ignore)
    assert dev.reports[0].decisions == "C" * PARAMS.steps
    other = loaded["flux-dev"].generate(replace(PARAMS, guidance_scale=8.0), NoCache(), ignore)
    assert not np.array_equal(pixels(dev.images), pixels(other.images))
    assert (FAMILIES["flux-schnell"].steps, FAMILIES["flux-dev"].steps) == (4, 28)


@pytest.mark.parametrize(
    ("family", "given", "word"),
    [
        ("sd15", "sd21", "use_linear_projection"),
        ("sd21", "sd15", "use_linear_projection"),
        ("sdxl", "sd15", "StableDiffusionPipeline"),
        ("sd15", "sdxl", "StableDiffusionXLPipeline"),
        ("flux-dev", "flux-schnell", "guidance_embeds"),
        ("flux-schnell", "flux-dev", "guidance_embeds"),
        ("flux-dev", "sdxl", "StableDiffusionXLPipeline"),
        ("sdxl", "sdxl-refiner", "StableDiffusionXLImg2ImgPipeline"),
        ("sdxl-refiner", "sdxl", "StableDiffusionXLPipeline"),
    ],
)
def test_a_folder_of_another_family_is_refused(
    family: str, given: str, word: str, family_folders: dict[str, Path]
) -> None:
    spec = ModelSpec(name="wrong", family=family, source=family_folders[given])
    for ask in (FAMILIES[family].reuse_costs, lambda spec: FAMILIES[family].load(spec, "cpu")):
        with pytest.raises(LoadFailed, match=word) as failure:
            ask(spec)
        assert "Name the right family" in str(failure.value)


def test_rows_tell_branches_and_costs_of_every_family(family_folders: dict[str, Path]) -> None:
    specs = [
        ModelSpec(name=f"my-{name}", family=name, source=family_folders[name]) for name in (*PUBLISHED, "sdxl-refiner")
    ]
    rows = {row["family"]: row for row in Registry(specs, "my-sd15", None).describe()}
    assert {name: len(row["branches"]) for name, row in rows.items()} == {
        "sd15": 12, "sd21": 12, "sdxl": 9, "sdxl-refiner": 12, "flux-schnell": 0, "flux-dev": 0,
    }  # fmt: skip
    assert {name: row["native_width"] for name, row in rows.items()} == {
        "sd15": 512, "sd21": 768, "sdxl": 1024, "sdxl-refiner": 1024, "flux-schnell": 1024, "flux-dev": 1024,
    }  # fmt: skip
    assert all(row["error"] is None for row in rows.values())


def test_decoding_in_slices_and_tiles_is_the_autoencoders_own(
    family_folders: dict[str, Path], loaded: dict[str, LoadedModel]
) -> None:
    spec = ModelSpec(name="tiled", family="sd15", source=family_folders["sd15"], vae_tiling=True, vae_slicing=True)
    tiled: Any = LoadedModel(FAMILIES["sd15"].load(spec, "cpu"))
    assert tiled.pipeline.vae.use_tiling
    assert tiled.pipeline.vae.use_slicing
    drawn = pixels(tiled.generate(PARAMS, NoCache(), ignore).images)
    assert np.array_equal(drawn, expected(tiled))
    whole = uncached(loaded["sd15"])
    assert not np.array_equal(drawn, whole), "tiles of 32 pixels were blended"
    tiled.pipeline.vae.disable_tiling()
    sliced = pixels(tiled.generate(PARAMS, NoCache(), ignore).images)
    # A convolution over one picture may add up in another order than over two.
    assert np.abs(sliced.astype(int) - whole.astype(int)).max() <= 1, "slices change nothing"


def test_the_files_dtype_can_be_overridden(family_folders: dict[str, Path]) -> None:
    spec = ModelSpec(name="half", family="sd15", source=family_folders["sd15"], dtype="bfloat16")
    half: Any = LoadedModel(FAMILIES["sd15"].load(spec, "cpu"))
    assert str(half.pipeline.unet.dtype) == str(half.pipeline.vae.dtype) == "torch.bfloat16"
    drawn = half.generate(PARAMS, DeepCache(), ignore)
    assert pixels(drawn.images).std() > 0


def test_offloading_is_refused_where_there_is_nothing_to_offload_from(family_folders: dict[str, Path]) -> None:
    spec = ModelSpec(name="off", family="sd15", source=family_folders["sd15"], offload="model")
    with pytest.raises(LoadFailed, match="Remove `offload`"):
        FAMILIES["sd15"].load(spec, "cpu")


def copies(folder: Path, tmp_path: Path, names: str) -> list[ModelSpec]:
    for name in names:
        shutil.copytree(folder, tmp_path / name)
    return [ModelSpec(name=name, family="sd", source=tmp_path / name) for name in names]


def test_the_model_used_longest_ago_makes_room(small_folders: dict[str, Path], tmp_path: Path) -> None:
    specs = copies(small_folders["epsilon"], tmp_path, "abc")
    sizer = Registry(specs, "a", None, memory=2**40)
    sizer.get("a")
    one = sizer.held
    registry = Registry(specs, "a", None, memory=2 * one)
    said: list[tuple[str, str]] = []
    registry.on_stage = lambda name, stage: said.append((name, stage))
    first = registry.get("a")
    before = first.generate(PARAMS, DeepCache(), ignore)
    registry.get("b")
    assert registry.get("a") is first, "it fits, and is now the one used last"
    registry.get("c")
    assert registry.loaded == ("a", "c")
    assert ("c", "dropping b to make room") in said
    registry.get("b")
    assert registry.loaded == ("c", "b")
    again = registry.get("a")
    assert again is not first
    assert np.array_equal(pixels(again.generate(PARAMS, DeepCache(), ignore).images), pixels(before.images))
    assert registry.held == 2 * one


def test_a_model_that_can_never_fit_is_refused_and_drops_nothing(
    small_folders: dict[str, Path], family_folders: dict[str, Path], tmp_path: Path
) -> None:
    specs = copies(small_folders["epsilon"], tmp_path, "a")
    big = ModelSpec(name="xl", family="sdxl", source=family_folders["sdxl"])
    sizer = Registry([*specs, big], "a", None, memory=2**40)
    sizer.get("a")
    registry = Registry([*specs, big], "a", None, memory=sizer.held)
    registry.get("a")
    with pytest.raises(LoadFailed, match="WAVESPEED_MODEL_MEMORY"):
        registry.get("xl")
    assert registry.loaded == ("a",)


def test_a_model_stays_for_the_one_that_is_used_beside_it(family_folders: dict[str, Path]) -> None:
    names = ("sd15", "sdxl", "sdxl-refiner")
    specs = [ModelSpec(name=name, family=name, source=family_folders[name]) for name in names]
    sizer = Registry(specs, "sd15", None, memory=2**40)
    sizes = {}
    for name in names:
        before = sizer.held
        sizer.get(name)
        sizes[name] = sizer.held - before
    registry = Registry(specs, "sd15", None, memory=sizes["sdxl"] + sizes["sdxl-refiner"])
    base = registry.get("sdxl")
    registry.get("sdxl-refiner", "sdxl")
    assert registry.loaded == ("sdxl", "sdxl-refiner")
    assert registry.give_up_idle(("sdxl", "sdxl-refiner")) is None
    assert registry.get("sdxl") is base
    small = Registry(specs, "sd15", None, memory=sizes["sdxl"] + sizes["sdxl-refiner"] - 1)
    small.get("sd15")
    small.get("sdxl")
    with pytest.raises(
        LoadFailed, match=r"'sdxl-refiner' take .* those of 'sdxl' beside them .* WAVESPEED_MODEL_MEMORY"
    ):
        small.get("sdxl-refiner", "sdxl")
    assert small.loaded == ("sdxl",)
