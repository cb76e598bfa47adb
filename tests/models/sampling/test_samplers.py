"""The sampler table against diffusers' signatures, and every pair of it on data whose answer is known."""

from __future__ import annotations

import functools
import inspect
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.schedulers import AysSchedules

from models.errors import UnsupportedSampler
from models.libraries import quiet
from models.sampling import samplers, schedulers
from tests.models.conftest import terminal_snr_betas, terminal_snr_scheduler

SECOND_ORDER = ("heun", "dpm2", "dpmpp_sde", "lms")  # or higher: half the steps do
PAIRS = [(name, scheduler) for name, sampler in samplers.DIFFUSION.items() for scheduler in sampler.schedulers]
SPREAD = 0.7  # standard deviation of the Gaussian data

ALPHAS_CUMPROD = np.cumprod(1 - np.array(terminal_snr_betas()))
LOG_SIGMAS = np.log((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD) / 2


@pytest.fixture(scope="module")
def saved() -> DDIMScheduler:
    return terminal_snr_scheduler()


def velocity(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """The exact v-prediction for Gaussian data of spread SPREAD: v = αε - σx₀ with x₀ at its posterior mean."""
    ratio = np.exp(np.interp(timestep, np.arange(1000), LOG_SIGMAS))
    alpha = 1 / np.sqrt(1 + ratio**2)
    sigma = ratio * alpha
    clean = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * sample
    return alpha * (sample - alpha * clean) / sigma - sigma * clean


def draw(saved: DDIMScheduler, sampler: str, scheduler: str | None, steps: int) -> torch.Tensor:
    chosen = samplers.build(saved, samplers.DIFFUSION, sampler, scheduler, steps=steps, seeds=[0])
    return loop(chosen, scheduler, steps)


def loop(chosen: Any, scheduler: str | None, steps: int, side: int = 32) -> torch.Tensor:
    """diffusers' own, by hand. side: of the latents, which have four channels."""
    timesteps = samplers.custom_timesteps(scheduler, steps)
    chosen.set_timesteps(**({"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps}))
    generator = torch.Generator().manual_seed(0)
    takes_noise = "generator" in inspect.signature(chosen.step).parameters
    extra: dict[str, Any] = {"generator": generator} if takes_noise else {}
    sample = torch.randn(1, 4, side, side, generator=generator) * chosen.init_noise_sigma
    for timestep in chosen.timesteps:
        prediction = velocity(chosen.scale_model_input(sample, timestep), float(timestep))
        sample = chosen.step(prediction, timestep, sample, return_dict=False, **extra)[0]
    return sample


@pytest.mark.parametrize(("sampler", "scheduler"), [pair for pair in PAIRS if pair[0] != "lcm"])
def test_every_pair_samples_gaussian_data_of_the_right_spread(
    saved: DDIMScheduler, sampler: str, scheduler: str
) -> None:
    # Discretisation only: first order at 50 steps is within 8 %. diffusers spaces "beta" in sigma, where few steps fall
    # on low noise, so it is given more of them. LCM returns a posterior mean, narrower than the data by design.
    steps, tolerance = (150, 0.15) if scheduler == "beta" else (50, 0.1)
    steps = steps // 2 if sampler in SECOND_ORDER else steps
    with quiet():
        spread = float(draw(saved, sampler, scheduler, steps).std())
    assert spread == pytest.approx(SPREAD, rel=tolerance)


@pytest.mark.parametrize(("sampler", "scheduler"), PAIRS)
def test_a_schedule_on_the_host_changes_no_bit(saved: DDIMScheduler, sampler: str, scheduler: str) -> None:
    """The oracle is diffusers' own class in the same loop (for the third order our own, whose update differs)."""
    with quiet():
        ours = samplers.build(saved, samplers.DIFFUSION, sampler, scheduler, steps=8, seeds=[0])
        theirs = getattr(diffusers, type(ours).__name__, type(ours).__base__).from_config(ours.config)
        assert torch.equal(loop(ours, scheduler, 8, side=8), loop(theirs, scheduler, 8, side=8))


def test_a_schedule_whose_first_timestep_stands_twice_is_run_to_its_end(
    saved: DDIMScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' own begins at the second place of 998, and looks for a 152nd sigma in the end.

    On some processors they round to one number, on others not: here they are made to.
    """

    class Twice(diffusers.DPMSolverMultistepScheduler):
        def set_timesteps(self, *arguments: Any, **named: Any) -> None:
            super().set_timesteps(*arguments, **named)
            self.timesteps[1] = self.timesteps[0]

    monkeypatch.setattr(samplers, "scheduler_class", lambda name: Twice)
    with quiet():
        ours = samplers.build(saved, samplers.DIFFUSION, "dpmpp_2m", "beta", steps=150, seeds=[0])
        theirs = Twice.from_config(ours.config)
        assert loop(ours, "beta", 150).isfinite().all()
        with pytest.raises(IndexError):
            loop(theirs, "beta", 150)


def test_the_third_order_sde_sampler_converges(saved: DDIMScheduler) -> None:
    """diffusers' own is 10 % too wide at 50 steps and 17 % at 150."""
    with quiet():
        spread = float(draw(saved, "dpmpp_3m_sde", "normal", 150).std())
    assert spread == pytest.approx(SPREAD, rel=0.02)


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_noise_schedule_and_prediction_type_survive_the_change_of_class(saved: DDIMScheduler, sampler: str) -> None:
    with quiet():
        chosen = samplers.build(saved, samplers.DIFFUSION, sampler, None, steps=8, seeds=[0])
    assert chosen.config.prediction_type == "v_prediction"
    assert chosen.config.timestep_spacing == "trailing"
    np.testing.assert_allclose(chosen.alphas_cumprod.numpy(), ALPHAS_CUMPROD, rtol=1e-3)


@pytest.mark.parametrize(
    ("table", "sampler", "scheduler"),
    [("DIFFUSION", *pair) for pair in PAIRS]
    + [("FLOW_MATCHING", name, s) for name, entry in samplers.FLOW_MATCHING.items() for s in entry.schedulers],
)
def test_the_table_names_only_what_the_classes_take(table: str, sampler: str, scheduler: str) -> None:
    entry = getattr(samplers, table)[sampler]
    scheduler_class = samplers.scheduler_class(entry.scheduler_class)
    settings = {*entry.settings, *entry.schedulers[scheduler], *([entry.noise_seeds] if entry.noise_seeds else [])}
    assert settings <= set(inspect.signature(scheduler_class.__init__).parameters)
    if scheduler == "ays":
        assert "timesteps" in inspect.signature(scheduler_class.set_timesteps).parameters


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_the_table_leaves_out_nothing_that_a_class_takes(sampler: str) -> None:
    entry = samplers.DIFFUSION[sampler]
    taken = set(inspect.signature(samplers.scheduler_class(entry.scheduler_class).__init__).parameters)
    flags = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
    assert {name for name, flag in flags.items() if flag in taken} == set(flags) & set(entry.schedulers)


def test_without_names_the_models_own_scheduler_is_built_afresh(saved: DDIMScheduler) -> None:
    own = samplers.build(saved, samplers.DIFFUSION, None, None, steps=8, seeds=[0])
    assert type(own).__base__ is DDIMScheduler  # its schedule is kept on the host
    assert own is not saved
    assert dict(own.config) == dict(saved.config)


def test_a_bad_name_is_answered_with_the_good_ones() -> None:
    pairs = samplers.choices(samplers.DIFFUSION)
    with pytest.raises(UnsupportedSampler, match="euler_ancestral"):
        samplers.check(pairs, "eulre", None)
    with pytest.raises(UnsupportedSampler, match=r"It takes: normal, sgm_uniform; 'karras' goes with: euler, heun"):
        samplers.check(pairs, "ddim", "karras")
    samplers.check(pairs, None, "karras")  # euler


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 150])
def test_align_your_steps_keeps_the_published_ends_and_falls(steps: int) -> None:
    timesteps = samplers.custom_timesteps("ays", steps)
    assert timesteps is not None
    assert len(timesteps) == steps
    assert timesteps[0] == 999
    assert all(later < earlier for earlier, later in pairwise(timesteps))
    if steps == 10:
        assert tuple(timesteps) == samplers.AYS_TIMESTEPS


def test_the_published_timesteps_are_diffusers() -> None:
    assert list(samplers.AYS_TIMESTEPS) == AysSchedules["StableDiffusionTimesteps"]
    assert list(samplers.AYS_TIMESTEPS_XL) == AysSchedules["StableDiffusionXLTimesteps"]
    assert samplers.custom_timesteps("ays", 10, samplers.AYS_TIMESTEPS_XL) == list(samplers.AYS_TIMESTEPS_XL)


def test_a_run_is_named_by_the_scheduler_that_draws() -> None:
    """What a request leaves open is as the model was saved, where the sampler's class takes it."""
    saved = EulerDiscreteScheduler(use_karras_sigmas=True)

    def named(sampler: str | None, scheduler: str | None, saved: Any = saved) -> tuple[str, str]:
        built = samplers.build(saved, samplers.DIFFUSION, sampler, scheduler, steps=8, seeds=[0])
        return samplers.names(built, samplers.DIFFUSION, sampler, scheduler)

    assert named(None, None) == named("euler", None) == ("euler", "karras")
    assert named("dpmpp_2m", None) == ("dpmpp_2m", "karras")
    assert named("dpmpp_2m", "normal") == ("dpmpp_2m", "normal")
    assert named(None, "exponential") == ("euler", "exponential")
    assert named("ddim", None) == ("ddim", "normal")  # which has no such setting
    noisy = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_exponential_sigmas=True)
    assert named(None, None, noisy) == ("dpmpp_2m_sde", "exponential")
    assert named(None, None, DPMSolverMultistepScheduler()) == ("dpmpp_2m", "normal")


def test_lcm_takes_more_steps_than_it_was_made_for(saved: DDIMScheduler) -> None:
    lcm = samplers.build(saved, samplers.DIFFUSION, "lcm", None, steps=150, seeds=[0])
    lcm.set_timesteps(150)
    assert len(set(lcm.timesteps.tolist())) == 150
    assert int(lcm.timesteps[0]) == 999


def test_flow_heun_equals_diffusers_on_the_schedule_that_both_can_have() -> None:
    """diffusers' Heun fixes its own sigmas; ours is given the same ones, unshifted."""
    theirs = FlowMatchHeunDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(7)
    sigmas = [float(theirs.sigmas[0]), *(float(sigma) for sigma in theirs.sigmas[1:-1:2])]
    ours = samplers.build(
        FlowMatchEulerDiscreteScheduler(shift=1.0), samplers.FLOW_MATCHING, "heun", None, steps=7, seeds=[0]
    )
    ours.set_timesteps(7, sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    mine = other = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    for timestep in theirs.timesteps:
        scale = 1 + timestep / 1000
        mine = ours.step(torch.tanh(mine * scale), timestep, mine, return_dict=False)[0]
        other = theirs.step(torch.tanh(other * scale), timestep, other, return_dict=False)[0]
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_flow_heun_takes_the_shift_of_the_euler_scheduler() -> None:
    euler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    heun = samplers.build(euler, samplers.FLOW_MATCHING, "heun", "normal", steps=4, seeds=[0])
    sigmas = np.linspace(1, 1 / 4, 4)
    euler.set_timesteps(4, sigmas=sigmas, mu=0.8)
    heun.set_timesteps(4, sigmas=sigmas, mu=0.8)
    torch.testing.assert_close(heun.sigmas, euler.sigmas)
    assert heun.timesteps.tolist() == euler.timesteps.tolist()[:1] + [
        t for t in euler.timesteps.tolist()[1:] for _ in "12"
    ]


@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_a_scheduler_is_made_without_a_schedule_that_nobody_runs(
    saved: DDIMScheduler, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """diffusers' KDPM2 sets a thousand timesteps in its constructor, one interpolation each."""
    kind = samplers.scheduler_class(samplers.DIFFUSION[sampler].scheduler_class)
    asked: list[int] = []
    own = kind.set_timesteps

    @functools.wraps(own)
    def set_timesteps(self: Any, num_inference_steps: int, *args: Any, **kwargs: Any) -> None:
        asked.append(num_inference_steps)
        own(self, num_inference_steps, *args, **kwargs)

    monkeypatch.setattr(kind, "set_timesteps", set_timesteps)
    schedulers.on_host.cache_clear()
    with quiet():
        made = samplers.build(saved, samplers.DIFFUSION, sampler, None, steps=8, seeds=[0])
        at_first = list(asked)
        made.set_timesteps(8)
    schedulers.on_host.cache_clear()
    assert all(steps <= 2 for steps in at_first)
    assert asked[-1] == 8
