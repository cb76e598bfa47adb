"""What a reuse step costs above the layers that it runs: ours beside the published helper's, in one process.

The bare step is the network's own forward over its shortened lists of layers, shortened before the clock starts and
left so: no interception, no decision, no forecast. All take turns call by call on the same inputs; every second call
computes, untimed, so that forecasts have values to go by. A transformer's caches decide for themselves: the latents of
a computed call are new ones, those of the reused call after it are the same but for a little.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks.cache.measure import now
from benchmarks.cache.peers import diffusers_hook, published_deepcache, twin
from benchmarks.cache.settings import named
from cache import CacheStrategy, DeepCache, FirstBlockCache, TransformerDenoiser, UNetDenoiser
from cache.flops import deepest_branch
from cache.patching import shadowed

WARM_UP = 2  # pairs of a computed and a reused call; a forecast begins with the second

FLUX_BLOCK = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,  # it is there to be skipped
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
"""What a first-block cache runs of Flux in a reused call, at 256 × 256 small enough for a CPU."""

Call = Callable[[Any, int], Any]  # of a network, with the index of a step


def flux_block(config: Mapping[str, Any], device: Any, side: int = 16, tokens: int = 128) -> tuple[Any, dict[str, Any]]:
    """A transformer of that config, random weights, and what it is called with: latents of side², a text, by name."""
    torch.manual_seed(0)
    with torch.device(device):
        places = torch.arange(float(side))
        network: Any = FluxTransformer2DModel(**config).eval().requires_grad_(False)
        return network, {
            "hidden_states": torch.randn(1, side**2, config["in_channels"]),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": torch.randn(1, tokens, config["joint_attention_dim"]),
            "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
            "img_ids": torch.cartesian_prod(torch.zeros(1), places, places),
            "txt_ids": torch.zeros(tokens, 3),
            "guidance": torch.full((1,), 3.5),
            "return_dict": False,
        }


def overheads(unet: nn.Module, scheduler: Any, depth: int, repeats: int, size: tuple[int, int]) -> dict[str, Any]:
    """Median milliseconds of a reuse step, and the median over the repeats of each one's excess over the bare one.

    size: height and width of the latents, of which two are denoised together, as guidance does.
    """
    scheduler.set_timesteps(2 * (repeats + WARM_UP))
    view = UNetDenoiser(twin(unet))
    branch = deepest_branch(view.branch_costs, depth)
    if branch is None:
        raise ValueError(f"At depth {depth} no layer runs, so that there is no step to compare with.")
    generator, like = torch.Generator().manual_seed(0), next(unet.parameters())
    latents = torch.randn(2, unet.config.in_channels, *size, generator=generator).to(like)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator).to(like)
    kept: list[Tensor] = []

    def call(network: Any, index: int) -> Any:
        return network(latents, scheduler.timesteps[index], encoder_hidden_states=text, return_dict=False)

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), ExitStack() as stack:
        hook = view.source(branch).register_forward_hook(keep)  # the state that a full call leaves
        call(view.root, 0)
        hook.remove()
        layers = view.branch_pass(branch)  # entered for good, which its own `run` does anew for each call
        layers._middle.state = kept[0]
        stack.enter_context(shadowed(layers._shadows))
        steps = {"bare": _reused(view, call)}
        for forecast in (True, False):
            strategy = DeepCache(interval=2, depth=depth, forecast=forecast, schedule="uniform")
            steps[named(forecast)], _ = _ours(UNetDenoiser(twin(unet)), strategy, call, repeats, stack)
        host = SimpleNamespace(unet=unet, scheduler=scheduler)
        peer = published_deepcache(host, repeats, interval=2, branch=branch)
        stack.enter_context(peer.attach(UNetDenoiser(unet)))
        steps["DeepCache 0.1.1"] = lambda index: call(host.unet, index)
        return _timed(f"branch {branch}", steps, repeats)


def first_block_overheads(
    transformer: nn.Module, arguments: Mapping[str, Any], repeats: int, layers: str
) -> dict[str, Any]:
    """The same for the first-block cache beside diffusers' hook; `arguments` are of one call of `transformer`."""
    view = TransformerDenoiser(twin(transformer))
    generator, like = torch.Generator().manual_seed(0), arguments["hidden_states"]
    starts = torch.randn(repeats + WARM_UP, *like.shape, generator=generator).to(like)

    def call(network: Any, index: int) -> Any:
        return network(**{**arguments, "hidden_states": starts[index // 2] * (1 + 1e-4 * (index % 2))})

    with torch.no_grad(), ExitStack() as stack:
        lists = enumerate(zip(view.block_lists, view.blocks, strict=True))
        shadows = [(view.root, name, blocks[:1] if index == 0 else []) for index, (name, blocks) in lists]
        stack.enter_context(shadowed(shadows))
        steps, reports = {"bare": _reused(view, call)}, []
        for forecast in (True, False):
            strategy, own = FirstBlockCache(forecast=forecast), TransformerDenoiser(twin(transformer))
            steps[named(forecast)], report = _ours(own, strategy, call, repeats, stack)
            reports.append(report)
        host = SimpleNamespace(transformer=transformer)
        peer = diffusers_hook(host, repeats, config=FirstBlockCacheConfig(threshold=FirstBlockCache().threshold))
        stack.enter_context(peer.attach(TransformerDenoiser(transformer)))

        def hooked(index: int) -> Any:
            with host.transformer.cache_context("cond"):
                return call(host.transformer, index)

        row = _timed(layers, {**steps, "diffusers FirstBlockCache": hooked}, repeats)
    if any(report.decisions != "CR" * (repeats + WARM_UP) for report in reports):
        raise RuntimeError("the calls did not compute and reuse in turn, so that what was timed is no reuse step")
    return row


def _reused(view: Any, call: Call) -> Callable[[int], Any]:
    return lambda index: call(view.root, index) if index % 2 else None


def _ours(view: Any, strategy: CacheStrategy, call: Call, repeats: int, stack: ExitStack) -> tuple[Any, Any]:
    sampled = view.sampled(lambda: [1.0] * 2 * (repeats + WARM_UP))
    report = stack.enter_context(strategy.attach(sampled))
    return lambda index: call(sampled.root, index), report


def _timed(layers: str, steps: Mapping[str, Callable[[int], Any]], repeats: int) -> dict[str, Any]:
    """Of each one's reused calls, which are those of odd index."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for index in range(2 * (repeats + WARM_UP)):
        for name in order:
            started = now()
            steps[name](index)
            if index % 2 and index >= 2 * WARM_UP:
                seconds[name].append(now() - started)
        if index % 2:
            order = order[1:] + order[:1]
    bare = seconds["bare"]
    over = {name: [a / b - 1 for a, b in zip(own, bare, strict=True)] for name, own in seconds.items()}
    return {
        "layers": layers,
        "milliseconds": {name: round(statistics.median(values) * 1e3, 3) for name, values in seconds.items()},
        "excess": {name: round(statistics.median(values), 4) for name, values in over.items() if name != "bare"},
    }
