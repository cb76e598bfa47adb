"""No step makes the host wait: every sampler with every strategy, at full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FluxControlNetModel
from PIL import Image

from benchmarks.geometries import FLUX_DEV, FLUX_SCHNELL, SD15, SDXL, Geometry, materialise
from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from cache.solver import responses
from models.base import Control, GenerationParams, Multiscale
from models.control import ControlNets
from models.libraries import quiet
from models.sampling import samplers
from tests.accelerator.conftest import Load
from tests.accelerator.device import NAME, Accelerator, hollow
from tests.accelerator.waits import STRATEGIES, Waits, waits


def params(geometry: Geometry, **changes: Any) -> GenerationParams:
    settings = {"steps": 3, "prompt": "a cat", "width": geometry.width, "height": geometry.height}
    return GenerationParams(**{**settings, "guidance_scale": geometry.guidance_scale, **changes})


@pytest.fixture
def run(device: Accelerator, load: Load) -> Any:
    def run(geometry: Geometry, strategy: CacheStrategy, **changes: Any) -> Waits:
        return waits(device, load(geometry), params(geometry, **changes), strategy)

    return run


@pytest.mark.parametrize("strategy", STRATEGIES["deepcache"], ids=str)
@pytest.mark.parametrize("sampler", samplers.DIFFUSION)
def test_no_sampler_waits_with_or_without_deepcache(run: Any, sampler: str, strategy: str) -> None:
    found = run(SD15, STRATEGIES["deepcache"][strategy], sampler=sampler)
    assert len(found.steps) == 3
    assert found.places == {}


@pytest.mark.parametrize("strategy", STRATEGIES["first_block"], ids=str)
@pytest.mark.parametrize("sampler", samplers.FLOW_MATCHING)
def test_a_first_block_decision_is_read_once(run: Any, sampler: str, strategy: str) -> None:
    found = run(FLUX_DEV, STRATEGIES["first_block"][strategy], sampler=sampler)
    (report,) = found.generation.reports
    decisions = len(report.decisions) - 1 if report.residuals else 0  # at the first call there is nothing to decide
    assert sum(found.places.values()) == decisions
    assert all(place.startswith("from device cache/first_block/rule.py:") for place in found.places)


def test_what_else_runs_in_a_step_does_not_wait(run: Any) -> None:
    settings = Multiscale(fullres_start=1, fullres_end=1, intermittent=False)
    for geometry in (SD15, FLUX_SCHNELL):
        assert run(geometry, NoCache(), multiscale=settings).places == {}
    assert run(SDXL, DeepCache(start=100, end=900)).places == {}  # the window reads each call's timestep
    assert run(SD15, DeepCache(), scheduler="karras", sampler="dpmpp_2m", seeds=(1, 2), batch_size=2).places == {}


def test_a_controlnet_does_not_wait_and_is_spared_in_reused_calls(
    run: Any, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control(name="edges", path=Path("nowhere"), image=Image.new("RGB", (64, 64)), edges=True)
    cases = [
        (SD15, ControlNetModel.from_unet, {"load_weights_from_unet": False}, DeepCache(interval=2)),
        (
            FLUX_SCHNELL,
            FluxControlNetModel.from_transformer,
            {"load_weights_from_transformer": False},
            FirstBlockCache(),
        ),
    ]
    monkeypatch.setattr(ControlNets, "ready", lambda *_: None)
    for geometry, make, settings, strategy in cases:
        root = load(geometry).model.denoiser.root
        with torch.device("meta"), quiet():
            network = make(root, **settings)
        materialise(network, geometry.dtype, hollow)
        network.to(NAME)
        monkeypatch.setattr(ControlNets, "of", lambda *_, network=network: [network])
        found = run(
            geometry,
            strategy,
            control=(control,),
            steps=2 if geometry is SD15 else 4,
            sampler="ddim" if geometry is SD15 else None,
        )
        assert all(place.startswith("from device cache/first_block/rule.py:") for place in found.places)
        (report,) = found.generation.reports
        assert report.reused > 0
        assert report.control_calls == report.computed
        if geometry is SD15:  # by counted operations: 1.72 at interval 2, where it was 1
            assert report.predicted_speedup == pytest.approx(1.72, abs=0.02)
            assert report.control_share == pytest.approx(0.353 / (1 + 0.353 + report.reuse_cost), abs=0.005)


def test_items_that_decide_apart_are_read_together(run: Any, device: Accelerator) -> None:
    def script(shape: torch.Size) -> torch.Tensor:
        told = torch.full(shape, 0.01)
        if shape:  # what is asked of all at once, such as whether it is finite, is a single number
            told[..., 1::2] = 0.5
        return told

    device.script = script
    found = run(FLUX_SCHNELL, FirstBlockCache(), seeds=(1, 2), batch_size=2)
    assert found.generation.reports[0].item_decisions == ["CRC", "CCC"]
    assert [sum(step.values()) for step in found.steps] == [0, 1, 1]


def test_a_preview_is_read_once(run: Any) -> None:
    found = run(SD15, DeepCache(), preview=True)
    assert {place.split(":")[0] for place in found.places} == {"from device models/stages/preview.py"}
    assert [sum(step.values()) for step in found.steps] == [1, 1, 1]


@pytest.mark.parametrize("scheduler_class", [FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler])
def test_responses_are_known_wherever_a_scheduler_has_its_tables(device: Accelerator, scheduler_class: Any) -> None:
    with quiet():
        here, there = scheduler_class(), scheduler_class()
        here.set_timesteps(5, device=NAME)
        there.set_timesteps(5)
    assert here.timesteps.device.type == NAME
    expected = responses(there)
    assert expected is not None
    assert responses(here) == expected


def test_the_correction_acts_off_the_cpu(run: Any) -> None:
    cases = [(SD15, DeepCache(interval=2), sampler) for sampler in ("euler", "dpmpp_2m", "unipc", "ddim")]
    for geometry, strategy, sampler in [*cases, (FLUX_DEV, FirstBlockCache(max_consecutive=1), "euler")]:
        (report,) = run(geometry, strategy, sampler=sampler, steps=4).generation.reports
        assert report.decisions == ("CRCC" if geometry == FLUX_DEV else "CRCR")  # a known last call computes
        assert report.settings["correction"] is True
