"""Both families through `generate`: equality with the plain pipeline, steps, seeds, cancels, warnings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from cache import DeepCache, FirstBlockCache, FittedForecast, NoCache, TransformerDenoiser
from cache.deepcache.schedule import Schedule
from models.base import GenerationParams, ModelSpec, Step
from models.errors import GenerationCancelled, UnsupportedSampler
from models.families.flux import FLUX, FluxModel
from models.families.sd import SD
from models.generation import LoadedModel
from models.libraries import quiet
from models.sampling import samplers

PARAMS = GenerationParams(
    prompt="a misty forest", width=64, height=64, steps=4, guidance_scale=3.0, seeds=(7, 8), batch_size=2
)

FITTED = FittedForecast((0, 2), ((1.0,), (1.25,), (-0.25, 1.25), (-0.5, 1.5)))


def ignore(step: Step) -> None:
    """A step hook that wants nothing."""


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def generators(params: GenerationParams) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in params.seeds]


@pytest.fixture(params=["sd", "flux"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    return loaded


def plain(model: LoadedModel, params: GenerationParams, **overrides: Any) -> list[Image.Image]:
    """What diffusers makes of the request, with nothing of ours in between."""
    arguments: dict[str, Any] = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "num_images_per_prompt": len(params.seeds),
        "num_inference_steps": params.steps,
        "width": params.width,
        "height": params.height,
        "generator": generators(params),
    }
    if isinstance(model.model, FluxModel):
        arguments |= {"true_cfg_scale": params.guidance_scale, "max_sequence_length": 16}
    else:
        arguments |= {"guidance_scale": params.guidance_scale}
    with quiet():
        images: list[Image.Image] = model.pipeline(**arguments | overrides).images
    return images


@pytest.mark.parametrize(
    "changes", [{}, {"negative_prompt": "a rainy day"}, {"guidance_scale": 1.0}, {"width": 96}], ids=str
)
def test_without_a_cache_the_plain_pipelines_pictures_come_out(model: LoadedModel, changes: dict[str, Any]) -> None:
    params = replace(PARAMS, **changes)
    drawn = model.generate(params, NoCache(), ignore)
    assert np.array_equal(pixels(drawn.images), pixels(plain(model, params)))
    assert drawn.images[0].size == (params.width, params.height)


def test_a_cache_that_never_reuses_changes_nothing(sd: LoadedModel, flux: LoadedModel) -> None:
    every = FittedForecast(tuple(range(PARAMS.steps)), ((1.0,),) * PARAMS.steps)
    for model, strategy in (
        (sd, DeepCache(interval=1)),
        (flux, FirstBlockCache(threshold=0.0)),
        (sd, every),
        (flux, every),
    ):
        cached = model.generate(PARAMS, strategy, ignore)
        assert (cached.reports[0].strategy, cached.reports[0].reused) == (strategy.name, 0)
        assert np.array_equal(pixels(cached.images), pixels(plain(model, PARAMS)))


def test_a_cache_acts_and_the_next_run_knows_nothing_of_it(sd: LoadedModel, flux: LoadedModel) -> None:
    # interval 2: every second of four calls; threshold 1: all but the first, the two passes of guidance apart
    for model, strategy, decisions in (
        (sd, DeepCache(interval=2, depth=2), "CRCR"),
        (flux, FirstBlockCache(threshold=1.0, forecast=False), "CCRRRRRR"),
        (sd, FITTED, "CRCR"),
        (flux, FITTED, "CCRRCCRR"),
    ):
        cached = model.generate(PARAMS, strategy, ignore)
        assert [report.decisions for report in cached.reports] == [decisions]
        assert not np.array_equal(pixels(cached.images), pixels(plain(model, PARAMS)))
        after = model.generate(PARAMS, NoCache(), ignore)
        assert np.array_equal(pixels(after.images), pixels(plain(model, PARAMS)))


def test_an_image_depends_on_its_seed_alone(model: LoadedModel) -> None:
    together = model.generate(replace(PARAMS, seeds=(7, 8, 9), batch_size=3), NoCache(), ignore)
    split = model.generate(replace(PARAMS, seeds=(9, 7, 8), batch_size=2), NoCache(), ignore)
    assert len(split.reports) == 2
    # Another batch size may sum in another order: one level of 255 at most.
    difference = pixels(together.images).astype(int) - pixels([split.images[i] for i in (1, 2, 0)]).astype(int)
    assert np.abs(difference).max() <= 1
    assert not np.array_equal(pixels(together.images[:1]), pixels(together.images[1:2]))


def test_steps_run_over_all_batches_with_their_decisions(sd: LoadedModel) -> None:
    steps: list[Step] = []
    params = replace(PARAMS, seeds=(1, 2, 3), batch_size=2)
    sd.generate(params, DeepCache(interval=3), steps.append)
    assert [step.index for step in steps] == list(range(8))
    assert {step.total for step in steps} == {8}
    assert [step.decision for step in steps].count("C") == 2 * 2
    assert steps[0].decision == steps[4].decision == "C"


@pytest.mark.parametrize(
    ("sampler", "schedule", "letters"),
    [
        ("euler", "uniform", ["C", "R", "R", "C"]),
        ("heun", "uniform", ["CR", "RC", "RR", "C"]),  # two calls a step, one in the last
        ("pndm", "uniform", ["CR", "R", "C", "R"]),  # one extra call at the start
        ("euler", (0, 1), ["C", "C", "R", "R"]),
        ("heun", (0, 1, 4), ["CC", "RR", "CR", "R"]),
    ],
)
def test_a_steps_decision_covers_the_calls_that_it_made(
    sd: LoadedModel, sampler: str, schedule: Schedule, letters: list[str]
) -> None:
    steps: list[Step] = []
    drawn = sd.generate(replace(PARAMS, sampler=sampler), DeepCache(interval=3, schedule=schedule), steps.append)
    assert [step.decision for step in steps] == letters
    assert [(step.index, step.total) for step in steps] == [(i, 4) for i in range(4)]
    assert "".join(letters) == drawn.reports[0].decisions
    said = [sentence for sentence in drawn.warnings if "two evaluations a step" in sentence]
    assert said == (
        ["The sampler makes two evaluations a step: the cache counted the 7 calls of the denoiser, not the 4 steps."]
        if sampler == "heun"
        else []
    )


@pytest.fixture(scope="module")
def small(small_folders: dict[str, Path]) -> LoadedModel:
    return LoadedModel(SD.load(ModelSpec(name="small", family="sd", source=small_folders["v_prediction"]), "cpu"))


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_every_sampler_runs_under_a_cache(small: LoadedModel, sampler: str) -> None:
    params = replace(PARAMS, steps=8, sampler=sampler)
    first, second = (small.generate(params, DeepCache(interval=3, depth=2), ignore) for _ in range(2))
    calls = len(first.reports[0].decisions)
    assert calls in (8, 9, 15)  # one a step; PNDM's extra one; two a step but the last
    assert first.reports[0].computed == -(-calls // 3)
    assert pixels(first.images).std() > 0
    assert np.array_equal(pixels(first.images), pixels(second.images)), "the noise is the seeds' alone"


@pytest.mark.parametrize("scheduler", ["karras", "ays"])
def test_a_scheduler_without_a_sampler_goes_with_euler(sd: LoadedModel, scheduler: str) -> None:
    named = sd.generate(replace(PARAMS, sampler="euler", scheduler=scheduler), NoCache(), ignore)
    unnamed = sd.generate(replace(PARAMS, scheduler=scheduler), NoCache(), ignore)
    assert np.array_equal(pixels(named.images), pixels(unnamed.images))


def test_flux_runs_on_heun(flux: LoadedModel) -> None:
    steps: list[Step] = []
    euler = flux.generate(PARAMS, NoCache(), ignore)
    heun = flux.generate(replace(PARAMS, sampler="heun", guidance_scale=1.0), NoCache(), steps.append)
    assert [step.decision for step in steps] == ["CC", "CC", "CC", "C"]
    assert not np.array_equal(pixels(heun.images), pixels(euler.images))


def test_an_unsupported_pair_is_refused_before_anything_is_drawn(model: LoadedModel) -> None:
    @contextmanager
    def never(denoiser: object) -> Iterator[None]:
        raise AssertionError("attached")
        yield

    class Never:
        name = "never"
        attach = staticmethod(never)

    with pytest.raises(UnsupportedSampler, match="ays"):
        model.generate(
            replace(PARAMS, sampler="euler" if model.spec.family == "flux" else "ddim", scheduler="ays"),
            Never(),
            ignore,
        )


def test_a_cancel_passes_through_and_leaves_the_model_clean(sd: LoadedModel, flux: LoadedModel) -> None:
    def stop(step: Step) -> None:
        if step.index == 1:
            raise GenerationCancelled("the client left")

    for model, strategy in ((sd, DeepCache(interval=3)), (flux, FirstBlockCache(threshold=1.0))):
        before = model.generate(PARAMS, strategy, ignore)  # the first run: diffusers gives a transformer its registry
        scheduler, network = model.pipeline.scheduler, model.denoiser.root
        attributes = set(network.__dict__)
        with pytest.raises(GenerationCancelled, match="the client left"):
            model.generate(replace(PARAMS, sampler="heun"), strategy, stop)
        assert model.pipeline.scheduler is scheduler
        assert set(network.__dict__) == attributes
        after = model.generate(PARAMS, strategy, ignore)
        assert np.array_equal(pixels(after.images), pixels(before.images))


def test_render_sizes_and_vocabulary_are_answered_in_warnings(sd_folder: Any, sd: LoadedModel) -> None:
    spec = ModelSpec(
        name="small",
        family="sd",
        source=sd_folder,
        render_sizes=((64, 64), (96, 64)),
        vocabulary=frozenset({"a", "misty"}),
    )
    small = LoadedModel(SD.load(spec, "cpu"))
    drawn = small.generate(replace(PARAMS, width=300, height=200), NoCache(), ignore)
    assert {image.size for image in drawn.images} == {(300, 200)}
    assert drawn.warnings == [
        "small draws at 96×64; the picture was resampled to 300×200.",
        "small was not trained on these words of the prompt: forest.",
    ]
    native = sd.generate(replace(PARAMS, width=96, height=64), NoCache(), ignore)
    resampled = [image.resize((300, 200), Image.Resampling.LANCZOS) for image in native.images]
    assert np.array_equal(pixels(drawn.images), pixels(resampled))


def test_what_cannot_be_honoured_is_said(model: LoadedModel) -> None:
    unguided = model.generate(replace(PARAMS, guidance_scale=1.0, negative_prompt="rain"), NoCache(), ignore)
    assert len(unguided.warnings) == 1
    assert "negative prompt has no effect" in unguided.warnings[0]
    long = model.generate(replace(PARAMS, prompt="a misty forest " * 9), NoCache(), ignore).warnings
    if isinstance(model.model, FluxModel):
        assert "reads 16 tokens" in long.pop()
    assert long == []
    assert model.generate(replace(PARAMS, prompt="forest"), NoCache(), ignore).warnings == []


def test_a_distilled_transformer_takes_the_scale_as_an_input(flux_spec: ModelSpec) -> None:
    """One call a step; another scale is another picture; the negative prompt is said to be idle."""
    distilled = LoadedModel(FLUX.load(flux_spec, "cpu"))
    pipeline = distilled.pipeline
    torch.manual_seed(1)
    config = {**pipeline.transformer.config, "guidance_embeds": True}
    transformer = FluxTransformer2DModel.from_config(config).eval()
    pipeline.transformer = transformer
    denoiser = TransformerDenoiser(transformer)
    model = LoadedModel(FluxModel(distilled.spec, pipeline, denoiser, samplers.FLOW_MATCHING))
    drawn = model.generate(replace(PARAMS, negative_prompt="rain"), NoCache(), ignore)
    assert drawn.reports[0].decisions == "CCCC"
    assert drawn.warnings == ["The negative prompt has no effect: random-flux is guidance-distilled."]
    expected = plain(model, PARAMS, negative_prompt=None, guidance_scale=3.0, true_cfg_scale=1.0)
    assert np.array_equal(pixels(drawn.images), pixels(expected))
    other = model.generate(replace(PARAMS, guidance_scale=9.0), NoCache(), ignore)
    assert not np.array_equal(pixels(drawn.images), pixels(other.images))


def test_stages_are_timed_apart(sd: LoadedModel) -> None:
    timings = sd.generate(PARAMS, NoCache(), ignore).timings
    assert timings.denoise_seconds > timings.text_seconds > 0
    assert timings.decode_seconds > 0


def test_what_drew_is_told_also_where_the_request_left_it_to_the_model(model: LoadedModel) -> None:
    one = replace(PARAMS, seeds=(7,), batch_size=1, steps=1)
    own = model.generate(one, NoCache(), ignore).sampling
    assert own is not None
    assert own[0] in model.model.choices  # type: ignore[attr-defined]
    named = replace(one, sampler="euler", scheduler="karras")
    drawn = model.generate(named, NoCache(), ignore)
    assert drawn.sampling == ("euler", "karras")
    assert named.sampled_by(own) == replace(one, sampler=own[0], scheduler=own[1])


def test_tiles_are_for_one_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = model.pipeline.vae
    monkeypatch.setattr(vae, "tile_sample_min_size", 32)
    monkeypatch.setattr(vae, "tile_latent_min_size", 32 // 2 ** (len(vae.config.block_out_channels) - 1))
    whole = model.generate(PARAMS, NoCache(), ignore)
    tiled = model.generate(replace(PARAMS, vae_tiling=True), NoCache(), ignore)
    assert not np.array_equal(pixels(tiled.images), pixels(whole.images)), "the tiles see less around them"
    assert not vae.use_tiling
    assert np.array_equal(pixels(model.generate(PARAMS, NoCache(), ignore).images), pixels(whole.images))
