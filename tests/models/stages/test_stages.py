"""Each pass against diffusers, its own definition or a loop written here; passes together; a cancel in each."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from skimage import data

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models import faces
from models.base import GenerationParams, Img2Img, ModelSpec, Multiscale, Step
from models.decoders import linear
from models.embedded import SPECS
from models.errors import GenerationCancelled, TooFewSteps
from models.families.flux import FluxModel
from models.families.sd import SD as SD_FAMILY
from models.families.sdxl import SDXLModel
from models.generation import LoadedModel
from models.libraries import quiet
from models.sampling import samplers
from models.stages.detail import ADetailer, around
from models.stages.drawing import Clock, Drawing, Progress
from models.stages.preview import Previews

PARAMS = GenerationParams(prompt="a misty forest", width=64, height=64, steps=6, guidance_scale=3.0, seeds=(7, 8))


def ignore(step: Step) -> None:
    """A step hook that wants nothing."""


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def spelled(value: object) -> str:
    """A test's name, the same in every process: how a picture is written holds its address."""
    return re.sub("<PIL.*?>", "a picture", str(value))


def picture(width: int, height: int) -> Image.Image:
    """A blue gradient with a red square."""
    levels = np.zeros((height, width, 3), np.uint8)
    levels[..., 2] = np.linspace(0, 255, width, dtype=np.uint8)
    levels[height // 4 : height // 2, width // 4 : width // 2] = (255, 0, 0)
    return Image.fromarray(levels)


@pytest.fixture(params=["sd", "sdxl", "flux"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    return loaded


@pytest.fixture(scope="module")
def small(small_folders: dict[str, Path]) -> LoadedModel:
    spec = ModelSpec(name="small", family="sd", source=small_folders["v_prediction"])
    return LoadedModel(SD_FAMILY.load(spec, "cpu"))


def stable_diffusion_img2img(model: Any) -> StableDiffusionImg2ImgPipeline:
    parts = {**model.pipeline.components, "unet": None, "requires_safety_checker": False}
    pipeline = StableDiffusionImg2ImgPipeline(**parts)  # its check of the UNet's sample_size takes no oblong one
    pipeline.register_modules(unet=model.pipeline.unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_img2img(model: Any, params: GenerationParams) -> list[Image.Image]:
    """diffusers' own pipeline over the same components, with nothing of ours in between."""
    assert params.img2img is not None
    count = len(params.seeds)
    arguments: dict[str, Any] = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "image": [params.img2img.picture] * count,
        "strength": params.img2img.denoise,
        "num_images_per_prompt": count,
        "num_inference_steps": params.steps,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in params.seeds],
    }
    with quiet():
        if isinstance(model.model, FluxModel):
            pipeline = FluxImg2ImgPipeline(**model.pipeline.components)
            size = {"width": params.width, "height": params.height}
            arguments |= {"true_cfg_scale": params.guidance_scale, "max_sequence_length": 16, **size}
        else:
            arguments |= {"guidance_scale": params.guidance_scale}
            if isinstance(model.model, SDXLModel):
                arguments["negative_prompt"] = params.negative_prompt or None  # zeros, its own default
                parts = {**model.pipeline.components, "add_watermarker": False}
                pipeline = StableDiffusionXLImg2ImgPipeline(**parts)
            else:
                pipeline = stable_diffusion_img2img(model)
        pipeline.set_progress_bar_config(disable=True)
        images: list[Image.Image] = pipeline(**arguments).images
    return images


@pytest.mark.parametrize("denoise", [0.35, 0.75, 1.0])
def test_img2img_is_diffusers_own(model: LoadedModel, denoise: float) -> None:
    """0.35 of 6 steps is 2.1: the families round it apart, and so does diffusers."""
    params = replace(PARAMS, batch_size=2, img2img=Img2Img(picture=picture(64, 64), denoise=denoise))
    steps: list[Step] = []
    drawn = model.generate(params, NoCache(), steps.append)
    assert np.array_equal(pixels(drawn.images), pixels(diffusers_img2img(model, params)))
    assert len(steps) == steps[0].total == drawn.stages[0].steps
    assert [one.name for one in drawn.stages] == ["img2img"]


def test_an_upload_is_cut_to_the_drawings_aspect(sd: LoadedModel) -> None:
    wide = picture(256, 64)
    cut = wide.crop((96, 0, 160, 64))
    drawn = sd.generate(replace(PARAMS, img2img=Img2Img(picture=wide)), NoCache(), ignore)
    same = sd.generate(replace(PARAMS, img2img=Img2Img(picture=cut)), NoCache(), ignore)
    assert np.array_equal(pixels(drawn.images), pixels(same.images))


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_every_sampler_begins_from_a_picture(small: LoadedModel, sampler: str) -> None:
    params = replace(PARAMS, sampler=sampler, seeds=(7,), img2img=Img2Img(picture=picture(64, 64), denoise=0.5))
    steps: list[Step] = []
    drawn = small.generate(params, NoCache(), steps.append)
    assert [(step.index, step.total) for step in steps] == [(index, 3) for index in range(3)]
    assert np.isfinite(pixels(drawn.images)).all()


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_list_of_timesteps_is_begun_where_its_steps_begin(small: LoadedModel, sampler: str) -> None:
    over = Img2Img(picture=picture(64, 64), denoise=0.5)
    params = replace(PARAMS, sampler=sampler, scheduler="ays", seeds=(7,), img2img=over)
    steps: list[Step] = []
    drawn = small.generate(params, NoCache(), steps.append)
    assert "".join(step.decision for step in steps) == ("CCC" if sampler == "euler" else "CCCCC")
    assert len(steps) == drawn.stages[0].steps == 3


@pytest.mark.parametrize("sampler", samplers.FLOW_MATCHING)
def test_flux_begins_in_the_middle_of_the_schedule(flux: LoadedModel, sampler: str) -> None:
    """Heun's steps are two calls each, but for the last: its part of the schedule is counted in steps."""
    params = replace(PARAMS, sampler=sampler, seeds=(7,), guidance_scale=1.0, steps=20)
    seen = []
    for denoise in (0.1, 0.5, 1.0):
        steps: list[Step] = []
        start = replace(params, img2img=Img2Img(picture=picture(64, 64), denoise=denoise))
        seen.append(pixels(flux.generate(start, NoCache(), steps.append).images))
        assert len(steps) == steps[0].total == round(denoise * 20)
        calls = "".join(step.decision for step in steps)
        assert len(calls) == (len(steps) if sampler == "euler" else 2 * len(steps) - 1)
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])


def test_hires_fix_is_the_plain_picture_enlarged_and_drawn_over(sd: LoadedModel) -> None:
    """The first run is that of a request of half the size, with its own generator state carried on."""
    small = replace(PARAMS, width=96, height=96, seeds=(7,), guidance_scale=1.0)
    large = replace(small, width=192, height=192, hires_fix=True)
    first = sd.generate(small, NoCache(), ignore)
    drawn = sd.generate(large, NoCache(), ignore)
    assert [(one.name, one.width, one.height, one.steps) for one in drawn.stages] == [
        ("base", 96, 96, 6),
        ("hires_fix", 192, 192, 3),
    ]
    generator = torch.Generator("cpu").manual_seed(7)
    torch.randn((1, 4, 12, 12), generator=generator)  # what the first run drew
    with quiet():
        pipeline = stable_diffusion_img2img(sd)
        enlarged = first.images[0].resize((192, 192), Image.Resampling.LANCZOS)
        expected = pipeline(small.prompt, enlarged, 0.5, small.steps, guidance_scale=1.0, generator=[generator]).images
    assert np.array_equal(pixels(drawn.images), pixels(expected))


def test_hires_fix_with_nothing_to_enlarge_says_so(flux: LoadedModel) -> None:
    plain = flux.generate(PARAMS, NoCache(), ignore)
    drawn = flux.generate(replace(PARAMS, hires_fix=True), NoCache(), ignore)
    assert any("hires_fix had no effect" in sentence for sentence in drawn.warnings)
    assert np.array_equal(pixels(drawn.images), pixels(plain.images))


@pytest.mark.parametrize(
    ("name", "strategy"), [("sd", DeepCache(interval=2)), ("flux", FirstBlockCache(threshold=1.0))]
)
def test_a_cancel_in_any_step_of_any_pass_leaves_the_model_clean(
    request: pytest.FixtureRequest, name: str, strategy: CacheStrategy
) -> None:
    model: Any = request.getfixturevalue(name)
    params = replace(
        PARAMS, steps=4, seeds=(7,), width=96, height=96, hires_fix=True, img2img=Img2Img(picture=picture(96, 96))
    )
    before = model.generate(PARAMS, strategy, ignore)
    scheduler, attributes = model.pipeline.scheduler, set(model.denoiser.root.__dict__)
    steps: list[Step] = []
    model.generate(params, strategy, steps.append)
    for last in range(len(steps)):

        def stop(step: Step, last: int = last) -> None:
            if step.index == last:
                raise GenerationCancelled

        with pytest.raises(GenerationCancelled):
            model.generate(params, strategy, stop)
        assert model.pipeline.scheduler is scheduler
        assert set(model.denoiser.root.__dict__) == attributes
    after = model.generate(PARAMS, strategy, ignore)
    assert np.array_equal(pixels(after.images), pixels(before.images))


def test_previews_show_the_estimate_and_change_no_bit(model: LoadedModel) -> None:
    """After the last step the estimate is what is decoded: the last preview is the picture, as a JPEG."""
    params = replace(PARAMS, steps=11, seeds=(7,), width=96, guidance_scale=1.0)
    steps: list[Step] = []
    shown = model.generate(replace(params, preview=True), NoCache(), steps.append)
    assert np.array_equal(pixels(shown.images), pixels(model.generate(params, NoCache(), ignore).images))
    previews = [Image.open(io.BytesIO(step.preview)) for step in steps if step.preview is not None]
    assert len(previews) == 6  # after every second step, the first and the last among them
    assert {(picture.format, picture.size) for picture in previews} == {("JPEG", (96, 64))}
    buffer = io.BytesIO()
    shown.images[0].save(buffer, "JPEG", quality=80)
    last, final, first = (np.asarray(one).astype(float) for one in (previews[-1], Image.open(buffer), previews[0]))
    # DDIM's last step ends at the first training timestep, not quite at no noise.
    assert np.abs(last - final).mean() < 3 < np.abs(first - final).mean()
    assert scheduler_is_untouched(model)


def scheduler_is_untouched(model: Any) -> bool:
    return "step" not in model.pipeline.scheduler.__dict__


def test_previews_of_a_long_run_are_few_and_small() -> None:
    previews = Previews(lambda clean: torch.zeros(1, 3, 600, 300), steps=50)
    previews._estimate = torch.zeros(1)
    shown = {done: previews.after(done) for done in range(1, 51)}
    due = [done for done, data in shown.items() if data is not None]
    assert due == list(range(1, 51, 10))
    first = shown[1]
    assert first is not None
    assert Image.open(io.BytesIO(first)).size == (128, 256)
    assert Previews(None, 50).after(1) is None


def test_without_a_small_decoder_colours_are_a_fit_to_the_encoder() -> None:
    """The fit never saw this picture of the model's own, and follows its colours at an eighth of the size."""
    spec = next(spec for spec in SPECS if spec.name == "tiny-sd")
    tiny: Any = LoadedModel(SD_FAMILY.load(spec, "cpu"))
    params = replace(PARAMS, prompt="a clear sea at sunset", width=192, height=128, guidance_scale=3.0, seeds=(7,))
    (drawn,) = tiny.generate(params, NoCache(), ignore).images
    levels = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        clean = tiny.pipeline.vae.encode(levels).latent_dist.mode() * tiny.pipeline.vae.config.scaling_factor
        colours = linear(tiny.model)(clean)[0]
    small = torch.nn.functional.avg_pool2d(levels, 8)[0]
    assert colours.shape == small.shape
    correlation = torch.corrcoef(torch.stack([colours.flatten(), small.flatten()]))[0, 1]
    assert correlation > 0.75


def astronaut() -> Image.Image:
    return Image.fromarray(data.astronaut())


def drawing_of(model: Any, images: list[Image.Image], steps: list[Step]) -> Drawing:
    """A batch whose pictures are there already."""
    params = replace(PARAMS, width=512, height=512, seeds=tuple(range(len(images))), adetailer=True)
    with torch.no_grad(), quiet():
        encoded = model.model.encode(params)
        conditioning = {name: row.repeat_interleave(len(images), dim=0) for name, row in encoded.items()}
    clock, progress = Clock(torch.device("cpu")), Progress(steps.extend, 0)
    drawing = Drawing(model.model, params, params.seeds, conditioning, NoCache(), (512, 512), clock, progress)
    drawing.images = list(images)
    return drawing


def test_a_face_is_found_and_nothing_else_is() -> None:
    (box,) = faces.find(astronaut())
    # Eyes and mouth of the photograph, by hand: (203, 112), (242, 108), (222, 148).
    for x, y in ((203, 112), (242, 108), (222, 148)):
        assert box.left < x < box.left + box.width
        assert box.top < y < box.top + box.height
    assert box.width < 130
    assert faces.find(picture(512, 512)) == []
    assert faces.find(Image.new("RGB", (1, 1))) == []


def test_adetailer_draws_the_face_anew_and_nothing_else(model: LoadedModel) -> None:
    steps: list[Step] = []
    drawing = drawing_of(model, [picture(512, 512), astronaut()], steps)
    with torch.no_grad(), quiet():
        ADetailer().run(drawing)
    left, top, right, bottom = frame = around(faces.find(astronaut())[0], (512, 512))
    before, after = np.asarray(astronaut()).astype(int), np.asarray(drawing.images[1]).astype(int)
    changed = np.abs(after - before).sum(-1) > 0
    assert changed[(top + bottom) // 2, (left + right) // 2]
    assert changed.sum() > 0.2 * (right - left) * (bottom - top)
    changed[top:bottom, left:right] = False
    assert not changed.any()
    edge = np.zeros_like(changed)
    edge[[top, bottom - 1], left:right] = edge[top:bottom, [left, right - 1]] = True
    assert np.abs(after - before)[edge].max() <= 2  # the mask's soft edge has run out
    assert np.array_equal(np.asarray(drawing.images[0]), np.asarray(picture(512, 512)))
    assert [one.name for one in drawing.stages] == ["adetailer"]
    assert len(steps) == drawing.progress.total == drawing.stages[0].steps
    assert drawing.warnings == ["ADetailer found no face in the picture of seed 0; it is as it was drawn."]
    assert frame[2] - frame[0] == frame[3] - frame[1]


@pytest.mark.parametrize(
    ("box", "size", "frame"),
    [
        (faces.Box(40, 40, 20, 20), (100, 100), (30, 30, 70, 70)),
        (faces.Box(0, 90, 20, 10), (100, 100), (0, 60, 40, 100)),
        (faces.Box(10, 10, 80, 80), (100, 90), (0, 0, 100, 90)),
    ],
)
def test_the_crop_lies_within_the_picture(
    box: faces.Box, size: tuple[int, int], frame: tuple[int, int, int, int]
) -> None:
    assert around(box, size) == frame


def test_passes_stack_with_a_cache_run_each(sd: LoadedModel) -> None:
    params = replace(
        PARAMS, steps=12, width=192, height=192, hires_fix=True, multiscale=Multiscale(), adetailer=True, preview=True
    )
    drawn = sd.generate(replace(params, batch_size=2), DeepCache(interval=3), ignore)
    assert [(one.name, one.cache.decisions[0], one.cache.reused > 0) for one in drawn.stages] == [
        ("base", "C", True),
        ("hires_fix", "C", True),
    ]
    assert drawn.images[0].size == (192, 192)
    again = sd.generate(replace(params, batch_size=2), DeepCache(interval=3), ignore)
    assert np.array_equal(pixels(drawn.images), pixels(again.images))


def few(steps: int, **changes: Any) -> GenerationParams:
    return replace(PARAMS, steps=steps, seeds=(7,), **changes)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_every_pass_runs_with_few_steps(small: LoadedModel, sampler: str, steps: int) -> None:
    """Or says, before anything is drawn, how many it takes."""
    start = Img2Img(picture=picture(64, 64), denoise=0.5)
    larger = {"hires_fix": True, "width": 96, "height": 96}
    multiscale = Multiscale(fullres_start=0, fullres_end=0)
    wanted: list[tuple[dict[str, Any], int]] = [({}, steps), ({"multiscale": multiscale}, steps)]
    if steps > 1:
        wanted += [({"img2img": start}, steps // 2), (larger, steps // 2)]
    for changes, last in wanted:
        drawn = small.generate(few(steps, sampler=sampler, **changes), NoCache(), ignore)
        assert drawn.stages[-1].steps == last
        assert pixels(drawn.images).std() > 0
    if steps == 1:
        refused = [{"img2img": start}, larger, {"adetailer": True}]
        for changes in refused:
            with pytest.raises(TooFewSteps):
                small.generate(few(1, sampler=sampler, **changes), NoCache(), never)


def never(step: Step) -> None:
    raise AssertionError("something was drawn")


@pytest.mark.parametrize(("steps", "taken"), [(2, 1), (3, 1), (6, 2)])
def test_a_face_is_drawn_in_one_step_at_least(sd: LoadedModel, steps: int, taken: int) -> None:
    told: list[Step] = []
    drawing = drawing_of(sd, [astronaut()], told)
    drawing.params = replace(drawing.params, steps=steps)
    with torch.no_grad(), quiet():
        ADetailer().run(drawing)
    assert drawing.stages[0].steps == len(told) == taken


def test_flux_needs_two_steps_to_draw_over_a_picture(flux: LoadedModel) -> None:
    """diffusers' rounding for Flux would give one step the whole schedule: the first picture would be lost."""
    with pytest.raises(TooFewSteps, match="use 2 or more"):
        flux.generate(few(1, adetailer=True), NoCache(), never)
