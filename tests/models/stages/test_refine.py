"""The refiner against diffusers' own pair of pipelines, in part and whole, under a cache, with the other passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from safetensors.torch import save_file

from app.engine.runner import summarise_stages
from cache import DeepCache, NoCache
from models.base import Embedding, Generation, GenerationParams, Img2Img, Inpaint, ModelSpec, Multiscale, Refiner, Step
from models.errors import GenerationCancelled, NeedsPicture, TooFewSteps
from models.families.sdxl import SDXL
from models.generation import LoadedModel
from models.libraries import quiet
from models.run import Begun
from models.sampling import samplers
from tests.models.stages.test_stages import ignore, picture, pixels, spelled
from tests.models.test_together import levels

SWITCH = 0.6
KARRAS = {"sampler": "dpmpp_2m", "scheduler": "karras"}
PARAMS = GenerationParams(
    prompt="a misty forest",
    width=64,
    height=64,
    steps=10,
    guidance_scale=3.0,
    seeds=(7, 8),
    batch_size=2,
    refiner=Refiner(model="random-refiner", switch=SWITCH),
)


@pytest.fixture
def pair(sdxl: LoadedModel, refiner: LoadedModel) -> Iterator[LoadedModel]:
    with sdxl.refined_by(refiner):
        yield sdxl


@pytest.fixture(scope="module")
def again(family_folders: dict[str, Path]) -> LoadedModel:
    """The same SDXL under another name."""
    return LoadedModel(SDXL.load(ModelSpec(name="again", family="sdxl", source=family_folders["sdxl"]), "cpu"))


def img2img(model: LoadedModel, vae: Any) -> Any:
    pipeline: Any = model.pipeline
    settings = {
        "requires_aesthetics_score": model.spec.family == "sdxl-refiner",
        "force_zeros_for_empty_prompt": model.spec.family == "sdxl",
    }
    made = StableDiffusionXLImg2ImgPipeline(**{**pipeline.components, "vae": vae}, **settings, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def ensemble(
    base: LoadedModel, refiner: LoadedModel, params: GenerationParams, first: Any = None, begin: Any = None
) -> list[Image.Image]:
    """diffusers' ensemble of expert denoisers, as its documentation has it, with nothing of ours in between.

    first: the pipeline that begins, the model's own unless told; begin: what it takes besides the text.
    """
    pipeline: Any = first or base.pipeline
    assert params.refiner is not None
    same: dict[str, Any] = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt or None,
        "num_inference_steps": params.steps,
        "guidance_scale": params.guidance_scale,
        "num_images_per_prompt": len(params.seeds),
    }
    with quiet():
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in params.seeds]
        switch = params.refiner.switch
        begin = begin or {"width": params.width, "height": params.height, "denoising_end": switch}
        if params.sampler == "dpmpp_2m":
            karras = {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++", "solver_order": 2}
            scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **karras)
            pipeline = type(pipeline)(**{**pipeline.components, "scheduler": scheduler}, add_watermarker=False)
            pipeline.set_progress_bar_config(disable=True)
        begun = pipeline(**same, **begin, generator=generators, output_type="latent").images
        finish = img2img(refiner, pipeline.vae)
        finish.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        images: list[Image.Image] = finish(**same, image=begun, denoising_start=switch, generator=generators).images
    return images


@pytest.mark.parametrize(
    "changes", [{}, {"negative_prompt": "rain", "width": 96}, {"guidance_scale": 1.0}, KARRAS], ids=spelled
)
def test_it_is_diffusers_own_pair_of_pipelines(
    pair: LoadedModel, refiner: LoadedModel, changes: dict[str, Any]
) -> None:
    params = replace(PARAMS, **changes)
    drawn = pair.generate(params, NoCache(), ignore)
    assert np.array_equal(pixels(drawn.images), pixels(ensemble(pair, refiner, params)))
    assert [(one.name, one.width) for one in drawn.stages] == [("base", params.width), ("refiner", params.width)]
    assert sum(one.steps for one in drawn.stages) == 10


def test_within_a_mask_both_parts_draw_and_what_it_keeps_is_the_picture(
    pair: LoadedModel, refiner: LoadedModel
) -> None:
    """diffusers' inpainting pipeline begins, its refiner, which knows no mask, goes on; what is kept is put back.

    Its `denoising_end` would hand on the kept part without noise: it is stopped after its sixth step instead.
    """

    def stop(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = index == 5
        return tensors

    kept, mask = picture(64, 64), Image.new("L", (64, 64))
    mask.paste(255, (16, 24, 48, 56))
    over = Img2Img(picture=kept, denoise=1.0, inpaint=Inpaint(mask=mask, blur=0))
    params = replace(PARAMS, img2img=over)
    drawn = pair.generate(params, NoCache(), ignore)
    inpainting = StableDiffusionXLInpaintPipeline(**pair.pipeline.components, add_watermarker=False)
    inpainting.set_progress_bar_config(disable=True)
    begin = {"image": [kept] * 2, "mask_image": mask, "strength": 1.0, "callback_on_step_end": stop}
    expected = pixels(ensemble(pair, refiner, params, inpainting, {"width": 64, "height": 64, **begin}))
    white = np.asarray(mask)[..., None] > 0
    assert np.array_equal(pixels(drawn.images), np.where(white, expected, np.asarray(kept)))
    assert [(one.name, one.steps) for one in drawn.stages] == [("inpaint", 6), ("refiner", 4)]


def test_a_kept_run_is_gone_on_from_with_the_same_refiner_alone(sdxl: LoadedModel, refiner: LoadedModel) -> None:
    """And before a second run the first is drawn to its end, where it would end before the refiner's part."""
    base, loads = LoadedModel(sdxl.model, 2**20), [LoadedModel(refiner.model) for _ in range(2)]
    asked = replace(PARAMS, owner="one", upscale=None)
    enlarged = replace(asked, hires_fix=True, width=128, height=128)
    known = []
    for load, params in ((loads[0], asked), (loads[0], asked), (loads[1], asked), (loads[1], enlarged)):
        with base.refined_by(load):
            known.append(base.generate(params, NoCache(), ignore))
    assert [[one.kept for one in drawn.stages] for drawn in known] == [
        [False] * 2,
        [True] * 2,
        [False] * 2,
        [False] * 3,
    ]
    with sdxl.refined_by(refiner):
        whole = sdxl.generate(enlarged, NoCache(), ignore)
    assert np.array_equal(pixels(known[-1].images), pixels(whole.images))


def test_the_second_may_be_any_sdxl(sdxl: LoadedModel, again: LoadedModel) -> None:
    with sdxl.refined_by(again):
        drawn = sdxl.generate(PARAMS, NoCache(), ignore)
    assert np.array_equal(pixels(drawn.images), pixels(ensemble(sdxl, again, PARAMS)))


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_the_steps_are_shared_whole(pair: LoadedModel, sampler: str) -> None:
    steps: list[Step] = []
    drawn = pair.generate(replace(PARAMS, seeds=(7,), steps=5, sampler=sampler), NoCache(), steps.append)
    assert [one.steps for one in drawn.stages] in ([3, 2], [4, 1])  # their timesteps lie apart
    assert [(step.index, step.total) for step in steps] == [(index, 5) for index in range(5)]
    assert "".join(step.decision for step in steps) == "".join(one.cache.decisions for one in drawn.stages)
    assert np.isfinite(pixels(drawn.images)).all()


@pytest.mark.parametrize(
    "changes",
    [
        *({"sampler": sampler} for sampler in ("euler", "euler_ancestral", "heun", "dpm2", "ddim")),
        {"sampler": "euler", "scheduler": "karras"},
        {"sampler": "heun", "scheduler": "ays"},
        {"img2img": Img2Img(picture=picture(64, 64), denoise=0.7)},
        {"hires_fix": True, "width": 96, "height": 96},
    ],
    ids=spelled,
)
def test_a_model_that_goes_on_with_its_own_latents_draws_what_it_draws_at_once(
    sdxl: LoadedModel, again: LoadedModel, changes: dict[str, Any]
) -> None:
    """With samplers that look at no step but the present one: nothing is lost or noised between the parts."""
    params = replace(PARAMS, seeds=(7,), **changes)
    with sdxl.refined_by(again):
        shared = sdxl.generate(params, NoCache(), ignore)
    whole = sdxl.generate(replace(params, refiner=None), NoCache(), ignore)
    assert np.array_equal(pixels(shared.images), pixels(whole.images))
    assert [one.name for one in shared.stages] == [*(one.name for one in whole.stages), "refiner"]
    assert sum(one.steps for one in shared.stages) == sum(one.steps for one in whole.stages)


def test_the_refiner_follows_the_schedule_of_the_first_and_predicts_what_it_was_trained_for(
    sdxl: LoadedModel, refiner: LoadedModel
) -> None:
    """A base that is saved with other betas and predicts velocities."""
    pipeline: Any = sdxl.pipeline
    saved = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler(beta_end=0.01, prediction_type="v_prediction", clip_sample=False)
    begun = Begun(torch.zeros(1, 4, 8, 8), 6, 10, pipeline.scheduler)
    try:
        with quiet(), refiner.model.run(PARAMS, (7,), NoCache(), (64, 64), begun=begun) as run:
            assert (type(run.scheduler).__name__, run.scheduler.config.beta_end) == ("DDIMScheduler", 0.01)
            assert run.scheduler.config.prediction_type == "epsilon"
            assert (run.steps, run.share) == (4, 0.6)
    finally:
        pipeline.scheduler = saved


def test_each_part_has_a_cache_run_of_its_own_and_the_rate_is_over_both(pair: LoadedModel) -> None:
    strategy = DeepCache(interval=3, schedule="uniform")
    drawn = pair.generate(PARAMS, strategy, ignore)
    assert [(one.name, one.cache.decisions) for one in drawn.stages] == [("base", "CRRCRR"), ("refiner", "CRRC")]
    report = summarise_stages(drawn.stages)
    assert (report["computed"], report["reused"], report["hit_rate"]) == (4, 6, 0.6)
    passes: Any = report["passes"]
    assert [(one["name"], one["steps"], one["hit_rate"]) for one in passes] == [
        ("base", 6, pytest.approx(4 / 6, abs=1e-3)),
        ("refiner", 4, 0.5),
    ]
    plain = pair.generate(PARAMS, NoCache(), ignore)
    assert not np.array_equal(pixels(drawn.images), pixels(plain.images))


def test_a_cancel_in_any_step_leaves_both_clean(sdxl: LoadedModel, refiner: LoadedModel) -> None:
    params = replace(PARAMS, seeds=(7,), steps=5)
    alone = sdxl.generate(replace(params, refiner=None), NoCache(), ignore)
    pipelines: tuple[Any, ...] = (sdxl.pipeline, refiner.pipeline)
    before = [(one.scheduler, one.vae, set(one.unet.__dict__)) for one in pipelines]
    for last in range(5):

        def stop(step: Step, last: int = last) -> None:
            if step.index == last:
                raise GenerationCancelled

        with pytest.raises(GenerationCancelled), sdxl.refined_by(refiner):
            sdxl.generate(params, DeepCache(interval=2), stop)
        assert [(one.scheduler, one.vae, set(one.unet.__dict__)) for one in pipelines] == before
    after = sdxl.generate(replace(params, refiner=None), NoCache(), ignore)
    assert np.array_equal(pixels(after.images), pixels(alone.images))


def test_requests_are_refined_together_and_a_picture_is_its_seed_s_alone(pair: LoadedModel) -> None:
    requests = [replace(PARAMS, seeds=(seed,), prompt=prompt) for seed, prompt in ((7, "a misty forest"), (8, "a sea"))]
    together = pair.generate_together(requests, NoCache(), lambda steps: None)
    for request, made in zip(requests, together, strict=True):
        assert isinstance(made, Generation)
        assert levels(pixels(made.images), pixels(pair.generate(request, NoCache(), ignore).images)) <= 1
        assert [one.name for one in made.stages] == ["base", "refiner"]


def test_previews_go_on_and_multiscale_acts_in_the_first_part(pair: LoadedModel) -> None:
    settings = Multiscale(fullres_start=1, fullres_end=1, intermittent=False)
    steps: list[Step] = []
    params = replace(PARAMS, seeds=(7,), multiscale=settings, preview=True)
    drawn = pair.generate(params, NoCache(), steps.append)
    assert [one.sizes for one in drawn.stages] == ["FSSSSF", ""]
    assert all(step.preview for step in steps[6:])


@pytest.mark.parametrize(("start", "end"), [(0.25, 0.75), (0.0, 0.4), (0.7, 1.0), (0.95, 0.97)])
def test_guidance_acts_in_its_share_of_both_parts_together(pair: LoadedModel, start: float, end: float) -> None:
    params = replace(PARAMS, guidance_start=start, guidance_end=end)
    drawn = pair.generate(params, NoCache(), ignore)
    meant = "".join("B" if start <= step / 10 < end else "T" for step in range(10))
    assert "".join(one.halves for one in drawn.stages) == meant
    assert any("Nothing was guided" in one for one in drawn.warnings) == ("B" not in meant)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 1}, "use 2 or more"),
        ({"steps": 3, "sampler": "dpmpp_2m", "refiner": Refiner(model="r", switch=0.9)}, "no step of 3 to the refiner"),
        ({"img2img": Img2Img(picture=picture(64, 64), denoise=0.3)}, "no step of 3 to the model itself"),
        ({"hires_fix": True, "width": 96, "height": 96, "refiner": Refiner(model="r", switch=0.4)}, "a higher one"),
    ],
    ids=spelled,
)
def test_a_part_without_a_step_is_refused_before_anything_is_drawn(
    pair: LoadedModel, changes: dict[str, Any], words: str
) -> None:
    steps: list[Step] = []
    with pytest.raises(TooFewSteps, match=words):
        pair.generate(replace(PARAMS, **changes), NoCache(), steps.append)
    assert steps == []


def test_alone_it_draws_over_pictures_as_diffusers_own_does(refiner: LoadedModel) -> None:
    pipeline: Any = refiner.pipeline
    params = replace(PARAMS, refiner=None, img2img=Img2Img(picture=picture(64, 64), denoise=0.5))
    same: dict[str, Any] = {"image": [picture(64, 64)] * 2, "strength": 0.5, "num_inference_steps": params.steps}
    with quiet():
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in params.seeds]
        scale = {"guidance_scale": params.guidance_scale, "num_images_per_prompt": 2}
        expected = img2img(refiner, pipeline.vae)(params.prompt, **same, **scale, generator=generators).images
    assert np.array_equal(pixels(refiner.generate(params, NoCache(), ignore).images), pixels(expected))
    with pytest.raises(NeedsPicture, match="send one"):
        refiner.generate(replace(params, img2img=None), NoCache(), ignore)


def test_adapters_are_the_model_s_and_the_warning_says_so(pair: LoadedModel, tmp_path: Path) -> None:
    embedding = tmp_path / "style.safetensors"
    vectors = {"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 24)}
    save_file(vectors, embedding)
    params = replace(PARAMS, prompt="a style", embeddings=(Embedding(name="style", path=embedding),))
    drawn = pair.generate(params, NoCache(), ignore)
    assert "LoRAs, embeddings and FreeU are the model's: the refiner goes on without them." in drawn.warnings
    assert not np.array_equal(
        pixels(drawn.images), pixels(pair.generate(replace(params, embeddings=()), NoCache(), ignore).images)
    )
