"""The search for compute calls, against every placement there is; the recorder, against the states themselves."""

from __future__ import annotations

import itertools

import pytest
import torch

from cache import IncompatibleDenoiser, TransformerDenoiser, UNetDenoiser
from cache.forecast import Damped
from cache.tuning.placement import Search
from cache.tuning.recorder import BranchRecorder, embedded
from tests.cache.networks import denoise_unet, tiny_flux, tiny_unconditional


def cost(states: torch.Tensor, computed: tuple[int, ...], forecast: bool, weights: list[float]) -> float:
    """The definition, written out: squared sums, gap by gap, of weighted root mean square errors."""
    calls = states.shape[1]
    history, total = Damped(forecast), 0.0
    for call, following in itertools.pairwise([*computed, calls]):
        history.add(call, states[:, call])
        wrong = 0.0
        for reused in range(call + 1, following):
            error = (history.at(reused) - states[:, reused]).square().sum(1).mean().sqrt()
            wrong += float(error) * weights[reused]
        total += wrong**2
    return total


@pytest.mark.parametrize("forecast", [False, True])
@pytest.mark.parametrize("budget", [1, 2, 4, 7])
def test_no_placement_costs_less(forecast: bool, budget: int) -> None:
    calls, generator = 8, torch.Generator().manual_seed(budget)
    states = torch.randn(3, calls, 5, generator=generator).cumsum(1).cumsum(1).double()
    weights = (torch.rand(calls, generator=generator) + 0.1).tolist()
    every = [(0, *rest) for rest in itertools.combinations(range(1, calls), budget - 1)]
    best = min(every, key=lambda computed: cost(states, computed, forecast, weights))
    assert Search(states, forecast, longest=calls).best(budget, weights) == best


def test_gaps_are_no_longer_than_was_said() -> None:
    states = torch.zeros(1, 9, 2, dtype=torch.float64)
    states[:, 1] = 1  # whatever is saved lies at the beginning: without a limit the rest would be one gap
    found = Search(states, False, longest=3).best(4, [1.0] * 9)
    assert found is not None
    assert max(b - a for a, b in itertools.pairwise([*found, 9])) <= 3
    assert Search(states, False, longest=3).best(2, [1.0] * 9) is None


def test_embedded_vectors_have_the_inner_products_of_the_states() -> None:
    states = torch.randn(2, 6, 500, generator=torch.Generator().manual_seed(0))
    found = embedded(states)
    assert found.shape == (2, 6, 6)
    for original, short in zip(states.double(), found, strict=True):
        torch.testing.assert_close(short @ short.T, original @ original.T, rtol=1e-4, atol=1e-3)  # summed in float32


@pytest.mark.parametrize("branch", [0, 2, None])
@torch.no_grad()
def test_the_recorder_sees_what_the_branch_would_keep_and_changes_nothing(branch: int | None) -> None:
    unet = tiny_unconditional()
    view = UNetDenoiser(unet, native_size=(16, 16))
    plain = list(denoise_unet(unet))
    seen: list[torch.Tensor] = []
    hook = (view.root if branch is None else view.source(branch)).register_forward_hook(
        lambda module, inputs, output: seen.append((output if branch is not None else output[0]).flatten(1))
    )
    recorder = BranchRecorder(branch)
    with recorder.attach(view) as report:
        recorded = list(denoise_unet(unet))
    hook.remove()
    assert all(map(torch.equal, plain, recorded))
    assert report.decisions == "C" * len(plain)
    assert recorder.timesteps == sorted(recorder.timesteps, reverse=True)
    own, theirs = recorder.runs[0][0], torch.cat(seen).double()
    torch.testing.assert_close(
        own @ own.T, theirs @ theirs.T, rtol=2e-3, atol=2e-2
    )  # states are kept in half precision


def test_a_transformer_has_no_branches_to_record() -> None:
    with (
        pytest.raises(IncompatibleDenoiser, match="no UNet"),
        BranchRecorder(0).attach(TransformerDenoiser(tiny_flux())),
    ):
        pass


def test_the_search_is_deepcaches_own_forecast() -> None:
    """From its third value on a line is forecast without error; before, it is not: calls 1 and 2 compute at once."""
    line = torch.arange(12.0, dtype=torch.float64)[None, :, None] * torch.ones(1, 1, 4)
    assert Search(line, True, longest=6).best(4, [1.0] * 12) == (0, 1, 2, 6)  # gaps of six at most
