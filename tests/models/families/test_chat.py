"""FLUX.2 and Z-Image at small width: equal to the plain pipelines, cached, and each picture by itself."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cache import FirstBlockCache, NoCache
from models.base import GenerationParams, Img2Img, Inpaint, Lora, ModelSpec, Multiscale
from models.decoders import linear
from models.errors import AdapterFailed, DrawsFromNoise, LoadFailed
from models.families import FAMILIES
from models.generation import LoadedModel
from models.libraries import quiet
from models.loading.checkpoints import CheckpointFolder
from models.registry import Registry
from models.run import sibling_of
from tests.models.families.chat import TEXT_LENGTH, save_all
from tests.models.test_generation import generators, ignore, pixels

FAMILIES_OF_CHAT = ("flux2-klein", "flux2-klein-base", "z-image", "z-image-turbo")
PARAMS = GenerationParams(
    prompt="a misty forest", width=64, height=64, steps=4, guidance_scale=3.0, seeds=(7, 8), batch_size=2
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folders = save_all(tmp_path_factory.mktemp("chat"))
    return {
        name: LoadedModel(FAMILIES[name].load(ModelSpec(name=name, family=name, source=folder), "cpu"))
        for name, folder in folders.items()
    }


def plain(model: LoadedModel, params: GenerationParams, **changes: Any) -> np.ndarray:
    """What diffusers draws by itself, one picture a text and seed."""
    pipeline: Any = model.pipeline
    if params.img2img is not None:
        pipeline = sibling_of(pipeline, "Img2Img")
        changes |= {"image": [params.img2img.picture] * len(params.seeds), "strength": params.img2img.denoise}
    arguments = {
        "prompt": [params.prompt] * len(params.seeds),
        "num_inference_steps": params.steps,
        "width": params.width,
        "height": params.height,
        "guidance_scale": params.guidance_scale,
        "generator": generators(params),
        "max_sequence_length": TEXT_LENGTH,
    }
    if "z-image" in model.spec.family:
        arguments["negative_prompt"] = [params.negative_prompt] * len(params.seeds)
    elif params.negative_prompt:  # the pipeline reads no other text than none, and takes one that was read
        negative = pipeline.encode_prompt(params.negative_prompt, max_sequence_length=TEXT_LENGTH)[0]
        arguments["negative_prompt_embeds"] = negative.repeat(len(params.seeds), 1, 1)
    with quiet(), torch.no_grad():
        return pixels(pipeline(**arguments | changes).images)


@pytest.mark.parametrize("name", FAMILIES_OF_CHAT)
@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 0.0}, {"width": 96, "negative_prompt": "rain"}], ids=str)
def test_off_and_at_threshold_0_the_plain_pipelines_pictures_come_out(
    loaded: dict[str, LoadedModel], name: str, changes: dict[str, Any]
) -> None:
    model, params = loaded[name], replace(PARAMS, steps=2, **changes)
    expected = plain(model, params)
    assert expected.std() > 0
    for strategy in (NoCache(), FirstBlockCache(threshold=0.0)):
        drawn = model.generate(params, strategy, ignore)
        assert np.array_equal(pixels(drawn.images), expected)
        assert drawn.reports[0].reused == 0


@pytest.mark.parametrize("name", FAMILIES_OF_CHAT)
def test_its_cache_acts_and_leaves_no_trace(loaded: dict[str, LoadedModel], name: str) -> None:
    model = loaded[name]
    before = model.generate(PARAMS, NoCache(), ignore)
    cached = model.generate(PARAMS, FirstBlockCache(threshold=1.0, max_consecutive=1), ignore)
    (report,) = cached.reports
    lanes = 2 if name == "flux2-klein-base" else 1  # with text and without, in calls of their own
    assert report.decisions == "".join(letter * lanes for letter in "CRCC")  # the last call computes
    assert 0 < report.reuse_cost < 1
    assert report.settings["correction"] is True
    assert not np.array_equal(pixels(cached.images), pixels(before.images))
    assert np.array_equal(pixels(model.generate(PARAMS, NoCache(), ignore).images), pixels(before.images))


SHORT, LONG = "a fox", "a fox in mist"  # of other lengths, which are filled up to as many tokens
LONGER = "a fox in a forest of old trees"  # and to more than they


@pytest.mark.parametrize("strategy", [NoCache(), FirstBlockCache(threshold=0.6)], ids=str)
@pytest.mark.parametrize("name", FAMILIES_OF_CHAT)
def test_a_picture_does_not_depend_on_its_neighbours(loaded: dict[str, LoadedModel], name: str, strategy: Any) -> None:
    model = loaded[name]
    requests = [
        replace(PARAMS, prompt=prompt, negative_prompt=no, seeds=(seed,), batch_size=1)
        for seed, (prompt, no) in enumerate([(SHORT, "rain"), (LONG, ""), (LONGER, "snow")])
    ]
    together = model.generate_together(requests, strategy, lambda steps: None)
    fill_up_to_32 = name.startswith("z-image")
    assert [one.batches for one in together] == ([[2], [], [1]] if fill_up_to_32 else [[3], [], []])
    for request, one in zip(requests, together, strict=True):
        alone = model.generate(request, strategy, ignore)
        # Another number of rows is summed in another order.
        assert np.abs(pixels(one.images).astype(int) - pixels(alone.images)).max() <= 2
        assert one.reports[0].decisions == alone.reports[0].decisions
        assert one.reports[0].item_decisions == alone.reports[0].item_decisions
    assert np.abs(pixels(together[0].images).astype(int) - pixels(together[1].images)).max() > 20


def picture(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("denoise", [0.5, 1.0])
def test_z_image_draws_over_pictures_as_diffusers_does(loaded: dict[str, LoadedModel], denoise: float) -> None:
    model, params = loaded["z-image"], replace(PARAMS, img2img=Img2Img(picture=picture(), denoise=denoise))
    for strategy in (NoCache(), FirstBlockCache(threshold=0.0)):
        drawn = model.generate(params, strategy, ignore)
        assert np.array_equal(pixels(drawn.images), plain(model, params))
        assert drawn.stages[0].steps == 4 * denoise
    heun = model.generate(replace(params, sampler="heun"), NoCache(), ignore)
    assert len(heun.reports[0].decisions) == 2 * 4 * denoise - 1


def test_z_image_draws_within_a_mask(loaded: dict[str, LoadedModel]) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    over = Img2Img(picture=picture(), denoise=0.75, inpaint=Inpaint(mask=mask, blur=0))
    drawn = loaded["z-image"].generate(replace(PARAMS, img2img=over), FirstBlockCache(threshold=1.0), ignore)
    kept, before = pixels(drawn.images), np.asarray(picture())[None]
    outside = np.asarray(mask) == 0
    assert np.array_equal(kept[:, outside], np.repeat(before[:, outside], 2, axis=0))
    assert not np.array_equal(kept[:, ~outside], np.repeat(before[:, ~outside], 2, axis=0))
    assert drawn.reports[0].reused > 0


@pytest.mark.parametrize(
    "changes",
    [{"img2img": Img2Img(picture=picture())}, {"hires_fix": True}, {"adetailer": True}],
    ids=["img2img", "hires_fix", "adetailer"],
)
def test_flux2_over_a_picture_is_refused(loaded: dict[str, LoadedModel], changes: dict[str, Any]) -> None:
    with pytest.raises(DrawsFromNoise, match="take a model of another family"):
        loaded["flux2-klein"].generate(replace(PARAMS, **changes), NoCache(), ignore)


@pytest.mark.parametrize("name", ["flux2-klein-base", "z-image"])
def test_steps_at_half_size_estimate_the_same_picture(loaded: dict[str, LoadedModel], name: str) -> None:
    """A denoiser that answers with the velocity to a picture of low frequencies gets that picture at either size."""
    model, params = loaded[name], replace(PARAMS, width=128, height=128, steps=6)
    scales = Multiscale(fullres_start=1, fullres_end=1, intermittent=False)
    drawn = model.generate(replace(params, multiscale=scales), NoCache(), ignore)
    assert set(drawn.stages[0].sizes) == {"F", "S"}
    assert np.isfinite(pixels(drawn.images)).all()
    layout, prediction = model.model.layout, model.model.prediction(model.pipeline.scheduler)
    clean, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    reversed_time = name == "z-image"
    for time in (0.9, 0.3):
        level = prediction.at(1 - time if reversed_time else time)
        x, answer = (1 - time) * clean + time * noise, (clean - noise) * (1 if reversed_time else -1)
        torch.testing.assert_close(prediction.clean(x, answer, level), clean)
        torch.testing.assert_close(prediction.output(x, clean, level), answer)
        assert prediction.of_ratio(level.sigma / level.alpha).timestep == pytest.approx(level.timestep)
    torch.testing.assert_close(layout.grid(layout.flat(clean), 16, 16), clean)


def test_guidance_in_a_part_of_a_run_is_z_images_own_truncation(loaded: dict[str, LoadedModel]) -> None:
    model, params = loaded["z-image"], replace(PARAMS, guidance_end=0.5)
    drawn = model.generate(params, NoCache(), ignore)
    assert drawn.stages[0].halves == "BBTT"
    times = 1 - model.pipeline.scheduler.timesteps / 1000  # of the run before: the second and third of four
    plain(model, PARAMS)
    times = 1 - model.pipeline.scheduler.timesteps / 1000
    expected = plain(model, PARAMS, cfg_truncation=float(times[1] + times[2]) / 2)
    assert np.abs(pixels(drawn.images).astype(int) - expected).max() <= 1
    base = loaded["flux2-klein-base"].generate(params, NoCache(), ignore)
    assert base.stages[0].halves == "TNTNTT"


@pytest.mark.parametrize("name", ["flux2-klein", "z-image-turbo"])
def test_previews_are_pictures_of_the_estimate(loaded: dict[str, LoadedModel], name: str) -> None:
    """The last step's estimate is the picture itself, but for what JPEG makes of its noise."""
    model, steps = loaded[name], []
    (drawn,) = model.generate(
        replace(PARAMS, guidance_scale=0.0, seeds=(7,), preview=True), NoCache(), steps.append
    ).images

    def colours(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(int)

    last = colours(Image.open(io.BytesIO(steps[-1].preview)))
    assert np.abs(last - colours(drawn)).mean() < 2


@pytest.mark.parametrize("name", ["flux2-klein", "z-image-turbo"])
def test_the_autoencoders_latents_are_the_denoisers_and_back(loaded: dict[str, LoadedModel], name: str) -> None:
    model, latents = loaded[name].model, torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(model.encoded(model.decodable(latents)), latents)
    assert not torch.allclose(model.decodable(latents), latents)
    assert linear(model)(latents).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", FAMILIES_OF_CHAT)
def test_what_has_no_effect_or_is_not_read_is_said(loaded: dict[str, LoadedModel], name: str) -> None:
    model = loaded[name]
    unguided = replace(PARAMS, negative_prompt="rain", guidance_scale=0.0, steps=1)
    said = model.generate(unguided, NoCache(), ignore).warnings
    assert any("The negative prompt has no effect" in sentence for sentence in said)
    said = model.generate(replace(PARAMS, prompt="a fox " * 20, steps=1), NoCache(), ignore).warnings
    assert any(f"reads {TEXT_LENGTH} tokens; the prompt has" in sentence for sentence in said)
    said = model.generate(replace(PARAMS, steps=1), NoCache(), ignore).warnings
    assert bool(said) == (name == "flux2-klein")  # which is distilled: no scale is an effect


def test_a_negative_prompt_is_read_at_any_scale_that_guides(loaded: dict[str, LoadedModel]) -> None:
    """Z-Image guides above 0, where others do above 1: remembered texts are told apart."""
    model = loaded["z-image"]
    for scale in (0.0, 0.5, 1.0, 0.0):
        params = replace(PARAMS, negative_prompt="rain", guidance_scale=scale, steps=1)
        drawn = model.generate(params, NoCache(), ignore)
        assert np.array_equal(pixels(drawn.images), plain(model, params))


@pytest.mark.parametrize(
    ("family", "given", "word"),
    [
        ("flux2-klein", "flux2-klein-base", "is_distilled"),
        ("flux2-klein-base", "flux2-klein", "is_distilled"),
        ("z-image", "flux2-klein", "Flux2KleinPipeline"),
        ("flux-dev", "z-image", "ZImagePipeline"),
    ],
)
def test_a_folder_of_another_family_is_refused(
    family: str, given: str, word: str, loaded: dict[str, LoadedModel]
) -> None:
    spec = ModelSpec(name="wrong", family=family, source=loaded[given].spec.source)
    with pytest.raises(LoadFailed, match=f"(?s){word}.*Name the right family"):
        FAMILIES[family].load(spec, "cpu")


def test_folders_and_files_are_known_by_what_they_hold(loaded: dict[str, LoadedModel]) -> None:
    folder = loaded["z-image"].spec.source.parent
    names = {
        "flux2.safetensors": ("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"),
        "z.safetensors": ("noise_refiner.0.attention.qkv.weight", "layers.0.attention.qkv.weight"),
    }
    for name, keys in names.items():
        tensors = {key: torch.zeros(2, 2) for key in (*keys, "img_in.weight", "final_layer.linear.weight")}
        save_file(tensors, folder / name)
    checkpoints = CheckpointFolder(folder)
    checkpoints.scan()
    served, unserved = checkpoints.models([])
    assert {spec.name: spec.family for spec in served} == {name: name for name in FAMILIES_OF_CHAT}
    assert "is a FLUX.2 as one file" in unserved["flux2"]
    assert "is a Z-Image or Lumina 2 as one file" in unserved["z"]
    rows = {row["family"]: row for row in Registry(served, "z-image", None).describe()}
    assert {row["native_width"] for row in rows.values()} == {1024}
    assert all(row["error"] is None for row in rows.values())


@pytest.mark.parametrize("name", ["flux2-klein", "z-image-turbo"])
def test_a_lora_in_diffusers_names_is_placed_and_others_are_refused(
    loaded: dict[str, LoadedModel], name: str, tmp_path: Path
) -> None:
    model, params = loaded[name], replace(PARAMS, guidance_scale=0.0, steps=1)
    path = "single_transformer_blocks.0.attn.to_qkv_mlp_proj" if name == "flux2-klein" else "layers.0.attention.to_q"
    weight = model.pipeline.transformer.get_submodule(path).weight
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)

    def drawn(keys: dict[str, torch.Tensor]) -> np.ndarray:
        save_file(keys, tmp_path / "ink.safetensors")
        lora = Lora(name="ink", path=tmp_path / "ink.safetensors")
        return pixels(model.generate(replace(params, loras=(lora,)), NoCache(), ignore).images)

    found = drawn({f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up})
    saved = weight.clone()
    weight.data += up @ down
    expected = pixels(model.generate(params, NoCache(), ignore).images)
    weight.data.copy_(saved)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert not np.array_equal(found, pixels(model.generate(params, NoCache(), ignore).images))
    theirs = (
        "diffusion_model.double_blocks.0.img_attn.qkv" if name == "flux2-klein" else "lora_unet_layers_0_attention_qkv"
    )
    with pytest.raises(AdapterFailed, match="leave it out of loras"):
        drawn({f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": up})
