"""What a reuse step costs above its layers: the same steps timed for ours, the helper's and the bare one."""

from __future__ import annotations

from typing import Any

from benchmarks.cache.overhead import overhead
from benchmarks.cache.settings import OURS, PUBLISHED


def test_the_reused_steps_are_timed(sd: Any) -> None:
    network = sd.pipeline.unet
    row = overhead(sd.pipeline, branch=0, depth=2, repeats=2, size=(8, 8))
    assert row["branch"] == 0
    assert row["excess"].keys() == {OURS, PUBLISHED}
    assert row["milliseconds"] > 0
    assert sd.pipeline.unet is network
    assert "forward" not in vars(network)
