"""accelerate's offload hooks and compiled blocks: the caches act as without them, and leave them in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import nn

from cache import CacheStrategy, DeepCache, FirstBlockCache, attach
from tests.cache.networks import denoise_flux, denoise_unet, small_flux, small_unet

ON_UNET = [DeepCache(3, 0), DeepCache(2, 2, 200, 800, False), DeepCache(2, 12)]
ON_FLUX = [FirstBlockCache(1.0, 2), FirstBlockCache(1.0, 1, False)]
CASES = [(small_unet, denoise_unet, strategy) for strategy in ON_UNET]
CASES += [(small_flux, denoise_flux, strategy) for strategy in ON_FLUX]  # type: ignore[misc, list-item]


def name_of(value: object) -> str:
    """The same in every process: a function's own text holds its address."""
    return getattr(value, "__name__", str(value))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("build", "steps", "strategy"), CASES, ids=name_of)
def test_weights_that_are_fetched_layer_by_layer(
    build: Callable[[], nn.Module], steps: Callable[..., Iterator[torch.Tensor]], strategy: CacheStrategy
) -> None:
    """Sequential offload: between its calls a layer has no weights; it fetches its own and gives them back."""
    network = build()
    with attach(network, strategy) as plain:
        *_, expected = steps(network)
    cpu_offload(network, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    hooks = {path: id(module.__dict__.get("_hf_hook")) for path, module in network.named_modules()}
    with attach(network, strategy) as report:
        *_, result = steps(network)
    assert torch.equal(result, expected)
    assert report.decisions == plain.decisions
    assert report.reused > 0
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert {path: id(module.__dict__.get("_hf_hook")) for path, module in network.named_modules()} == hooks


@pytest.mark.parametrize(("build", "steps", "strategy"), [CASES[0], CASES[3]], ids=name_of)
def test_a_network_that_is_moved_as_a_whole(
    build: Callable[[], nn.Module], steps: Callable[..., Iterator[torch.Tensor]], strategy: CacheStrategy
) -> None:
    """Model offload: the hook on the root acts at every call, those that reuse included."""
    network = build()
    with attach(network, strategy):
        *_, expected = steps(network)
    network, hook = cpu_offload_with_hook(network, execution_device=torch.device("cpu"))
    hooked = network.forward
    with attach(network, strategy) as report:
        *_, result = steps(network)
    hook.offload()
    assert torch.equal(result, expected)
    assert report.reused > 0
    assert network.forward is hooked


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_transformer_blocks_are_cached_like_others() -> None:
    network = small_flux()
    strategy = FirstBlockCache(1.0, 1)
    with attach(network, strategy) as plain:
        *_, expected = denoise_flux(network)
    for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
        block.compile(backend="aot_eager")
    with attach(network, strategy) as report:
        *_, result = denoise_flux(network)
    assert torch.equal(result, expected)
    assert report.decisions == plain.decisions == "CRCRCR"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers_of_a_unet_are_cached_like_others() -> None:
    network = small_unet()
    strategy = DeepCache(2, 0)
    with attach(network, strategy) as plain:
        *_, expected = denoise_unet(network)
    for block in [*network.down_blocks, *network.up_blocks]:
        for layer in [*block.resnets, *getattr(block, "attentions", [])]:
            layer.compile(backend="eager")
    with attach(network, strategy) as report:
        *_, result = denoise_unet(network)
    assert torch.equal(result, expected)
    assert report.decisions == plain.decisions == "CRCRCR"


@pytest.mark.usefixtures("fresh_compiler")
def test_whole_blocks_of_a_unet_that_are_compiled_stay_right() -> None:
    """A cut inside a compiled block acts, or its calls compute and the report says so: never a wrong picture."""
    network = small_unet()
    with attach(network, DeepCache(2, 0)) as plain:
        *_, cached = denoise_unet(network)
    *_, uncached = denoise_unet(network)
    for block in [*network.down_blocks, *network.up_blocks]:
        block.compile(backend="eager")
    with attach(network, DeepCache(2, 0)) as report:
        *_, result = denoise_unet(network)
    if report.reused:
        assert report.decisions == plain.decisions
        assert torch.equal(result, cached)
    else:
        assert torch.equal(result, uncached)
        assert report.warnings
