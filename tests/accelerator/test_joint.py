"""Stable Diffusion 3.5, Chroma and Qwen-Image at full size: on a small card by plan, with their waits."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.joint import CHROMA, QWEN_IMAGE, SD35_LARGE, Geometry
from cache import FirstBlockCache
from tests.accelerator.device import Accelerator
from tests.accelerator.loading import load
from tests.accelerator.memory import phases, request
from tests.accelerator.test_plan import TOLERANCE
from tests.accelerator.waits import waits

NUMBERS = {  # billions of parameters, as their publishers have them
    "sd3.5-large": {"transformer": 8.1, "text_encoder_3": 4.8},
    "chroma": {"transformer": 8.9, "text_encoder": 4.8},
    "qwen-image": {"transformer": 20.4, "text_encoder": 8.3},
}
CARDS = [(SD35_LARGE, 24, "model"), (CHROMA, 16, "group"), (QWEN_IMAGE, 24, "group")]


@pytest.mark.parametrize(("geometry", "gigabytes", "offload"), CARDS, ids=lambda one: getattr(one, "name", str(one)))
def test_it_draws_with_its_cache_on_a_smaller_card(
    device: Accelerator, geometry: Geometry, gigabytes: int, offload: str
) -> None:
    gc.collect()  # what earlier runs have left lies on the device until then
    before = device.live
    loaded = load(geometry, memory=gigabytes * 10**9)
    residence = loaded.model.residence
    assert residence is not None
    assert residence.plan.offload == offload
    counted = {
        name: round(sum(part.numel() for part in residence.networks[name].parameters()) / 1e9, 1)
        for name in NUMBERS[geometry.name]
    }
    assert counted == NUMBERS[geometry.name]
    with device.counting() as whole, phases(device, loaded) as found:
        asked = replace(request(geometry, steps=3), prompt="a cat " * 300)  # more than any of them reads
        run = waits(device, loaded, asked, FirstBlockCache(max_consecutive=1))
    most = whole.peak - before
    assert most <= gigabytes * 10**9
    told = residence.plan.peaks(residence.sizes, loaded.model.work(geometry.width, geometry.height, 1))
    assert all(found[phase] - before <= told[phase] for phase in told), (found, told)
    assert max(told.values()) <= TOLERANCE * most
    (report,) = run.generation.reports
    assert set(report.decisions) == {"C", "R"}
    first, *steps = run.steps
    decisions = len(report.decisions) // 3  # of a step: each is read
    assert [sum(step.values()) for step in steps] == [decisions] * 2
    assert all("first_block/rule" in place for place in sum(steps, Counter()))
    # Chroma's streams are looked at once, whether they are joined as they lie; Qwen-Image's positions come once.
    begun = [place for place in first.elements() if "loading/residence" not in place]  # what brings the weights
    assert len(begun) == {"chroma": 1, "qwen-image": 2}.get(geometry.name, 0)
