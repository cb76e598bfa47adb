"""Full-size models on smaller cards, by the plan alone: what the device counts, against the plan's arithmetic."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import pytest

from app.settings import Settings
from benchmarks.geometries import FLUX_DEV, FLUX_SMALL, SD15, SDXL, SDXL_REFINER, Geometry
from cache import DeepCache
from models.base import Refiner
from tests.accelerator.device import Accelerator
from tests.accelerator.loading import load
from tests.accelerator.memory import phases, request, strategies
from tests.accelerator.waits import waits

TOLERANCE = 1.1
"""The plan counts no less than the device in any phase, and at most so many times as much in the one that decides."""

CARDS = [
    # GB, as the founding document has them without a cache; here the cache is in them. What the plan is to choose.
    (SD15, 3.2, "none"),
    (SDXL, 6.8, "model"),
    (FLUX_DEV, 12.5, "group"),
    (FLUX_SMALL["Q4_0"], 8.0, "group"),
]


@pytest.mark.parametrize(("geometry", "gigabytes", "offload"), CARDS, ids=lambda one: getattr(one, "name", str(one)))
def test_a_model_draws_with_its_cache_on_a_smaller_card(
    monkeypatch: pytest.MonkeyPatch, device: Accelerator, geometry: Geometry, gigabytes: float, offload: str
) -> None:
    monkeypatch.setenv("WAVESPEED_DEVICE_MEMORY", str(gigabytes * 1e9 / 2**30))
    asked, before = Settings().device_memory, device.live
    assert asked is not None
    loaded = load(geometry, memory=int(asked * 2**30))
    residence = loaded.model.residence
    assert residence is not None
    assert residence.plan.offload == offload
    with device.counting() as whole, phases(device, loaded) as found:
        run = waits(device, loaded, request(geometry, steps=3), strategies(geometry)["default"])
    most = whole.peak - before
    assert most <= gigabytes * 1e9
    told = residence.plan.peaks(residence.sizes, loaded.model.work(geometry.width, geometry.height, 1))
    assert all(found[phase] - before <= told[phase] for phase in told), (found, told)
    assert max(told.values()) <= TOLERANCE * most
    (report,) = run.generation.reports
    assert set(report.decisions) == {"C", "R"}
    assert bool(run.generation.warnings) == (offload != "none")
    waited = sum(run.steps[1:], Counter())
    unpacking = {place for place in waited if place.startswith("to device diffusers/quantizers/gguf/utils.py")}
    assert bool(unpacking) == (geometry.small == "Q4_0")  # diffusers sends a table along with each matrix
    decided = len(report.decisions) - 1 if geometry.family == "flux-dev" else 0  # what the first-block cache reads
    assert sum(waited[place] for place in waited.keys() - unpacking) == decided  # streaming waits for nothing


def test_a_model_and_its_refiner_take_turns_on_a_small_card(device: Accelerator) -> None:
    gc.collect()  # what earlier runs have left lies on the device until then
    memory, before = int(7.8e9), device.live
    base = load(SDXL, memory=memory)
    row = base.model.plan_row()
    assert row is not None
    refiner = load(SDXL_REFINER, memory=max(0, memory - max(row["peak_bytes"].values())))
    size = (SDXL.width, SDXL.height, 1)
    work = base.model.work(*size).beside(refiner.model.work(*size))
    params = replace(request(SDXL, steps=5), refiner=Refiner(model="sdxl-refiner"))
    with device.counting() as whole, base.refined_by(refiner):
        joint = base.model.residence
        assert joint is not None
        assert joint.plan.offload == "model"
        made = base.generate(params, DeepCache(interval=2), lambda step: None)
        told = joint.plan.need(joint.sizes, work)
    most = whole.peak - before
    assert most <= told <= min(memory, TOLERANCE * most)
    assert [(one.name, one.steps) for one in made.stages] == [("base", 4), ("refiner", 1)]
    assert base.model.plan_row() == row
