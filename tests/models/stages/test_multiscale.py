"""Steps at a reduced size: which, what the denoiser is shown, and that an exact denoiser notices no difference."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from cache import CacheReport, DeepCache, FirstBlockCache, NoCache
from cache.prediction import Diffusion, FlowMatching, Prediction, prediction_of
from models.base import GenerationParams, Multiscale
from models.generation import LoadedModel
from models.layout import Packed, Spatial
from models.stages.multiscale import Scales, is_reduced, low_frequencies
from tests.models.stages.test_stages import ignore, pixels

PARAMS = GenerationParams(prompt="a misty forest", width=96, height=64, steps=12, guidance_scale=3.0, seeds=(7,))


@pytest.mark.parametrize(
    ("settings", "steps", "sizes"),
    [
        (Multiscale(), 20, "FFFSSSFSSSFSFFFFFFFF"),
        (Multiscale(intermittent=False), 20, "FFFSSSSSSSSSFFFFFFFF"),
        (Multiscale(fullres_start=0, fullres_end=0), 5, "SSSFS"),
        (Multiscale(), 11, "F" * 11),
        (Multiscale(factor=1.0, fullres_start=0, fullres_end=0), 3, "FFF"),
    ],
)
def test_which_steps_are_small(settings: Multiscale, steps: int, sizes: str) -> None:
    assert "".join("S" if is_reduced(settings, step, steps) else "F" for step in range(steps)) == sizes


def test_low_frequencies_are_orthonormal_and_keep_a_constant() -> None:
    for side, size in ((24, 12), (16, 12), (9, 1), (8, 8)):
        rows = low_frequencies(side, size)
        assert torch.allclose(rows @ rows.T, torch.eye(size), atol=1e-6)  # white noise stays white: float32 sums
        assert torch.allclose(rows @ torch.ones(side), torch.full((size,), math.sqrt(side / size)), atol=1e-5)


DIFFUSION = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predictions_are_those_of_diffusers(kind: str) -> None:
    """DDIM's own x₀, of a step without noise that ends at alpha = 1, is the oracle."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, clip_sample=False
    )
    scheduler.set_timesteps(10)
    prediction = prediction_of(scheduler)
    x, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        expected = scheduler.step(output, timestep, x).pred_original_sample
        level = prediction.at(float(timestep))
        # float32 in diffusers; early epsilons are divided by an alpha of .07
        assert torch.allclose(prediction.clean(x, output, level), expected, atol=1e-4)
        assert torch.allclose(prediction.output(x, expected, level), output, atol=1e-3)
        again = prediction.of_ratio(level.sigma / level.alpha)
        assert again.timestep == pytest.approx(float(timestep), abs=1e-6)


def test_flow_matching_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    prediction = prediction_of(scheduler)
    assert isinstance(prediction, FlowMatching)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps[1:]:
        x = scheduler.scale_noise(clean, timestep[None], noise)
        level = prediction.at(float(timestep) / 1000)
        assert torch.allclose(prediction.clean(x, noise - clean, level), clean, atol=1e-5)
        assert prediction.of_ratio(level.sigma / level.alpha).timestep == pytest.approx(level.timestep)


class Exact(nn.Module):
    """A denoiser that knows the clean latents at every size, and writes down what it was shown."""

    def __init__(self, clean: Tensor, prediction: Prediction, layout: Any) -> None:
        super().__init__()
        self.clean, self.prediction, self.layout = clean, prediction, layout
        self.shown: list[tuple[int, int]] = []

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        latents, timestep = self.layout.input_of((), inputs)
        tokens = "hidden_states" in inputs
        height, width = self.clean.shape[-2:]
        if tokens:
            width = int(inputs["img_ids"][:, 2].max() + 1) * 2
            height = latents.shape[1] * 4 // width
        else:
            height, width = latents.shape[-2:]
        grid = self.layout.grid(latents, height, width)
        self.shown.append((height, width))
        down, across = low_frequencies(24, height), low_frequencies(16, width)
        clean = (down @ self.clean @ across.T) * math.sqrt(height * width / (24 * 16))
        return (self.layout.flat(self.prediction.output(grid, clean, self.prediction.at(timestep))),)


@pytest.mark.parametrize("layout", [Spatial(), Packed()], ids=["spatial", "packed"])
@pytest.mark.parametrize("factor", [0.5, 0.75, 0.1])
def test_an_exact_denoiser_gives_the_same_at_either_size(layout: Any, factor: float) -> None:
    """Where the small size can hold the picture, what is enlarged is what the full size would have given.

    The clean latents lie in the lowest 2 × 2 frequencies, which even the smallest size has.
    """
    prediction = FlowMatching() if isinstance(layout, Packed) else Diffusion(DIFFUSION, "v_prediction")
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(1, 4, 2, 2, generator=generator)
    clean = low_frequencies(24, 2).T @ low @ low_frequencies(16, 2)
    noise = torch.randn(1, 4, 24, 16, generator=generator)
    network = Exact(clean, prediction, layout)

    class Model:
        class denoiser:  # stands for an attribute
            root = network

    Model.layout = layout  # type: ignore[attr-defined]
    settings = Multiscale(factor=factor, fullres_start=1, fullres_end=1, intermittent=False)
    run: Any = SimpleNamespace(steps=3, done=0, grid=(24, 16), report=CacheReport("none"))
    scales = Scales(Model(), settings, run, prediction)  # type: ignore[arg-type]
    for step, timestep in enumerate((0.9, 0.6, 0.2) if isinstance(layout, Packed) else (901.0, 601.0, 201.0)):
        level = prediction.at(timestep)
        latents = layout.flat(level.alpha * clean + level.sigma * noise)
        inputs: dict[str, Any] = {"timestep": torch.tensor([timestep])}
        if isinstance(layout, Packed):
            ids = torch.zeros(12, 8, 3)
            ids[..., 1], ids[..., 2] = torch.arange(12)[:, None], torch.arange(8)[None]
            inputs |= {"hidden_states": latents, "img_ids": ids.reshape(-1, 3)}
        else:
            inputs |= {"sample": latents}
        expected = network(**inputs)[0]
        with scales.attached():
            run.done = step
            run.report.record((True,))
            result = network(**inputs)[0]
        assert torch.allclose(result, expected, atol=1e-4)  # float32, through two transforms
    small = (max(2, round(24 * factor / 2) * 2), max(2, round(16 * factor / 2) * 2))
    if isinstance(layout, Spatial):
        small = (round(24 * factor), round(16 * factor))
    assert network.shown == [(24, 16), (24, 16), (24, 16), small, (24, 16), (24, 16)]
    assert scales.letters == "FSF"
    assert scales.share == small[0] * small[1] / (24 * 16)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("sd", DeepCache(interval=3)), ("sd", NoCache()), ("flux", FirstBlockCache(threshold=1.0))],
)
def test_after_a_change_of_size_a_cache_computes(request: pytest.FixtureRequest, name: str, strategy: Any) -> None:
    """Flux's conditional and unconditional calls come in turn; both compute then."""
    model: LoadedModel = request.getfixturevalue(name)
    settings = Multiscale(fullres_start=2, fullres_end=3)
    sizes = "".join("S" if is_reduced(settings, step, 12) else "F" for step in range(12))
    assert sizes == "FFSSSFSSSFFF"
    drawn = model.generate(replace(PARAMS, multiscale=settings), strategy, ignore)
    (run,) = drawn.stages
    calls = len(run.cache.decisions) // 12
    assert run.sizes == "".join(letter * calls for letter in sizes)
    changed = [at for at in range(1, 12) if sizes[at] != sizes[at - 1]]
    per_step = [run.cache.decisions[at * calls : (at + 1) * calls] for at in range(12)]
    assert {per_step[at] for at in (0, *changed)} == {"C" * calls}
    if not isinstance(strategy, NoCache):
        assert run.cache.reused > 0
    plain = model.generate(PARAMS, strategy, ignore)
    assert not np.array_equal(pixels(drawn.images), pixels(plain.images))
    assert plain.stages[0].sizes == ""


def test_no_small_step_changes_no_bit_and_is_said(sd: LoadedModel) -> None:
    plain = sd.generate(PARAMS, NoCache(), ignore)
    for settings in (Multiscale(fullres_start=6, fullres_end=6), Multiscale(factor=1.0)):
        drawn = sd.generate(replace(PARAMS, multiscale=settings), NoCache(), ignore)
        assert np.array_equal(pixels(drawn.images), pixels(plain.images))
        assert any("Multi-scale had no effect" in sentence for sentence in drawn.warnings)


def test_the_first_step_of_all_may_be_small(sd: LoadedModel, flux: LoadedModel) -> None:
    """Flux begins at t = 1, where nothing of the picture is in the latents."""
    settings = Multiscale(factor=0.05, fullres_start=0, fullres_end=11)
    for model in (sd, flux):
        drawn = model.generate(replace(PARAMS, multiscale=settings), NoCache(), ignore)
        assert drawn.stages[0].sizes.startswith("S")
        assert pixels(drawn.images).std() > 0


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "lms", "pndm", "dpmpp_sde"])
def test_samplers_with_a_history_take_sizes_in_turn(sd: LoadedModel, sampler: str) -> None:
    settings = Multiscale(fullres_start=2, fullres_end=3)
    drawn = sd.generate(replace(PARAMS, sampler=sampler, multiscale=settings), NoCache(), ignore)
    assert set(drawn.stages[0].sizes) == {"F", "S"}
    assert pixels(drawn.images).std() > 0
