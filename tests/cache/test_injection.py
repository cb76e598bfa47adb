"""ControlNets under a cache: what reuse calls add without running them, and what a report counts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, FluxControlNetModel
from torch import Tensor, nn

from cache import CacheStrategy, DeepCache, Denoiser, FirstBlockCache, Injector, NoCache, TransformerDenoiser
from cache.flops import Call as MetaCall
from cache.flops import count
from cache.forecast import Damped
from cache.views.base import Call
from models.libraries import quiet
from tests.cache.cut import Cut
from tests.cache.networks import conditioning, flux_inputs, tiny_flux, tiny_sd

UNET = "down_block_additional_residuals", "mid_block_additional_residual"
FLUX = "controlnet_block_samples", "controlnet_single_block_samples"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def stirred(network: nn.Module) -> nn.Module:
    """Its zero layers filled."""
    for name, weight in network.named_parameters():
        if "controlnet" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return network.eval()


class OfUNet(Injector):
    """A ControlNet that acts in the calls of these numbers."""

    def __init__(self, unet: nn.Module, acts: range = range(99)) -> None:
        torch.manual_seed(1)
        super().__init__([stirred(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8)))])
        self.map = torch.rand(1, 3, 128, 128)
        self.acts, self.calls = acts, 0

    def acting(self) -> tuple[int, ...]:
        self.calls += 1
        return (0,) if self.calls - 1 in self.acts else ()

    def of(self, call: Mapping[str, Any]) -> dict[str, Any]:
        hint = self.map.expand(len(call["sample"]), -1, -1, -1)
        return dict(zip(UNET, self.networks[0](**{**call, "controlnet_cond": hint, "return_dict": False}), strict=True))

    def compute(self, call: Call, acting: tuple[int, ...]) -> Mapping[str, Any]:
        return self.of(call.kwargs)

    def inputs(self, number: int, call: MetaCall) -> MetaCall:
        return (), {**call[1], "controlnet_cond": torch.empty(1, 3, 128, 128, device="meta")}


class OfFlux(OfUNet):
    def __init__(self, transformer: nn.Module, acts: range = range(99)) -> None:
        torch.manual_seed(1)
        with quiet():
            network = FluxControlNetModel.from_transformer(
                transformer, 3, 7, attention_head_dim=16, num_attention_heads=2
            )
        Injector.__init__(self, [stirred(network)])
        self.acts, self.calls = acts, 0

    def of(self, call: Mapping[str, Any]) -> dict[str, Any]:
        given = {**call, "controlnet_cond": 0.5 * call["hidden_states"], "return_dict": False}
        added = self.networks[0](**given)
        return dict(zip(FLUX, added, strict=True))

    def inputs(self, number: int, call: MetaCall) -> MetaCall:
        return (), {**call[1], "controlnet_cond": call[1]["hidden_states"]}


def unet_call(network: nn.Module, number: int, items: int = 2) -> dict[str, Any]:
    """Calls that follow each other, as those of a sampler do."""
    start, way = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    sample = (start + 0.1 * number * way).repeat(items, 1, 1, 1)
    return {"sample": sample, "timestep": torch.tensor(900 - 30 * number), **conditioning(network, items)}


def flux_call(network: nn.Module, number: int, moves: tuple[float, ...] = (1.0, 1.0)) -> dict[str, Any]:
    start, way = (torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    tokens = torch.cat([start + 0.1 * number * move * way for move in moves])
    items = len(moves)
    given = {name: value for name, value in flux_inputs(network, items, (16, 16)).items() if value is not None}
    return {"hidden_states": tokens, "timestep": torch.tensor([0.9 - 0.03 * number * move for move in moves]), **given}


def only(item: int, call: dict[str, Any]) -> dict[str, Any]:
    """The call for one item of its batch."""
    return {name: value[item : item + 1] if len(value) == 2 else value for name, value in call.items()}


def run(view: Denoiser, strategy: CacheStrategy, calls: list[dict[str, Any]]) -> tuple[list[Tensor], Any]:
    with quiet(), strategy.attach(view) as report:
        answers = [view.root(**call, return_dict=False)[0] for call in calls]
    return answers, report


@pytest.mark.parametrize("strategy", [NoCache(), DeepCache(interval=1)], ids=lambda one: one.name)
def test_where_a_unet_computes_it_is_given_what_its_controlnet_adds(strategy: CacheStrategy) -> None:
    network = tiny_sd()
    injector, calls = OfUNet(network, range(1, 3)), [unet_call(network, number) for number in range(4)]
    expected = [network(**call, **injector.of(call) if n in (1, 2) else {}).sample for n, call in enumerate(calls)]
    assert not torch.equal(expected[1], network(**calls[1]).sample)
    answers, report = run(Cut(network).injecting(injector), strategy, calls)
    assert all(map(torch.equal, answers, expected))
    assert report.control_calls == 2
    assert not any("forward" in module.__dict__ for module in network.modules())


@pytest.mark.parametrize("forecast", [False, True], ids=["published", "forecast"])
@pytest.mark.parametrize("branch", [0, 1, 4])
def test_a_reuse_call_adds_what_was_kept_and_runs_no_controlnet(branch: int, forecast: bool) -> None:
    """The oracle runs the whole UNet, with the branch's state and each residual put in place by hand."""
    network = tiny_sd()
    view, injector = Cut(network, branch), OfUNet(network)
    calls = [unet_call(network, number) for number in range(6)]
    state, residuals = Damped(forecast), [Damped(forecast) for _ in range(12)]
    seen: list[Tensor] = []
    expected = []
    for number, call in enumerate(calls):
        source = view.source(branch)
        if number % 2 == 0:
            added = injector.of(call)
            handle = source.register_forward_hook(lambda module, given, made: seen.append(_first(made)))
            expected.append(network(**call, **added).sample)
            state.add(number, seen[-1])
            for history, residual in zip(residuals, added[UNET[0]], strict=True):
                history.add(number, residual)
        else:
            kept = state.at(number)
            handle = source.register_forward_hook(
                lambda module, given, made, kept=kept: (kept,) if isinstance(made, tuple) else kept
            )
            added = {UNET[0]: [history.at(number) for history in residuals], UNET[1]: torch.zeros(())}
            expected.append(network(**call, **added).sample)
        handle.remove()
    answers, report = run(view.injecting(injector), DeepCache(interval=2, depth=0, forecast=forecast), calls)
    assert report.decisions == "CRCRCR"
    if forecast:  # computed calls repay what reused ones got wrong only where a sampler is known
        assert report.settings["correction"] is False
    assert all(map(torch.equal, answers, expected))
    assert (report.control_calls, injector.due) == (3, [6])
    shallow = sum(residual.nbytes for residual in injector.of(calls[0])[UNET[0]][: branch + 1])
    assert report.cache_bytes >= (2 if forecast else 1) * shallow


def _first(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made


def test_guidance_in_one_half_keeps_that_halfs_residuals() -> None:
    network = tiny_sd()
    view = Cut(network, 1).guided_by(lambda: True)
    calls = [unet_call(network, 0), unet_call(network, 0)]
    strategy = DeepCache(interval=2, depth=0, guidance="reuse")
    answers, report = run(view.injecting(OfUNet(network)), strategy, calls)
    assert report.decisions == "CR"
    assert report.settings["guidance"] == "reuse"
    torch.testing.assert_close(answers[1], answers[0])


def test_calls_with_other_controlnets_than_the_one_before_compute() -> None:
    network = tiny_sd()
    calls = [unet_call(network, number) for number in range(8)]
    _, report = run(Cut(network).injecting(OfUNet(network, range(2, 5))), DeepCache(interval=4, depth=0), calls)
    assert report.decisions == "CRCRRCRR"
    assert report.control_calls == 1


def test_what_a_failed_controlnet_leaves_is_not_reused() -> None:
    network = tiny_sd()
    injector, calls = OfUNet(network), [unet_call(network, number) for number in range(5)]
    whole, injector.map = injector.map, torch.rand(1, 3, 24, 24)
    view = Cut(network).injecting(injector)
    with DeepCache(interval=3, depth=0).attach(view) as report:
        with pytest.raises(RuntimeError):
            network(**calls[0])
        injector.map = whole
        answers = [network(**call).sample for call in calls]
    assert report.decisions == "CRRCR"
    assert torch.equal(answers[0], network(**calls[0], **injector.of(calls[0])).sample)
    assert report.control_calls == 2


@pytest.mark.parametrize("threshold", [0.0, 1e-6])
def test_where_a_transformer_computes_it_is_given_what_its_controlnet_adds(threshold: float) -> None:
    network = tiny_flux()
    injector, calls = OfFlux(network, range(1, 3)), [flux_call(network, number) for number in range(4)]
    expected = [network(**call, **injector.of(call) if n in (1, 2) else {}).sample for n, call in enumerate(calls)]
    assert not torch.equal(expected[1], network(**calls[1]).sample)
    view = TransformerDenoiser(network).injecting(injector)
    answers, report = run(view, FirstBlockCache(threshold, forecast=False), calls)
    assert report.decisions == "CCCC"
    assert report.control_calls == 2
    assert all(map(torch.equal, answers, expected))


def test_a_reused_call_of_a_transformer_runs_no_controlnet() -> None:
    """The oracle runs all blocks, and puts what the first computed call added in the last one's place."""
    network = tiny_flux()
    injector, calls = OfFlux(network), [flux_call(network, number) for number in range(3)]
    heads: list[Tensor] = []
    network.transformer_blocks[0].register_forward_hook(lambda module, given, made: heads.append(made[1]))
    given: list[Tensor] = []
    handle = network.norm_out.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    expected = [network(**calls[0], **injector.of(calls[0])).sample]
    tail = given[0] - heads[0]
    handle.remove()
    handle = network.norm_out.register_forward_pre_hook(lambda module, args: (heads[-1] + tail, *args[1:]))
    expected += [network(**call).sample for call in calls[1:]]
    handle.remove()
    view = TransformerDenoiser(network).injecting(injector)
    answers, report = run(view, FirstBlockCache(1.0, forecast=False), calls)
    assert report.decisions == "CRR"
    assert (report.control_calls, injector.due) == (1, [3])
    assert all(map(torch.equal, answers, expected))


def test_items_decide_apart_with_a_controlnet() -> None:
    """One stands still and the other moves: each comes out as if it ran alone."""
    network = tiny_flux()
    moves = (0.0, 3.0)
    strategy = FirstBlockCache(0.15, forecast=False)
    together, report = run(
        TransformerDenoiser(network).injecting(OfFlux(network)),
        strategy,
        [flux_call(network, number, moves) for number in range(4)],
    )
    letters = []
    for item in range(2):
        alone, apart = run(
            TransformerDenoiser(network).injecting(OfFlux(network)),
            strategy,
            [only(item, flux_call(network, number, moves)) for number in range(4)],
        )
        letters.append(apart.decisions)
        for one, of_batch in zip(alone, together, strict=True):
            torch.testing.assert_close(of_batch[item : item + 1], one)
    assert report.item_decisions == letters
    assert letters[0] != letters[1]


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_a_report_counts_their_operations(kind: str) -> None:
    network = tiny_sd() if kind == "unet" else tiny_flux()
    injector = OfUNet(network) if kind == "unet" else OfFlux(network)
    view: Denoiser = Cut(network, 1) if kind == "unet" else TransformerDenoiser(network)
    strategy = DeepCache(interval=3, depth=0) if kind == "unet" else FirstBlockCache(1.0)
    make = unet_call if kind == "unet" else flux_call
    _, report = run(view.injecting(injector), strategy, [make(network, number) for number in range(6)])
    assert injector.first is not None
    _, first = view.counted(injector.first)
    with quiet():
        share = count(injector.networks[0], *injector.inputs(0, first))[""] / count(network, *first)[""]
    computed, reused, cost = report.computed, report.reused, report.reuse_cost
    assert report.control_calls == computed
    spent = computed + reused * cost + computed * share
    assert report.predicted_speedup == pytest.approx(6 * (1 + share) / spent)
    told = report.as_dict()["control"]
    assert told == {"calls": computed, "share": round(computed * share / spent, 4)}
