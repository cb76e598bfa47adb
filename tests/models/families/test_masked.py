"""Stable Diffusion 3.5, Chroma and Qwen-Image at small width: diffusers' own pictures, caches, neighbours, texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache import CacheStrategy, FirstBlockCache, NoCache
from models import models_file
from models.base import Generation, GenerationParams, Img2Img, Inpaint, Lora, ModelSpec, Multiscale, Step
from models.families import FAMILIES
from models.generation import LoadedModel
from models.libraries import quiet
from models.loading.checkpoints import CheckpointFolder
from models.registry import Registry
from models.run import sibling_of
from tests.models.conftest import TEXT_LENGTH
from tests.models.families.masked import save_all
from tests.models.stages.test_inpaint import box, under
from tests.models.stages.test_stages import picture
from tests.models.test_generation import PARAMS as LARGE
from tests.models.test_generation import generators, ignore, pixels

SIDE = 32
PARAMS = replace(LARGE, width=SIDE, height=SIDE)
NAMES = ("sd3.5", "sd3.5, medium", "chroma", "qwen-image")
FIRST = pytest.mark.parametrize("name", ["sd3.5", "chroma", "qwen-image"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_all(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Any]) -> dict[str, LoadedModel]:
    def load(name: str) -> LoadedModel:
        family = name.partition(",")[0]
        return LoadedModel(FAMILIES[family].load(ModelSpec(name=name, family=family, source=folders[name]), "cpu"))

    return {name: load(name) for name in NAMES}


def plain(model: LoadedModel, params: GenerationParams) -> np.ndarray:
    """What diffusers makes of the request, with nothing of ours in between."""
    pipeline: Any = model.pipeline
    family = model.spec.family
    arguments: dict[str, Any] = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "true_cfg_scale" if family == "qwen-image" else "guidance_scale": params.guidance_scale,
        "num_images_per_prompt": len(params.seeds),
        "num_inference_steps": params.steps,
        "generator": generators(params),
        "width": params.width,
        "height": params.height,
    }
    if family == "chroma" or pipeline.components.get("text_encoder_3") is not None:
        arguments["max_sequence_length"] = TEXT_LENGTH
    if (over := params.img2img) is not None:
        pipeline = sibling_of(pipeline, "Img2Img" if over.inpaint is None else "Inpaint")
        arguments |= {"image": over.picture, "strength": over.denoise}
        arguments |= {} if over.inpaint is None else {"mask_image": over.inpaint.mask}
        if family == "qwen-image":  # its pipelines over pictures take one for each generator
            arguments |= {"prompt": [params.prompt] * len(params.seeds), "num_images_per_prompt": 1}
            arguments |= {"negative_prompt": [params.negative_prompt] * len(params.seeds)}
        arguments["image"] = [over.picture] * len(params.seeds)
    with quiet(), torch.no_grad():
        if family == "sd3.5" and over is not None and over.inpaint is not None:  # that pipeline forgets the shift
            vae, latents = pipeline.vae, pipeline(**arguments, output_type="latent").images
            decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
            drawn = pixels(pipeline.image_processor.postprocess(decoded))
        else:
            drawn = pixels(pipeline(**arguments).images)
    return drawn if over is None or over.inpaint is None else under(over.inpaint.mask, over.picture, drawn)


OVER = Img2Img(picture=picture(SIDE, SIDE), denoise=0.6)
MASK = box(8, 8, 23, 23, size=(SIDE, SIDE))
CHANGES: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "negative": {"width": 48, "negative_prompt": "rain"},
    "picture": {"img2img": OVER},
    "mask": {"img2img": replace(OVER, inpaint=Inpaint(mask=MASK, blur=0))},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", CHANGES)
def test_off_and_at_threshold_0_diffusers_own_pictures_come_out(
    loaded: dict[str, LoadedModel], name: str, changes: str
) -> None:
    model, params = loaded[name], replace(PARAMS, steps=2, **CHANGES[changes])
    expected = plain(model, params)
    assert expected.std() > 0
    for strategy in (NoCache(), FirstBlockCache(threshold=0.0)):
        drawn = model.generate(params, strategy, ignore)
        assert drawn.reports[0].reused == 0
        assert np.array_equal(pixels(drawn.images), expected)


@pytest.mark.parametrize("name", NAMES)
def test_its_cache_acts_and_leaves_no_trace(loaded: dict[str, LoadedModel], name: str) -> None:
    model = loaded[name]
    before = pixels(model.generate(PARAMS, NoCache(), ignore).images)
    cached = model.generate(PARAMS, FirstBlockCache(threshold=1.0, forecast=False), ignore)
    halves = 1 if name.startswith("sd3") else 2  # calls of a guided step
    assert cached.reports[0].decisions == halves * "C" + 3 * halves * "R"
    assert cached.reports[0].item_decisions == [cached.reports[0].decisions] * len(PARAMS.seeds)
    assert 0 < (cached.reports[0].reuse_cost or 0) < 0.7
    assert not np.array_equal(pixels(cached.images), before)
    assert np.array_equal(pixels(model.generate(PARAMS, NoCache(), ignore).images), before)


TEXTS = ("a fox", "a misty forest at twilight, and the sea behind it", "rain")


@FIRST
@pytest.mark.parametrize("strategy", [NoCache(), FirstBlockCache(0.1)], ids=str)
def test_a_picture_does_not_depend_on_its_neighbours(
    loaded: dict[str, LoadedModel], name: str, strategy: CacheStrategy
) -> None:
    """Texts of different length, each with another one to keep away from; the last has two images."""
    model = loaded[name]
    asked = [
        replace(PARAMS, prompt=text, negative_prompt=TEXTS[index - 1], seeds=(40 + index,), batch_size=1)
        for index, text in enumerate(TEXTS)
    ]
    asked[-1] = replace(asked[-1], seeds=(98, 99), batch_size=2)
    together = model.generate_together(asked, strategy, lambda steps: None)
    for request, one in zip(asked, together, strict=True):
        assert isinstance(one, Generation), one
        alone = model.generate(request, strategy, ignore)
        assert [report.decisions for report in one.reports] == [report.decisions for report in alone.reports]
        # Another batch size may sum in another order.
        assert np.abs(pixels(one.images).astype(int) - pixels(alone.images).astype(int)).max() <= 2
    sizes = [size for one in together if isinstance(one, Generation) for size in one.batches]
    assert sizes == ([1, 1, 2] if name == "qwen-image" else [4])  # its texts are as long as they are


@FIRST
def test_halves_of_guidance_that_decide_apart_are_one_picture(loaded: dict[str, LoadedModel], name: str) -> None:
    """At a threshold between the two halves' changes only one of them computes; the picture's letter says so."""
    model = loaded[name]
    params = replace(PARAMS, negative_prompt="rain", seeds=(7,), steps=6, batch_size=1)
    told = model.generate(params, FirstBlockCache(1e-6, forecast=False), ignore).reports[0]
    changes = sorted(change for change in told.residuals if change is not None)
    report = model.generate(params, FirstBlockCache(min(1.0, changes[2] * 1.01)), ignore).reports[0]
    assert len(report.decisions) == (6 if name == "sd3.5" else 12)
    assert {"C", "R"} == set(report.decisions)
    assert report.item_decisions == []


@FIRST
def test_guidance_in_a_part_of_the_run(loaded: dict[str, LoadedModel], name: str) -> None:
    made = loaded[name].generate(replace(PARAMS, guidance_end=0.5), FirstBlockCache(1.0, forecast=False), ignore)
    assert made.stages[0].halves == ("BBTT" if name == "sd3.5" else "TNTNTT")


@FIRST
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_samplers_previews_and_steps_at_two_sizes(loaded: dict[str, LoadedModel], name: str, sampler: str) -> None:
    steps: list[Step] = []
    scales = Multiscale(fullres_start=1, fullres_end=1, intermittent=False)
    params = replace(PARAMS, sampler=sampler, preview=True, multiscale=scales, width=64, height=64, steps=4)
    made = loaded[name].generate(params, NoCache(), steps.append)
    assert all(step.preview for step in steps)
    assert set(made.stages[0].sizes) == {"F", "S"}
    assert made.sampling == (sampler, "normal")
    over = loaded[name].generate(
        replace(PARAMS, sampler=sampler, img2img=replace(OVER, denoise=0.5)), NoCache(), ignore
    )
    assert over.stages[0].steps == 2


@pytest.mark.parametrize(
    ("name", "length", "text"),
    [
        ("sd3.5", TEXT_LENGTH, "word " * 20),
        ("sd3.5, medium", TEXT_LENGTH, "word " * 20),  # CLIP's
        ("chroma", TEXT_LENGTH, "word " * 20),
        ("qwen-image", 512, "word " * 200),
    ],
)
def test_what_is_not_read_is_said(loaded: dict[str, LoadedModel], name: str, length: int, text: str) -> None:
    model: Any = loaded[name].model
    said = model.warnings(replace(PARAMS, prompt=text, negative_prompt=text))
    assert [
        f"{name} reads {length} tokens; the {which} has" in sentence
        for which, sentence in zip(("prompt", "negative prompt"), said, strict=True)
    ] == [True, True]
    said = model.warnings(replace(PARAMS, negative_prompt="rain", guidance_scale=1.0))
    assert said == [f"The negative prompt has no effect: {name} runs without guidance at a scale of 1 or less."]
    assert model.warnings(PARAMS) == []


def test_folders_are_known_by_what_they_hold(folders: dict[str, Any]) -> None:
    path = folders["chroma"].parent
    specs = CheckpointFolder(path)
    specs.scan()
    found, unserved = specs.models([])
    assert not unserved
    assert {spec.name: spec.family for spec in found} == {
        "sd3.5": "sd3.5", "medium": "sd3.5", "chroma": "chroma", "qwen-image": "qwen-image",
    }  # fmt: skip
    rows = {row["name"]: row for row in Registry(found, "chroma", None).describe()}
    assert {row["error"] for row in rows.values()} == {None}
    assert {row["cache"] for row in rows.values()} == {"first_block"}
    assert not any(row["inpaints"] for row in rows.values())


def test_none_of_them_is_what_flux_enabled_asks_for(folders: dict[str, Any], tmp_path: Any) -> None:
    entry = f'[[models]]\nname = "three"\nfamily = "sd3.5"\nfolder = "{folders["sd3.5"]}"\n'
    (tmp_path / "models.toml").write_text(f"embedded = false\n{entry}")
    assert models_file.read(tmp_path / "models.toml").default_flux is None
    (tmp_path / "models.toml").write_text(f'default_flux = "three"\n{entry}')
    with pytest.raises(models_file.BadModelsFile, match="default_flux"):
        models_file.read(tmp_path / "models.toml")


@FIRST
def test_a_lora_in_diffusers_names_is_placed(loaded: dict[str, LoadedModel], name: str, tmp_path: Any) -> None:
    model = loaded[name]
    query = "transformer_blocks.1.attn.to_q"
    rows, columns = model.denoiser.root.get_submodule(query).weight.shape  # type: ignore[misc, union-attr]
    generator = torch.Generator().manual_seed(0)
    change = {
        f"transformer.{query}.lora_A.weight": torch.randn(4, columns, generator=generator),
        f"transformer.{query}.lora_B.weight": torch.randn(rows, 4, generator=generator),
    }
    save_file(change, tmp_path / "ink.safetensors")
    lora = Lora(name="ink", path=tmp_path / "ink.safetensors")
    params = replace(PARAMS, steps=2)
    before = pixels(model.generate(params, NoCache(), ignore).images)
    drawn = model.generate(replace(params, loras=(lora,)), NoCache(), ignore)
    assert drawn.warnings == []
    assert not np.array_equal(pixels(drawn.images), before)
    assert np.array_equal(pixels(model.generate(params, NoCache(), ignore).images), before)
