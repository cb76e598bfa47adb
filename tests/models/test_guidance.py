"""Guidance in a part of a run: against a loop written here, the calls counted, under both caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from cache import DeepCache, FirstBlockCache, NoCache
from models.base import GenerationParams, Img2Img, Multiscale
from models.families.flux import FLUX_DEV
from models.generation import LoadedModel
from models.sampling import samplers
from tests.models.stages.test_stages import picture
from tests.models.test_generation import ignore, pixels
from tests.models.test_together import levels

PARAMS = GenerationParams(
    prompt="a misty forest",
    negative_prompt="rain",
    width=64,
    height=64,
    steps=6,
    guidance_scale=5.0,
    seeds=(7, 8),
    batch_size=2,
)
MIDDLE = replace(PARAMS, guidance_start=0.3, guidance_end=0.8)  # of 6 steps those at 2, 3 and 4 sixths
DEEPCACHE, FIRST_BLOCK = DeepCache(interval=3), FirstBlockCache(threshold=1.0)


@pytest.fixture(params=["sd", "sdxl", "flux"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    return loaded


@contextmanager
def counted(model: LoadedModel) -> Iterator[list[int]]:
    """Within the context, the rows of each call that the denoiser computes in full."""
    rows: list[int] = []
    network: Any = model.denoiser.root
    first = network.conv_in if hasattr(network, "conv_in") else network.x_embedder
    handle = first.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("start", "end", "guided"),
    [(0.0, 0.5, "GGG..."), (0.5, 1.0, "...GGG"), (0.3, 0.8, "..GGG."), (0.0, 0.0, "......"), (0.51, 0.52, "......")],
)
def test_outside_of_its_part_the_denoiser_runs_with_text_alone(
    model: LoadedModel, start: float, end: float, guided: str
) -> None:
    """Flux calls twice in a guided step, the UNets with twice the rows."""
    with counted(model) as rows:
        drawn = model.generate(replace(PARAMS, guidance_start=start, guidance_end=end), NoCache(), ignore)
    (stage,) = drawn.stages
    if hasattr(model.denoiser.root, "conv_in"):
        assert rows == [4 if step == "G" else 2 for step in guided]
        assert stage.halves == guided.replace("G", "B").replace(".", "T")
    else:
        assert rows == [2] * (6 + guided.count("G"))
        assert stage.halves == guided.replace("G", "TN").replace(".", "T")
    assert len(stage.halves) == len(stage.cache.decisions)
    assert [w for w in drawn.warnings if "guid" in w.lower()] == [
        "Nothing was guided: none of the 6 steps lies between guidance_start and guidance_end."
        for _ in range("G" not in guided)
    ]


@torch.no_grad()
def test_it_is_a_loop_that_guides_in_that_part(sd: LoadedModel) -> None:
    pipeline: Any = sd.pipeline
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(PARAMS.steps)
    with_text, without = (
        pipeline.encode_prompt(prompt, "cpu", 2, False)[0] for prompt in (PARAMS.prompt, PARAMS.negative_prompt)
    )
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in PARAMS.seeds]
    latents = torch.cat(noise)
    for step, timestep in enumerate(scheduler.timesteps):
        predicted = pipeline.unet(latents, timestep, with_text).sample
        if step in (2, 3, 4):
            free = pipeline.unet(latents, timestep, without).sample
            predicted = free + PARAMS.guidance_scale * (predicted - free)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    expected = pixels(sd.model.decode(latents, 64, 64))
    assert levels(pixels(sd.generate(MIDDLE, NoCache(), ignore).images), expected) <= 1
    assert levels(pixels(sd.generate(PARAMS, NoCache(), ignore).images), expected) > 10


def test_a_part_that_holds_every_step_changes_no_bit(model: LoadedModel) -> None:
    for strategy in (NoCache(), FIRST_BLOCK if model.model.layout.multiple == 2 else DEEPCACHE):
        whole = model.generate(PARAMS, strategy, ignore)
        nearly = model.generate(replace(PARAMS, guidance_end=0.99), strategy, ignore)
        assert np.array_equal(pixels(whole.images), pixels(nearly.images))
        assert whole.stages[0].cache.decisions == nearly.stages[0].cache.decisions


def test_a_part_that_holds_none_is_a_run_without_guidance(model: LoadedModel) -> None:
    none = model.generate(replace(PARAMS, guidance_end=0.0), NoCache(), ignore)
    alone = model.generate(replace(PARAMS, guidance_scale=1.0), NoCache(), ignore)
    assert levels(pixels(none.images), pixels(alone.images)) <= 1


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_every_sampler_is_guided_by_steps(sd: LoadedModel, sampler: str) -> None:
    """PNDM's first step is two calls, and so is each of the second-order samplers'."""
    params = replace(MIDDLE, sampler=sampler, seeds=(7,))
    steps: list[str] = []
    drawn = sd.generate(params, NoCache(), lambda step: steps.append(step.decision))
    calls = list(map(len, steps))
    expected = "".join(("B" if step in (2, 3, 4) else "T") * count for step, count in enumerate(calls))
    assert drawn.stages[0].halves == expected


@pytest.mark.parametrize("part", [(0.3, 0.8), (0.0, 0.5), (0.5, 1.0)], ids=str)
def test_after_a_change_deepcache_computes_and_goes_on(sd: LoadedModel, part: tuple[float, float]) -> None:
    params = replace(PARAMS, guidance_start=part[0], guidance_end=part[1], steps=12)
    run = sd.generate(params, DEEPCACHE, ignore).stages[0]
    changed = [at for at in range(12) if at == 0 or run.halves[at] != run.halves[at - 1]]
    assert len(changed) == 2 + (part == (0.3, 0.8))
    assert {run.cache.decisions[at] for at in changed} == {"C"}
    assert run.cache.reused > 0


@pytest.mark.parametrize("part", [(0.3, 0.8), (0.5, 1.0)], ids=str)
def test_a_cache_that_reuses_nothing_changes_no_bit(model: LoadedModel, part: tuple[float, float]) -> None:
    params = replace(PARAMS, guidance_start=part[0], guidance_end=part[1])
    strategy = FirstBlockCache(threshold=0) if model.model.layout.multiple == 2 else DeepCache(interval=1)
    drawn, plain = (model.generate(params, one, ignore) for one in (strategy, NoCache()))
    assert np.array_equal(pixels(drawn.images), pixels(plain.images))


def test_the_first_block_cache_reuses_in_both_parts(flux: LoadedModel) -> None:
    run = flux.generate(replace(PARAMS, guidance_start=0.5, steps=12), FIRST_BLOCK, ignore).stages[0]
    assert run.halves == "T" * 6 + "TN" * 6
    decisions = dict(zip("TN", ("", ""), strict=True))
    for half, decision in zip(run.halves, run.cache.decisions, strict=True):
        decisions[half] += decision
    assert decisions["N"][0] == "C"
    assert "R" in decisions["N"]
    assert "R" in decisions["T"][:6]


def test_two_alike_are_no_guided_pair(sd: LoadedModel) -> None:
    """Without guidance two requests of one seed are a batch whose halves are equal, and are not cut in half for it."""
    strategy = DeepCache(interval=2, guidance="reuse", schedule="uniform")
    prompts = ("a misty forest", "zebras zigzag")
    requests = [replace(PARAMS, prompt=one, seeds=(7,), batch_size=1, guidance_start=0.5) for one in prompts]
    together = sd.generate_together(requests, strategy, lambda steps: None)
    for request, made in zip(requests, together, strict=True):
        assert not isinstance(made, Exception)
        alone = sd.generate(request, strategy, ignore)
        assert made.stages[0].cache.decisions == alone.stages[0].cache.decisions == "CRCCRC"
        assert made.stages[0].cache.settings["guidance"] == "reuse"
        assert levels(pixels(made.images), pixels(alone.images)) <= 2


def test_previews_multiscale_and_pictures_go_with_it(model: LoadedModel) -> None:
    plain = model.generate(MIDDLE, NoCache(), ignore)
    watched = model.generate(replace(MIDDLE, preview=True), NoCache(), ignore)
    assert np.array_equal(pixels(plain.images), pixels(watched.images))
    small = replace(MIDDLE, multiscale=Multiscale(fullres_start=1, fullres_end=1))
    run = model.generate(small, NoCache(), ignore).stages[0]
    assert len(run.sizes) == len(run.halves) == len(run.cache.decisions)
    over = replace(MIDDLE, img2img=Img2Img(picture=picture(64, 64), denoise=0.5))
    assert model.generate(over, NoCache(), ignore).stages[0].halves in ("TBB", "TTNTN")


def test_where_nothing_is_guided_it_says_so(sd: LoadedModel, family_folders: Any) -> None:
    from models.base import ModelSpec

    spec = ModelSpec(name="dev", family="flux-dev", source=family_folders["flux-dev"])
    distilled = LoadedModel(FLUX_DEV.load(spec, "cpu"))
    for model, params in ((sd, replace(MIDDLE, guidance_scale=1.0)), (distilled, MIDDLE)):
        drawn = model.generate(params, NoCache(), ignore)
        assert any("guidance_end had no effect" in sentence for sentence in drawn.warnings)
        assert drawn.stages[0].halves == ""


def test_drawn_over_a_picture_each_half_has_its_lane(flux: LoadedModel) -> None:
    """diffusers' img2img pipeline names none, and the cache would compare a call with text with one without."""
    params = replace(PARAMS, steps=10, img2img=Img2Img(picture=picture(64, 64), denoise=1.0))
    cache = flux.generate(params, FIRST_BLOCK, ignore).stages[0].cache
    assert cache.residuals[:2] == [None, None]
    assert cache.decisions[:2] == "CC"
    assert cache.reused > 0
