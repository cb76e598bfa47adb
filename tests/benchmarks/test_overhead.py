"""What a reuse step costs above its layers: the same steps timed for ours, the hook's and the bare one."""

from __future__ import annotations

import torch

from benchmarks.cache.overhead import first_block_overheads
from tests.cache.networks import flux_inputs, tiny_flux


def test_the_first_block_caches_are_timed_at_reused_calls() -> None:
    network = tiny_flux()
    latents = torch.zeros(1, 64, 16)
    arguments = {"hidden_states": latents, "timestep": torch.ones(1), **flux_inputs(network, 1, (16, 16))}
    row = first_block_overheads(network, arguments, 4, "the first block")
    assert row["layers"] == "the first block"
    assert row["milliseconds"].keys() == {"bare", "ours", "ours, no forecast", "diffusers FirstBlockCache"}
    assert row["excess"].keys() == row["milliseconds"].keys() - {"bare"}
    assert min(row["milliseconds"].values()) > 0
