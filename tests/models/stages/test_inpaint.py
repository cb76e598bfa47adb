"""Drawing within a mask: diffusers' own pipelines where they do the same, and each pixel that the mask keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxFillPipeline,
    FluxInpaintPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image, ImageDraw

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models import faces, limits, masks
from models.base import Fill, GenerationParams, Img2Img, Inpaint, ModelSpec, Multiscale
from models.embedded import SPECS
from models.families import FAMILIES
from models.families.flux import FluxModel
from models.generation import LoadedModel
from models.libraries import quiet
from models.sampling import samplers
from models.stages.inpaint import close_up
from tests.models.conftest import BETAS, TWO_LEVELS, save_flux, save_sd, save_sdxl
from tests.models.stages.test_stages import PARAMS, ignore, picture, pixels

SIDE = 64


def box(*corners: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A mask with a white rectangle, its corners inside."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(corners, fill=255)
    return mask


MASK = box(16, 24, 47, 55)


def within(mask: Image.Image = MASK, denoise: float = 0.75, size: int = SIDE, **settings: Any) -> GenerationParams:
    over = Img2Img(picture=picture(size, size), denoise=denoise, inpaint=Inpaint(mask=mask, **settings))
    return replace(PARAMS, width=size, height=size, batch_size=2, img2img=over)


def by_diffusers(model: Any, params: GenerationParams, mask: Image.Image) -> np.ndarray:
    """diffusers' own pipeline over the same components, with nothing of ours in between: what it decodes."""
    over, count = params.img2img or Img2Img(picture=picture(SIDE, SIDE), denoise=1.0), len(params.seeds)
    arguments: dict[str, Any] = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "image": [over.picture] * count,
        "mask_image": mask,
        "strength": over.denoise,
        "num_images_per_prompt": count,
        "num_inference_steps": params.steps,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in params.seeds],
        "width": params.width,
        "height": params.height,
        "guidance_scale": params.guidance_scale,
    }
    parts = model.pipeline.components
    if params.scheduler == "ays":
        parts = {**parts, "scheduler": EulerDiscreteScheduler.from_config(parts["scheduler"].config)}
        arguments["timesteps"] = samplers.custom_timesteps("ays", params.steps)
    name = type(model.pipeline).__name__
    with quiet():
        if isinstance(model.model, FluxModel):
            parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
            fills = name == "FluxFillPipeline"
            pipeline = FluxFillPipeline(**parts) if fills else FluxInpaintPipeline(**parts)
            arguments |= {"max_sequence_length": 16}
            if fills:
                del arguments["negative_prompt"]
            else:
                arguments |= {"true_cfg_scale": params.guidance_scale}
        elif name == "StableDiffusionXLPipeline":
            arguments["negative_prompt"] = params.negative_prompt or None  # zeros, its own default
            pipeline = StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
        else:
            pipeline = StableDiffusionInpaintPipeline(**{**parts, "unet": None}, requires_safety_checker=False)
            pipeline.register_modules(unet=parts["unet"])  # its check of sample_size takes no oblong one
        pipeline.set_progress_bar_config(disable=True)
        return pixels(pipeline(**arguments).images)


def under(mask: Image.Image, kept: Image.Image, drawn: np.ndarray) -> np.ndarray:
    """`drawn` where the mask is white, the picture elsewhere."""
    return np.where((np.asarray(mask) > 0)[..., None], drawn, np.asarray(kept))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    """Models that were trained to inpaint, of each family, by its name."""
    folder = tmp_path_factory.mktemp("inpainting")
    torch.manual_seed(5)
    saved = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    made = {
        "sd": save_sd(folder / "sd", {**TWO_LEVELS, "in_channels": 9}, {}, saved),
        "sdxl": save_sdxl(folder / "sdxl", in_channels=9),
        "flux-fill": save_flux(folder / "flux-fill", guidance=True, fills=True),
    }
    return {
        name: LoadedModel(FAMILIES[name].load(ModelSpec(name=name, family=name, source=path), "cpu"))
        for name, path in made.items()
    }


@pytest.fixture(scope="module")
def tiny_sd() -> LoadedModel:
    (spec,) = [spec for spec in SPECS if spec.name == "tiny-sd"]
    return LoadedModel(FAMILIES[spec.family].load(spec, "cpu"))


@pytest.fixture(params=["sd", "sdxl", "flux"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    return loaded


@pytest.mark.parametrize("denoise", [0.35, 1.0])
def test_within_a_mask_diffusers_own_pipelines_draw_and_outside_the_picture_stays(
    model: LoadedModel, denoise: float
) -> None:
    """The mask's edges are those of latents; where they are not, `masks.cells` sees more of it than diffusers."""
    params = within(denoise=denoise, blur=0)
    drawn = model.generate(params, NoCache(), ignore)
    kept = picture(SIDE, SIDE)
    assert np.array_equal(pixels(drawn.images), under(MASK, kept, by_diffusers(model, params, MASK)))
    assert [one.name for one in drawn.stages] == ["inpaint"]
    assert not np.array_equal(pixels(drawn.images)[0], pixels(drawn.images)[1])


@pytest.mark.parametrize("denoise", [0.5, 1.0])
def test_within_a_mask_a_list_of_timesteps_is_begun_where_its_steps_begin(sd: LoadedModel, denoise: float) -> None:
    """Align Your Steps, which a pipeline is handed as a list."""
    params = replace(within(denoise=denoise, blur=0), sampler="euler", scheduler="ays")
    drawn = sd.generate(params, NoCache(), ignore)
    expected = under(MASK, picture(SIDE, SIDE), by_diffusers(sd, params, MASK))
    assert np.array_equal(pixels(drawn.images), expected)
    assert drawn.stages[0].steps == denoise * params.steps


def test_a_latent_is_drawn_where_the_mask_touches_it(sd: LoadedModel) -> None:
    """diffusers looks at one pixel of each, and would draw nothing of this line."""
    line = box(3, 13, 60, 13)
    params = within(line, blur=0)
    touched = box(0, 8, 63, 15)
    drawn = pixels(sd.generate(params, NoCache(), ignore).images)
    assert np.array_equal(drawn, under(line, picture(SIDE, SIDE), by_diffusers(sd, params, touched)))
    assert not np.array_equal(drawn[0], np.asarray(picture(SIDE, SIDE)))


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux-fill"])
def test_checkpoints_for_inpainting_draw_as_diffusers_lets_them(checkpoints: dict[str, LoadedModel], name: str) -> None:
    model = checkpoints[name]
    for denoise in (0.5, 1.0):
        params = replace(within(denoise=denoise, blur=0), steps=4)
        drawn = pixels(model.generate(params, NoCache(), ignore).images)
        assert np.array_equal(drawn, under(MASK, picture(SIDE, SIDE), by_diffusers(model, params, MASK)))
    everything = masks.everything((SIDE, SIDE))
    plain = replace(PARAMS, steps=4, batch_size=2)
    assert np.array_equal(
        pixels(model.generate(plain, NoCache(), ignore).images), by_diffusers(model, plain, everything)
    )
    over = replace(plain, img2img=Img2Img(picture=picture(SIDE, SIDE), denoise=0.5))
    assert np.array_equal(pixels(model.generate(over, NoCache(), ignore).images), by_diffusers(model, over, everything))


@pytest.mark.parametrize(("name", "cache"), [("sd", DeepCache(interval=2)), ("flux-fill", FirstBlockCache(1.0))])
def test_checkpoints_for_inpainting_run_under_their_caches(
    checkpoints: dict[str, LoadedModel], name: str, cache: CacheStrategy
) -> None:
    """As a worker does that warms its model up; a request with a mask may have the first-block cache alone."""
    drawn = checkpoints[name].generate(replace(PARAMS, seeds=(7,)), cache, ignore)
    assert drawn.reports[0].hit_rate > 0


@pytest.mark.parametrize("blur", [0, 2])
@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize(
    "beside",
    [{}, {"hires_fix": True}, {"multiscale": Multiscale(fullres_start=1, fullres_end=1)}, {"adetailer": True}],
    ids=lambda beside: "".join(beside),
)
def test_what_the_mask_keeps_is_the_picture_whatever_else_is_asked(
    sd: LoadedModel, monkeypatch: pytest.MonkeyPatch, beside: dict[str, Any], padding: int | None, blur: int
) -> None:
    """A blur of σ reaches no further than 3σ."""
    monkeypatch.setattr(
        faces, "finder", lambda detector: lambda image: [faces.Box(40, 40, 30, 30), faces.Box(0, 0, 8, 8)]
    )
    size, mask = 96, box(30, 30, 69, 59, size=(96, 96))
    params = replace(within(mask, size=size, blur=blur, padding=padding), seeds=(7,), steps=4, **beside)
    drawn, kept = pixels(sd.generate(params, NoCache(), ignore).images)[0], np.asarray(picture(size, size))
    reach = 3 * blur
    outside = np.asarray(box(30 - reach, 30 - reach, 69 + reach, 59 + reach, size=(96, 96))) == 0
    assert np.array_equal(drawn[outside], kept[outside])
    assert (drawn[40:50, 40:60] != kept[40:50, 40:60]).any(-1).mean() > 0.9


def test_faces_outside_of_the_mask_cost_nothing(sd: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "finder", lambda detector: lambda image: [faces.Box(0, 0, 12, 12)])
    drawn = sd.generate(replace(within(), adetailer=True), NoCache(), ignore)
    assert [one.name for one in drawn.stages] == ["inpaint"]
    assert "no face in what was drawn of the picture of seed 7" in drawn.warnings[0]


def test_the_close_up_is_drawn_at_the_request_s_size(sd: LoadedModel) -> None:
    """By hand: cut, enlarged, drawn over within the enlarged mask, made small and put back."""
    mask = box(20, 28, 35, 43)
    params = within(mask, blur=0, padding=8, denoise=0.6)
    frame = close_up(mask, mask, 8)
    assert frame == (12, 20, 44, 52)
    kept = picture(SIDE, SIDE)
    close = kept.crop(frame).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    wide = mask.crop(frame).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    inner = replace(params, img2img=Img2Img(picture=close, denoise=0.6))
    expected = []
    for drawn in by_diffusers(sd, inner, wide):
        whole = kept.copy()
        whole.paste(Image.fromarray(drawn).resize((32, 32), Image.Resampling.LANCZOS), frame[:2])
        expected.append(np.asarray(whole))
    assert np.array_equal(pixels(sd.generate(params, NoCache(), ignore).images), under(mask, kept, np.stack(expected)))


@pytest.mark.parametrize(
    ("corners", "padding", "frame"),
    [
        ((10, 10, 19, 19), 0, (5, 10, 25, 20)),  # grown to the picture's aspect
        ((0, 0, 9, 9), 20, (0, 0, 100, 50)),  # moved to lie within
        ((90, 40, 99, 49), 0, (80, 40, 100, 50)),
        ((0, 0, 99, 49), 32, (0, 0, 100, 50)),  # no larger than the picture
        ((50, 25, 50, 25), 0, (49, 25, 51, 26)),
    ],
)
def test_a_close_up_has_the_picture_s_aspect_and_lies_within(
    corners: tuple[int, int, int, int], padding: int, frame: tuple[int, int, int, int]
) -> None:
    mask = box(*corners, size=(100, 50))
    assert close_up(mask, mask, padding) == frame


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_filled_with_noise_nothing_of_the_picture_is_left_in_the_mask(
    request: pytest.FixtureRequest, name: str
) -> None:
    """What the denoiser sees first, half-way through the schedule, of two pictures: apart without the fill."""
    model: LoadedModel = request.getfixturevalue(name)
    root, layout = model.denoiser.root, model.model.layout

    def first_seen(start: Image.Image, fill: Fill) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def look(module: object, args: Any, kwargs: Any) -> None:
            latents, _ = layout.input_of(args, kwargs)
            seen.append(layout.grid(latents, SIDE // 8, SIDE // 8)[:1])

        over = Img2Img(picture=start, denoise=0.5, inpaint=Inpaint(mask=MASK, fill=fill))
        with root.register_forward_pre_hook(look, with_kwargs=True):
            model.generate(replace(PARAMS, seeds=(7,), steps=2, img2img=over), NoCache(), ignore)
        return seen[0]

    other = Image.new("RGB", (SIDE, SIDE), (0, 255, 0))
    inside = (..., slice(3, 7), slice(2, 6))
    for fill, same in (("original", False), ("noise", True)):
        one, two = (first_seen(start, fill) for start in (picture(SIDE, SIDE), other))  # type: ignore[arg-type]
        assert torch.equal(one[inside], two[inside]) is same
        assert not torch.equal(one, two)


def test_items_of_a_batch_reuse_apart_and_are_what_they_are_alone(flux: LoadedModel) -> None:
    params = replace(within(), seeds=(7, 8, 9), batch_size=3, steps=8)
    cache = FirstBlockCache(threshold=0.32)
    together = flux.generate(params, cache, ignore)
    assert 0 < together.reports[0].hit_rate < 1
    for index, seed in enumerate(params.seeds):
        alone = flux.generate(replace(params, seeds=(seed,)), cache, ignore)
        apart = np.abs(pixels(alone.images)[0].astype(int) - pixels(together.images)[index])
        assert apart.max() <= 1  # the rounding that a batch's size brings


@pytest.mark.parametrize("aspect", [(192, 128), (128, 192), (64, 64), (100, 99)])
def test_what_is_put_around_a_picture_is_what_fitting_cuts_off(aspect: tuple[int, int]) -> None:
    """So a model that draws at another aspect than the request's draws each pixel in its place."""
    start = picture(SIDE, 48)
    wide = masks.widened(start, *aspect)
    assert abs(wide.width * aspect[1] - wide.height * aspect[0]) <= 2 * max(aspect)
    assert np.array_equal(np.asarray(limits.fit(wide, SIDE, 48)), np.asarray(start))


def test_a_border_repeats_the_edge() -> None:
    start = np.arange(6, dtype=np.uint8).reshape(2, 3)
    wide = np.asarray(masks.extended(Image.fromarray(start), 1, 0, 2, 1))
    assert wide.tolist() == [[0, 0, 1, 2, 2, 2], [3, 3, 4, 5, 5, 5], [3, 3, 4, 5, 5, 5]]


@pytest.mark.parametrize("size", [(160, 96), (128, 256)], ids=str)
def test_a_model_of_other_latents_and_of_its_own_sizes_leaves_what_the_mask_keeps(
    tiny_sd: LoadedModel, size: tuple[int, int]
) -> None:
    """tiny-sd's latents have eight channels, which diffusers' pipeline does not take by itself."""
    kept, mask = picture(*size), box(40, 30, 99, 69, size=size)
    over = Img2Img(picture=kept, inpaint=Inpaint(mask=mask, blur=0))
    params = replace(PARAMS, width=size[0], height=size[1], seeds=(7,), steps=4, img2img=over)
    drawn = tiny_sd.generate(params, NoCache(), ignore)
    assert np.array_equal(pixels(drawn.images)[0], under(mask, kept, pixels(drawn.images)[0]))
    assert (pixels(drawn.images)[0][30:70, 40:100] != np.asarray(kept)[30:70, 40:100]).any(-1).mean() > 0.9
