"""What a cache costs beside the layers that it runs, on a UNet.

A reuse step: ours beside the published helper's, in one process. The bare step is the network's own forward over its
shortened lists of layers, shortened before the clock starts and left so: no interception, no decision, no forecast. All
take turns call by call on the same inputs; every second call computes, untimed, so that forecasts have values to go by.
And the forecast: whole runs beside plain reuse.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cache.measure import Bench, now
from benchmarks.cache.peers import published_deepcache, twin
from benchmarks.cache.settings import OURS, PLAIN_REUSE, PUBLISHED, Setting, branches, ours
from benchmarks.report import Claim
from cache import DeepCache, UNetDenoiser
from cache.patching import shadowed
from cache.views.base import Response

WARM_UP = 2  # pairs of a computed and a reused call; a forecast begins with the second
REPEATS = 40  # of a reuse step
RUNS = 20  # of a forecast and of plain reuse
LONGER = 0.02  # than plain reuse: what a run may be by its forecast
OURS_AT_MOST = 0.05  # of a reuse step's bare layers


def claims(bench: Bench) -> Iterator[Claim]:
    """What is demanded of a UNet's cache: of each branch's reuse step, and of the forecast."""
    scale, params = bench.model.pipeline.vae_scale_factor, bench.params
    size = params.height // scale, params.width // scale
    for branch, depth in branches(bench.model.denoiser.branch_costs).items():
        yield of_step(overhead(bench.model.pipeline, branch, depth, REPEATS, size))
    even = DeepCache(schedule="uniform")
    forecast = Setting(OURS, f"N{even.interval} d{even.depth}, evenly placed", ours(even))
    plain = Setting(PLAIN_REUSE, "", ours(even, forecast=False))
    excess = statistics.median(own / base - 1 for own, base in bench.paired(forecast, plain, RUNS)[0])
    sentence = f"{forecast.name}: time over plain reuse, at most {LONGER:.0%}"
    yield Claim(sentence, f"{excess:+.1%}, median of {RUNS} pairs", excess <= LONGER)


def of_step(row: Mapping[str, Any]) -> Claim:
    """Of what `overhead` gave."""
    own, published = row["excess"][OURS], row["excess"][PUBLISHED]
    sentence = f"branch {row['branch']}: a reuse step above its bare layers, at most {OURS_AT_MOST:.0%} and below the "
    measured = f"{own:+.1%} of {row['milliseconds']:.2f} ms against {published:+.1%}"
    return Claim(f"{sentence}published helper's", measured, own <= OURS_AT_MOST and own < published)


def overhead(pipeline: Any, branch: int, depth: int, repeats: int, size: tuple[int, int]) -> dict[str, Any]:
    """Median milliseconds of the bare step, and the median over the repeats of each one's excess over it.

    size: height and width of the latents, of which two are denoised together, as guidance does.
    """
    unet, scheduler = pipeline.unet, type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(2 * (repeats + WARM_UP))
    even = Response([1.0] * len(scheduler.timesteps))
    bare, own = UNetDenoiser(twin(unet)), UNetDenoiser(twin(unet)).sampled(lambda: even)
    host = SimpleNamespace(unet=unet, scheduler=scheduler)
    generator, like = torch.Generator().manual_seed(0), next(unet.parameters())
    latents = torch.randn(2, unet.config.in_channels, *size, generator=generator).to(like)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator).to(like)
    kept: list[Tensor] = []

    def call(network: Any, index: int) -> Any:
        return network(latents, scheduler.timesteps[index], encoder_hidden_states=text, return_dict=False)

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), ExitStack() as stack:
        hook = bare.source(branch).register_forward_hook(keep)  # the state that a full call leaves
        call(bare.root, 0)
        hook.remove()
        layers = bare.branch_pass(branch)  # entered for good, which its own `run` does anew for each call
        layers._middle.state = kept[0]
        stack.enter_context(shadowed(layers._shadows))
        stack.enter_context(DeepCache(interval=2, depth=depth, schedule="uniform").attach(own))
        peer = published_deepcache(host, repeats, interval=2, branch=branch)
        stack.enter_context(peer.attach(UNetDenoiser(unet)))
        order = [("bare", bare.root), (OURS, own.root), (PUBLISHED, host.unet)]
        seconds: dict[str, list[float]] = {name: [] for name, _ in order}
        for index in range(2 * (repeats + WARM_UP)):
            reused = index % 2 == 1
            for name, network in order:
                if name == "bare" and not reused:
                    continue
                started = now()
                call(network, index)
                if reused and index >= 2 * WARM_UP:
                    seconds[name].append(now() - started)
            order = order[1:] + order[:1]
    base = seconds.pop("bare")
    excess = {name: statistics.median(a / b - 1 for a, b in zip(of, base, strict=True)) for name, of in seconds.items()}
    return {"branch": branch, "milliseconds": statistics.median(base) * 1e3, "excess": excess}
