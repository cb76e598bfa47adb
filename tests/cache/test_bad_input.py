"""What a cache cannot work on is refused with a sentence, and no picture comes out wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache import (
    CacheStrategy,
    DeepCache,
    FirstBlockCache,
    IncompatibleDenoiser,
    UNetDenoiser,
    attach,
)
from tests.cache.networks import Residual, denoise_flux, denoise_unet, small_flux, small_unet

CASES = [(small_unet, denoise_unet, DeepCache(2, 1)), (small_flux, denoise_flux, FirstBlockCache(1.0))]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("build", "denoise", "strategy"), CASES)
def test_a_network_that_was_compiled_whole_is_refused(build: Any, denoise: Any, strategy: CacheStrategy) -> None:
    wrapped = torch.compile(build(), backend="eager")
    in_place = build()
    in_place.compile(backend="eager")
    for network in (wrapped, in_place):
        before = dict(vars(network))
        with pytest.raises(IncompatibleDenoiser, match="compiled as a whole"), attach(network, strategy):
            pass
        assert vars(network) == before


class Between(nn.Module):
    """Does something between its blocks."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(8) for _ in range(3))
        self.between = between

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(self.between(hidden_states), condition.clone())
        return hidden_states


def test_what_lies_between_blocks_is_seen() -> None:
    start, condition = torch.randn(1, 5, 8), torch.randn(1, 8)
    harmless, lost = Between(torch.clone), Between(lambda hidden: 1.1 * hidden)
    with attach(harmless, FirstBlockCache(0.5)) as report:
        torch.testing.assert_close(*[harmless(start, condition) for _ in range(2)])
    assert report.decisions == "CR"
    with (
        pytest.raises(IncompatibleDenoiser, match="changes hidden_states on its way to block 1"),
        attach(lost, FirstBlockCache(0.5)),
    ):
        lost(start, condition)


def own(timesteps: Any, training: Any = 1000) -> Any:
    return SimpleNamespace(timesteps=timesteps, config=SimpleNamespace(num_train_timesteps=training))


@pytest.mark.parametrize(
    "timesteps",
    [
        None,
        7,
        "many",
        [833.0, 666.0],
        torch.tensor([]),
        torch.tensor(833.0),
        torch.tensor([[833.0], [666.0]]),
        torch.tensor([833.0, math.nan, 0.0]),
        torch.tensor([833.0, math.inf]),
    ],
    ids=repr,
)
def test_a_scheduler_of_ones_own_that_answers_nonsense_is_not_believed(timesteps: Any) -> None:
    network = small_unet()
    with attach(network, DeepCache(2, 1)):
        *_, expected = denoise_unet(network)
    with attach(SimpleNamespace(unet=network, scheduler=own(timesteps)), DeepCache(2, 1)) as report:
        *_, found = denoise_unet(network)
    assert torch.equal(found, expected)
    assert report.settings["placement"] == "uniform: the length of the run is not known"
    assert report.settings["correction"] is False


@pytest.mark.parametrize("timesteps", [[833.0, 0.0, 666.0], [833.0, 833.0], [833.0, 900.0, 1.0, 400.0]])
def test_timesteps_in_no_order_still_place_as_many_calls(timesteps: list[float]) -> None:
    network = small_unet()
    host = SimpleNamespace(unet=network, scheduler=own(torch.tensor(timesteps)))
    with attach(host, DeepCache(2, 1)) as report:
        for timestep in timesteps:
            network(torch.zeros(1, 4, 16, 16), timestep, torch.zeros(1, 7, 32))
    assert report.computed == math.ceil(len(timesteps) / 2)


@pytest.mark.parametrize("training", [None, 0, -5, "1000", 0.5])
def test_a_schedule_of_no_length_is_refused(training: Any) -> None:
    with pytest.raises(IncompatibleDenoiser, match="num_train_timesteps"):
        attach(SimpleNamespace(unet=small_unet(), scheduler=own(None, training)), DeepCache())


@pytest.mark.parametrize(("build", "denoise", "strategy"), CASES)
def test_weights_that_are_not_finite_give_no_picture(build: Any, denoise: Any, strategy: CacheStrategy) -> None:
    """Nothing is made up in place of what is no number: the last latents are none either."""
    network = build()
    next(iter(network.parameters())).fill_(math.nan)
    with attach(network, strategy):
        *_, latents = denoise(network)
    assert latents.isnan().any()


def test_a_unet_of_no_diffusers_class_is_refused_with_a_sentence() -> None:
    class Own(nn.Module):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.conv_in, self.mid_block = unet.conv_in, unet.mid_block
            self.down_blocks, self.up_blocks = unet.down_blocks, unet.up_blocks

    for size in (None, (16, 16)):
        view = UNetDenoiser(Own(small_unet()), native_size=size)
        with pytest.raises(IncompatibleDenoiser, match="Own"), attach(view, DeepCache()):
            pass
