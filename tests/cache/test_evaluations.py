"""Samplers that evaluate twice a step, repeat timesteps or add noise: calls are counted, and each reuses rightly.

The oracle runs the whole network at every call and puts the kept state in the place where the branch begins.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor, nn

from cache import DeepCache, UNetDenoiser, attach
from tests.cache.networks import conditioning, small_unet

STEPS = 5
# Class, its settings, and the calls that five steps take.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "heun": (HeunDiscreteScheduler, {}, 9),
    "dpm2": (KDPM2DiscreteScheduler, {}, 9),
    "dpm2 ancestral": (KDPM2AncestralDiscreteScheduler, {}, 9),
    "dpm++ sde": (DPMSolverSDEScheduler, {"noise_sampler_seed": 0}, 9),
    "dpm++ 2m sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 5),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}, 6),
}

# Of diffusers' own arithmetic between torch and numpy, and of torchsde's ends, which it clips.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),
]


def denoise(network: nn.Module, name: str) -> list[Tensor]:
    kind, settings, _ = SCHEDULERS[name]
    scheduler = kind(**settings)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator) * scheduler.init_noise_sigma
    extra = conditioning(network, 1)
    noise = {} if name in ("heun", "dpm2", "dpm++ sde", "pndm") else {"generator": generator}
    states = []
    for timestep in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(latents, timestep), timestep, **extra).sample
        latents = scheduler.step(prediction, timestep, latents, **noise).prev_sample
        states.append(latents)
    return states


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_every_call_of_a_sampler_reuses_what_the_last_computed_call_kept(name: str) -> None:
    network = small_unet()
    calls = SCHEDULERS[name][2]
    with attach(network, DeepCache(3, 0, forecast=False)) as report:
        latents = denoise(network, name)
    assert report.decisions == ("CRR" * calls)[:calls]

    kept: list[Any] = []

    def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
        call = len(kept)
        kept.append(output if call % 3 == 0 else kept[-1])
        return kept[-1]

    source = UNetDenoiser(network).source(report.settings["branch"])
    handle = source.register_forward_hook(replace)
    expected = denoise(network, name)
    handle.remove()
    assert len(kept) == calls
    assert [torch.equal(a, b) for a, b in zip(latents, expected, strict=True)] == [True] * calls
    assert not torch.equal(latents[1], denoise(network, name)[1])
