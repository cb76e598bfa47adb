"""FLUX.2 klein and Z-Image at their published sizes: parameters, waits, and the memory of small cards."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import no_grad

from benchmarks.chat import CHAT, FLUX2_KLEIN, FLUX2_KLEIN_BASE, Z_IMAGE, Z_IMAGE_TURBO
from benchmarks.geometries import Geometry
from tests.accelerator.__main__ import TAKEN
from tests.accelerator.conftest import Load
from tests.accelerator.device import Accelerator
from tests.accelerator.loading import load as load_on
from tests.accelerator.memory import phases, request, strategies
from tests.accelerator.waits import STRATEGIES, waits

PUBLISHED = {  # millions of parameters: FLUX.2 klein 4B, Z-Image of 6B, with Qwen3-4B
    FLUX2_KLEIN: {"transformer": 3876, "text_encoder": 4022, "vae": 84},
    Z_IMAGE: {"transformer": 6155, "text_encoder": 4022, "vae": 84},
}


@pytest.mark.parametrize("geometry", PUBLISHED, ids=lambda one: one.name)
def test_networks_have_their_published_sizes(load: Load, geometry: Geometry) -> None:
    pipeline = load(geometry).pipeline
    for name, millions in PUBLISHED[geometry].items():
        assert round(sum(one.numel() for one in getattr(pipeline, name).parameters()) / 1e6) == millions


@pytest.mark.parametrize("geometry", CHAT, ids=lambda one: one.name)
def test_no_step_waits_but_to_read_a_decision(device: Accelerator, load: Load, geometry: Geometry) -> None:
    """The first run after loading uploads tables, and sees once how the streams are joined."""
    model, params = load(geometry), request(geometry, 3)
    for strategy in STRATEGIES["first_block"].values():
        waits(device, model, params, strategy)
    for sampler in ("euler", "heun"):
        for strategy in STRATEGIES["first_block"].values():
            found = waits(device, model, replace(params, sampler=sampler), strategy)
            (report,) = found.generation.reports
            lanes = 2 if geometry is FLUX2_KLEIN_BASE else 1
            assert sum(found.places.values()) == (len(report.decisions) - lanes if report.residuals else 0)
            assert all(place.startswith("from device cache/first_block/rule.py:") for place in found.places)


CARDS = [(FLUX2_KLEIN, 8, "group"), (FLUX2_KLEIN, 12, "model"), (Z_IMAGE_TURBO, 16, "model")]


@pytest.mark.parametrize(("geometry", "gigabytes", "offload"), CARDS, ids=lambda one: getattr(one, "name", str(one)))
def test_a_small_card_draws_it_as_planned(geometry: Geometry, gigabytes: int, offload: str) -> None:
    """The plan counts no less than the device in any phase, and at most a tenth more in the one that decides."""
    device = Accelerator()
    with device, no_grad():
        loaded = load_on(geometry, memory=int((gigabytes - TAKEN) * 2**30))
        model, residence, params = loaded.model, loaded.model.residence, request(geometry, 3)
        assert residence is not None
        assert residence.plan.offload == offload
        with device.counting() as whole, phases(device, loaded) as found:
            made = loaded.generate(params, strategies(geometry)["default"], lambda step: None)
        work = model.work(geometry.width, geometry.height, 1, guided=model.runs_twice(params))
        told = residence.plan.peaks(residence.sizes, work)
    assert whole.peak <= (gigabytes - TAKEN) * 2**30
    assert all(found[phase] <= told[phase] for phase in told), (found, told)
    assert max(told.values()) <= 1.1 * whole.peak, (found, told)
    assert "R" in made.reports[0].decisions
