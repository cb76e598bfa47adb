"""The presets on the shapes of large models: speed-up in operations, counted without weights."""

from __future__ import annotations

import torch

from benchmarks.geometry import SD15, SDXL
from benchmarks.report import Claim
from cache import UNetDenoiser
from cache.cost import deepest_branch, interval_speedup

PRESETS = {"balanced": (3, 2, 2.0), "max_speed": (5, 3, 2.78), "max_quality": (2, 1, 1.5)}
"""Interval, depth, and the speed-up that it is to reach at least."""


def counted() -> list[Claim]:
    """One claim a preset and architecture, at the native size of each."""
    from diffusers import UNet2DConditionModel

    claims = []
    for model, config in (("SD1.5", SD15), ("SDXL", SDXL)):
        with torch.device("meta"):
            costs = UNetDenoiser(UNet2DConditionModel(**config)).branch_costs
        for name, (interval, depth, wanted) in PRESETS.items():
            if (branch := deepest_branch(costs, depth)) is not None:
                speedup = interval_speedup(interval, costs[branch])
                measured = f"{speedup:.2f}×, branch {branch}, a reuse step at {costs[branch]:.3f} of a full one"
                sentence = f"{model}, {name} (interval {interval}, depth {depth}): at least {wanted}×"
                claims.append(Claim(sentence, measured, speedup >= wanted))
    return claims
