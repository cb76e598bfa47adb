"""Every sampler with every scheduler that it takes, end to end on models of the true class, cache off and on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.base import ModelSpec
from models.families import FAMILIES
from models.generation import LoadedModel
from models.sampling import samplers
from tests.models.test_generation import PARAMS, ignore, pixels

STEPS = 4
SMALL = replace(PARAMS, width=32, height=32, seeds=(7,), batch_size=1, steps=STEPS, guidance_scale=1.0)
SECOND_ORDER = {"heun", "dpm2", "dpm2_ancestral", "dpmpp_sde"}  # two evaluations a step, but for the last


def pairs(table: Mapping[str, samplers.Sampler]) -> list[tuple[str, str]]:
    return [(sampler, scheduler) for sampler, choice in table.items() for scheduler in choice.schedulers]


def calls(sampler: str) -> int:
    """Denoiser calls of STEPS steps; PNDM evaluates its first point twice."""
    if sampler in SECOND_ORDER:
        return 2 * STEPS - 1
    return STEPS + (sampler == "pndm")


@pytest.fixture(scope="module")
def small(small_folders: dict[str, Path]) -> dict[str, LoadedModel]:
    return {
        prediction: LoadedModel(FAMILIES["sd"].load(ModelSpec(name=prediction, family="sd", source=folder), "cpu"))
        for prediction, folder in small_folders.items()
    }


@pytest.fixture(scope="module")
def distilled(family_folders: dict[str, Path]) -> dict[str, LoadedModel]:
    return {
        name: LoadedModel(FAMILIES[name].load(ModelSpec(name=name, family=name, source=family_folders[name]), "cpu"))
        for name in ("flux-schnell", "flux-dev")
    }


def check(model: LoadedModel, sampler: str, scheduler: str, strategy: CacheStrategy) -> np.ndarray:
    """Off: all calls computed. On: the calls are the same ones, some reused. Both: a picture, and the last word."""
    params = replace(SMALL, sampler=sampler, scheduler=scheduler)
    off = model.generate(params, NoCache(), ignore)
    on = model.generate(params, strategy, ignore)
    assert off.reports[0].decisions == "C" * calls(sampler)
    assert len(on.reports[0].decisions) == calls(sampler)
    assert on.reports[0].reused > 0
    plain, cached = pixels(off.images), pixels(on.images)
    assert plain.std() > 0
    assert cached.std() > 0
    assert not np.array_equal(plain, cached)
    return plain


@pytest.mark.parametrize(("sampler", "scheduler"), pairs(samplers.DIFFUSION))
def test_every_pair_draws_with_deepcache_off_and_on(
    small: dict[str, LoadedModel], sampler: str, scheduler: str
) -> None:
    check(small["epsilon"], sampler, scheduler, DeepCache(interval=2, depth=0))


@pytest.mark.parametrize("rounding", [-1e-3, 1e-3])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis"])
def test_a_run_begins_at_its_first_timestep_however_a_processor_rounds_it(
    small: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch, sampler: str, rounding: float
) -> None:
    """Of "beta" the first two timesteps are 998.99… and 998.5: one integer, or two where the first one is 999."""
    kind = samplers.scheduler_class(samplers.DIFFUSION[sampler].scheduler_class)
    exact = kind._sigma_to_t
    monkeypatch.setattr(kind, "_sigma_to_t", lambda *arguments: np.minimum(exact(*arguments) + rounding, 999.0))
    params = replace(SMALL, sampler=sampler, scheduler="beta", steps=50)
    drawn = small["epsilon"].generate(params, NoCache(), ignore)
    assert drawn.reports[0].decisions == "C" * 50


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_every_sampler_takes_a_velocity_with_deepcache_off_and_on(small: dict[str, LoadedModel], sampler: str) -> None:
    """The picture is another than with the saved setting taken away, so that the sampler reads it."""
    model: Any = small["v_prediction"]
    velocity = check(model, sampler, "normal", DeepCache(interval=2, depth=0))
    scheduler = model.pipeline.scheduler
    scheduler.register_to_config(prediction_type="epsilon")
    try:
        epsilon = model.generate(replace(SMALL, sampler=sampler, scheduler="normal"), NoCache(), ignore)
    finally:
        scheduler.register_to_config(prediction_type="v_prediction")
    assert not np.array_equal(pixels(epsilon.images), velocity)


@pytest.mark.parametrize("family", ["flux-schnell", "flux-dev"])
@pytest.mark.parametrize(("sampler", "scheduler"), pairs(samplers.FLOW_MATCHING))
def test_every_pair_of_flux_draws_with_the_first_block_cache_off_and_on(
    distilled: dict[str, LoadedModel], family: str, sampler: str, scheduler: str
) -> None:
    check(distilled[family], sampler, scheduler, FirstBlockCache(threshold=1.0))


FOLLOWED = ("euler", "dpmpp_2m", "ddim", "unipc", "deis")
"""Those that draw no noise and call once at a timestep, evenly, of first order or multistep: the correction acts."""


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_previews_change_neither_pictures_nor_correction(small: dict[str, LoadedModel], sampler: str) -> None:
    """The responses are those of the scheduler, not of what watches its steps: asked first with previews, and again."""
    model: Any = small["epsilon"]
    params = replace(SMALL, steps=6, sampler=sampler)
    drawn = []
    for preview, forget in ((True, True), (False, False), (False, True), (True, False)):
        if forget:
            model.model.responses.clear()
        drawn.append(model.generate(replace(params, preview=preview), DeepCache(2, 0), ignore))
    assert all(np.array_equal(pixels(one.images), pixels(drawn[0].images)) for one in drawn[1:])
    assert [one.reports[0].settings["correction"] for one in drawn] == 4 * [sampler in FOLLOWED]


@pytest.mark.parametrize("sampler", samplers.FLOW_MATCHING)
def test_previews_change_nothing_on_flux(distilled: dict[str, LoadedModel], sampler: str) -> None:
    model: Any = distilled["flux-dev"]
    drawn = []
    for preview in (True, False):
        model.model.responses.clear()
        params = replace(SMALL, steps=6, sampler=sampler, preview=preview)
        drawn.append(model.generate(params, FirstBlockCache(1.0), ignore))
    assert np.array_equal(pixels(drawn[0].images), pixels(drawn[1].images))
    assert [one.reports[0].settings["correction"] for one in drawn] == 2 * [sampler == "euler"]


def test_a_picture_depends_on_its_request_alone(small: dict[str, LoadedModel]) -> None:
    """Every sampler after every other one, in both orders. dpmpp_2m and its SDE, for one, share a class."""
    model: Any = small["epsilon"]

    def picture(sampler: str) -> np.ndarray:
        return pixels(model.generate(replace(SMALL, sampler=sampler), DeepCache(2, 0), ignore).images)

    alone = {}
    for sampler in samplers.DIFFUSION:
        model.model.responses.clear()
        alone[sampler] = picture(sampler)
    for order in (list(samplers.DIFFUSION), list(samplers.DIFFUSION)[::-1]):
        model.model.responses.clear()
        assert [name for name in order if not np.array_equal(picture(name), alone[name])] == []


@pytest.mark.parametrize(
    ("steps", "scheduler"), [(8, "beta"), (10, "beta"), (15, "beta"), (20, "beta"), (30, "karras")]
)
def test_a_sampler_that_draws_noise_is_known_by_its_type(
    small: dict[str, LoadedModel], steps: int, scheduler: str
) -> None:
    """dpm2_ancestral draws none in its first call, which a trial would take for its nature."""
    model: Any = small["epsilon"]
    params = replace(SMALL, steps=steps, sampler="dpm2_ancestral", scheduler=scheduler)
    model.model.responses.clear()
    drawn = [model.generate(params, DeepCache(2, 0), ignore) for _ in range(3)]
    assert not any(one.reports[0].settings["correction"] for one in drawn)
    assert all(np.array_equal(pixels(one.images), pixels(drawn[0].images)) for one in drawn[1:])


@pytest.mark.parametrize(("family", "published"), [("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")])
def test_align_your_steps_is_the_models_own(family_folders: dict[str, Path], family: str, published: str) -> None:
    """The timesteps that the denoiser is called with, and the picture of diffusers' pipeline given them."""
    spec = ModelSpec(name=family, family=family, source=family_folders[family])
    model: Any = LoadedModel(FAMILIES[family].load(spec, "cpu"))
    called: list[int] = []
    unet = model.pipeline.unet
    hook = unet.register_forward_pre_hook(lambda _, args, kwargs: called.append(int(args[1])), with_kwargs=True)
    model.generate(replace(SMALL, steps=10, sampler="euler", scheduler="ays"), NoCache(), ignore)
    hook.remove()
    assert called == AysSchedules[f"{published}Timesteps"]


def test_every_sampler_and_scheduler_of_the_contract_is_in_the_table() -> None:
    assert set(samplers.DIFFUSION) == {
        "euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde",
        "dpmpp_3m_sde", "ddim", "lms", "pndm", "unipc", "deis", "lcm",
    }  # fmt: skip
    schedulers = {scheduler for _, scheduler in pairs(samplers.DIFFUSION)}
    assert schedulers == {"normal", "karras", "exponential", "beta", "sgm_uniform", "ays"}
