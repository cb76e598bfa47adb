"""What a reuse step costs above its layers: the same steps timed for ours, the helper's and the bare one."""

from __future__ import annotations

from typing import Any

from benchmarks.cache.overhead import of_step, overhead
from benchmarks.cache.settings import OURS, PUBLISHED


def test_the_reused_steps_are_timed(sd: Any) -> None:
    network = sd.pipeline.unet
    row = overhead(sd.pipeline, branch=0, depth=2, repeats=2, size=(8, 8))
    assert row["branch"] == 0
    assert row["excess"].keys() == {OURS, PUBLISHED}
    assert row["milliseconds"] > 0
    assert sd.pipeline.unet is network
    assert "forward" not in vars(network)


def test_the_overhead_must_be_small_and_below_the_helpers() -> None:
    rows = [
        {"branch": branch, "milliseconds": 5.0, "excess": {OURS: own, PUBLISHED: published}}
        for branch, (own, published) in enumerate([(0.03, 0.1), (0.03, 0.02), (0.06, 0.1)])
    ]
    assert [of_step(row).holds for row in rows] == [True, False, False]
