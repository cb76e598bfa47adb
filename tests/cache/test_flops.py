"""Counted operations: the contract's table on the true geometries, and the operations of passes that are really run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache import (
    CacheReport,
    DeepCache,
    FirstBlockCache,
    IncompatibleDenoiser,
    TransformerDenoiser,
    UNetDenoiser,
    attach,
    flops,
    view_of,
)
from cache.flops import deepest_branch, interval_speedup
from tests.cache.networks import (
    conditioning,
    flux_inputs,
    tiny_flux,
    tiny_sd,
    tiny_sdxl,
    tiny_unconditional,
)

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# docs: the contract, section 3
TABLES = {
    "SD1.5": (SD15, [0.079, 0.224, 0.380, 0.470, 0.564, 0.673, 0.760, 0.848, 0.941], 12, [3, 1, 1, 0]),
    "SDXL": (SDXL, [0.015, 0.038, 0.066, 0.129, 0.214, 0.306, 0.437, 0.659, 0.882], 9, [6, 5, 4, 3]),
}
PRESETS = [(3, 2, 2.0), (5, 3, 2.78), (2, 1, 1.5)]  # interval, depth, the promised speed-up


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """The counter does not know the CPU's fused attention, so that attention runs as the two products that it is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@functools.cache
def costs_of(name: str) -> tuple[float, ...]:
    with torch.device("meta"):
        return UNetDenoiser(UNet2DConditionModel(**TABLES[name][0])).branch_costs


@pytest.mark.parametrize("name", TABLES)
def test_the_contracts_table(name: str) -> None:
    _, expected, branches, _ = TABLES[name]
    costs = costs_of(name)
    assert len(costs) == branches
    assert costs[: len(expected)] == pytest.approx(expected, abs=0.01)
    assert list(costs) == sorted(costs)


@pytest.mark.parametrize("name", TABLES)
def test_depths_choose_the_contracts_branches(name: str) -> None:
    assert [deepest_branch(costs_of(name), depth) for depth in range(4)] == TABLES[name][3]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("depth", range(13))
def test_a_reuse_call_stays_within_its_depths_bound(name: str, depth: int) -> None:
    costs = costs_of(name)
    branch = deepest_branch(costs, depth)
    if branch is None:
        assert min(costs) > 1 / (depth + 2)
        assert (name, depth) in {("SD1.5", 11), ("SD1.5", 12)}
        return
    assert costs[branch] <= 1 / (depth + 2)
    assert all(cost > 1 / (depth + 2) for cost in costs[branch + 1 :])


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("interval", "depth", "promised"), PRESETS)
def test_presets_keep_their_promise(name: str, interval: int, depth: int, promised: float) -> None:
    costs = costs_of(name)
    branch = deepest_branch(costs, depth)
    assert branch is not None
    assert interval_speedup(interval, costs[branch]) >= promised


def test_a_preset_keeps_its_promise_beside_a_controlnet() -> None:
    """One of SD1.5's, by a report of 20 calls of which 7 compute."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**TABLES["SD1.5"][0])
        network = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    size, (args, inputs) = UNetDenoiser(unet).counted()
    hint = torch.empty(1, 3, 8 * size[0], 8 * size[1], device="meta")
    share = flops.count(network, args, {**inputs, "controlnet_cond": hint})[""] / flops.count(unet, args, inputs)[""]
    report = CacheReport("deepcache", decisions="CRR" * 6 + "CR", reuse_cost=costs_of("SD1.5")[1])
    assert report.predicted_speedup == pytest.approx(2.02, abs=0.01)
    report.control_operations = 7 * share, 20 * share
    assert report.predicted_speedup == pytest.approx(2.18, abs=0.01)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl, tiny_unconditional])
@torch.no_grad()
def test_branch_costs_equal_the_operations_of_the_passes_that_run(build: Callable[[], nn.Module]) -> None:
    """Counted while real calls run on real weights, where the implementation counts by module on a copy without."""
    network = build()
    view = view_of(network)
    assert isinstance(view, UNetDenoiser)
    inputs = {"sample": torch.randn(1, network.config.in_channels, 16, 16), "timestep": torch.tensor(10)}
    inputs |= conditioning(network, 1)
    if "encoder_hidden_states" in inputs:
        inputs["encoder_hidden_states"] = torch.randn(1, 77, 32)
    with counting() as full:
        network(**inputs)
    for depth in range(5):
        with attach(view, DeepCache(2, depth)) as report:
            network(**inputs)
            with counting() as reuse:
                network(**inputs)
        assert report.decisions == "CR"
        assert report.reuse_cost == pytest.approx(reuse.get_total_flops() / full.get_total_flops(), rel=1e-9)


@torch.no_grad()
def test_the_first_blocks_cost_equals_the_operations_of_a_reuse_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_OPERATIONS", {})  # else those of whichever size was counted first
    network = tiny_flux()
    inputs = {"hidden_states": torch.randn(2, 64, 16), "timestep": torch.tensor([0.5, 0.5])}
    inputs |= flux_inputs(network, 2, (16, 16))
    with counting() as full:
        network(**inputs)
    with attach(network, FirstBlockCache(1.0)) as report:
        network(**inputs)
        with counting() as reuse:
            network(**inputs)
    assert report.decisions == "CR"
    assert report.reuse_cost == pytest.approx(reuse.get_total_flops() / full.get_total_flops(), rel=1e-9)
    assert report.predicted_speedup == pytest.approx(2 / (1 + report.reuse_cost))
    again = TransformerDenoiser(tiny_flux())
    assert again.first_block_cost((), {}) == report.reuse_cost, "of a known configuration, it is not counted again"


def test_the_native_size_decides_the_costs() -> None:
    network = tiny_sd()
    small = UNetDenoiser(network, native_size=(16, 16)).branch_costs
    large = UNetDenoiser(network, native_size=(64, 64)).branch_costs
    assert UNetDenoiser(network).branch_costs == small
    assert small != large  # attention grows faster than convolution


def test_a_network_of_a_known_configuration_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = UNetDenoiser(tiny_sd()).branch_costs
    counted: list[nn.Module] = []
    count = flops.count
    monkeypatch.setattr(flops, "count", lambda root, *inputs: counted.append(root) or count(root, *inputs))
    assert UNetDenoiser(tiny_sd()).branch_costs == known
    assert counted == []
    other = tiny_sd()
    other.register_to_config(sample_size=24)
    assert UNetDenoiser(other).branch_costs != known
    assert counted == [other]


def test_a_size_that_no_config_names_must_be_given() -> None:
    network = tiny_sd()
    network.register_to_config(sample_size=None)
    with pytest.raises(IncompatibleDenoiser, match="native_size"):
        _ = UNetDenoiser(network).branch_costs
    assert len(UNetDenoiser(network, native_size=(8, 8)).branch_costs) == 12


def test_counting_leaves_the_network_as_it_was() -> None:
    network = tiny_sd()
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    _ = UNetDenoiser(network).branch_costs
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == before
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}


class Adding(nn.Module):
    """A block of somebody's own, and a network of them that no config describes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 0.1 * self.linear(hidden_states)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adding() for _ in range(3))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


class Configured(Plain):
    """Looks like diffusers' until it is built."""

    config: ClassVar[dict[str, object]] = {}

    @classmethod
    def from_config(cls, config: dict[str, object]) -> nn.Module:
        raise KeyError("_class_name")


@pytest.mark.parametrize("kind", [Plain, Configured])
def test_a_run_whose_operations_cannot_be_counted_is_kept(kind: type[nn.Module]) -> None:
    network = kind()
    start = torch.randn(1, 4, 8)
    with torch.no_grad(), attach(network, FirstBlockCache(0.9)) as report:
        drawn = [network(hidden_states=start)[0] for _ in range(3)]
    assert torch.equal(drawn[0], network(hidden_states=start)[0])
    assert (report.decisions, report.reuse_cost, report.predicted_speedup) == ("CRR", None, None)
    assert report.as_dict()["predicted_speedup"] is None
    (warning,) = report.warnings
    assert warning.startswith("No speed-up is predicted.")
    assert kind.__name__ in warning
