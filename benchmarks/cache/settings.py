"""The grids: which settings of ours and of each peer are measured on which kind of denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

from benchmarks.cache.peers import cache_dit, diffusers_hook, published_deepcache
from cache import CacheStrategy, DeepCache, Denoiser, FirstBlockCache, NoCache, TransformerDenoiser, UNetDenoiser
from cache.deepcache import DEEPEST
from cache.flops import deepest_branch

UNCACHED = "uncached"
FEWER = "fewer steps"
OURS = "ours"
NO_LAYER = f"{OURS}, no layer in reused steps"

Make = Callable[[Any, int], CacheStrategy]  # of the pipeline and the number of steps


@dataclass
class Point:
    """What a point of a plot is called, and what the comparisons look it up by.

    method: what its points are drawn and compared as. steps: of the run, None for those of the uncached one.
    default: the strategy as it comes, but for its interval and depth.
    """

    method: str
    label: str
    _: KW_ONLY
    steps: int | None = None
    interval: int | None = None
    branch: int | None = None
    threshold: float | None = None
    forecast: bool | None = None
    default: bool = False

    @property
    def ours(self) -> bool:
        return self.method.startswith(OURS)

    @property
    def name(self) -> str:
        return f"{self.method} {self.label}".strip()


@dataclass
class Setting(Point):
    """`alone`: a cache that decides while it runs, and for its batch as a whole: its pictures are drawn one by one."""

    make: Make
    _: KW_ONLY
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """What the full benchmark varies.

    `fewer`: steps of the shortened uncached runs, as shares of the whole one's; `cached_fewer`: of shortened runs under
    our cache.
    """

    intervals: Sequence[int] = (2, 3, 4, 5, 6, 7, 8)
    depths: Sequence[int] = (0, 1, 2, 3, 4)
    thresholds: Sequence[float] = (0.026, 0.027, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)
    fewer: Sequence[float] = (0.8, 0.6, 0.55, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
    cached_fewer: Sequence[float] = (0.7, 0.5, 0.3)


def ours(strategy: CacheStrategy) -> Make:
    return lambda host, steps: strategy


PLAIN = Setting(UNCACHED, "", ours(NoCache()))


def presets(kind: str) -> list[Setting]:
    """What the quick benchmark measures: the document's presets, or usual thresholds."""
    if kind == "deepcache":
        named: dict[str, CacheStrategy] = {
            "max_quality 2/1": DeepCache(interval=2, depth=1),
            "balanced 3/2": DeepCache(interval=3, depth=2),
            "max_speed 5/3": DeepCache(interval=5, depth=3),
            "partial 3/2/200/800": DeepCache(interval=3, depth=2, start=200, end=800),
        }
    else:
        named = {f"threshold {value}": FirstBlockCache(threshold=value) for value in (0.03, 0.05, 0.1, 0.2, 0.3)}
    return [PLAIN, *(Setting(OURS, label, ours(strategy)) for label, strategy in named.items())]


def full(denoiser: Denoiser, steps: int, grid: Grid) -> list[Setting]:
    """The whole grid for the cache of a UNet or a transformer."""
    if isinstance(denoiser, UNetDenoiser):
        settings = _unet(denoiser.branch_costs, grid, steps)
    elif isinstance(denoiser, TransformerDenoiser):
        settings = _transformer(sum(map(len, denoiser.blocks)), grid, steps)
    else:
        raise TypeError(f"{type(denoiser).__name__} is neither a UNet's view nor a transformer's")
    return [PLAIN, *(Setting(FEWER, f"{n}", PLAIN.make, steps=n) for n in shares(steps, grid.fewer)), *settings]


def _unet(costs: Sequence[float], grid: Grid, steps: int) -> Iterator[Setting]:
    """Ours as it comes, with guidance reused, where reused steps run no layer, and evenly placed.

    Evenly is how the published helper places its calls.
    """
    depths: dict[int, int] = {}  # branch → the first depth that chooses it: equal branches are equal settings
    for depth in grid.depths:
        branch = deepest_branch(costs, depth)
        if branch is not None:
            depths.setdefault(branch, depth)
    for interval in grid.intervals:
        for branch, depth in depths.items():
            here = partial(Setting, interval=interval, branch=branch)
            label, strategy = f"N{interval} d{depth} b{branch}", DeepCache(interval=interval, depth=depth)
            yield here(OURS, label, ours(strategy), forecast=strategy.forecast, default=True)
            half = ours(dataclasses.replace(strategy, guidance="reuse"))
            yield here(f"{OURS}, guidance reused", label, half)
            if depth == min(depths.values()):
                bare = dataclasses.replace(strategy, depth=DEEPEST)
                yield here(NO_LAYER, f"N{interval} d{DEEPEST}", ours(bare))
            for forecast in (True, False):
                even = dataclasses.replace(strategy, forecast=forecast, schedule="uniform")
                yield here(f"{named(forecast)}, evenly placed", label, ours(even), forecast=forecast)
            for count in shares(steps, grid.cached_fewer):
                yield here(f"{OURS}, guidance reused, fewer steps", f"{count} {label}", half, steps=count)
            published = partial(published_deepcache, interval=interval, branch=branch)
            yield here("DeepCache 0.1.1", f"N{interval} b{branch}", published)


def _transformer(blocks: int, grid: Grid, steps: int) -> Iterator[Setting]:
    """Ours with its forecast, also in shortened runs, and without, beside the published ones."""
    import torch
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    for threshold in grid.thresholds:
        here = partial(Setting, label=f"{threshold}", threshold=threshold)
        for forecast in (True, False):
            make = ours(FirstBlockCache(threshold=threshold, forecast=forecast))
            yield here(named(forecast), make=make, forecast=forecast, default=forecast)
            for count in shares(steps, grid.cached_fewer) if forecast else ():
                short = {"label": f"{count} {threshold}", "steps": count}
                yield here(f"{OURS}, fewer steps", make=make, forecast=forecast, **short)
        hook = partial(diffusers_hook, config=FirstBlockCacheConfig(threshold=threshold))
        yield here("diffusers FirstBlockCache", make=hook, alone=True)
        for first_blocks, warmup in ((8, 8), (1, 4)):  # DBCache as it comes; with one first block and 4 warm-up calls
            pace = {"residual_diff_threshold": threshold, "max_warmup_steps": warmup, "Fn_compute_blocks": first_blocks}
            for taylor in (0, 1) if first_blocks < blocks else ():  # else it would skip nothing
                method = f"cache-dit F{first_blocks}W{warmup}{' Taylor' if taylor else ''}"
                yield here(method, make=partial(cache_dit, settings=pace, taylor=taylor), alone=True)
    for interval in grid.intervals:
        for method, lite in (("diffusers TaylorSeer", False), ("diffusers TaylorSeer lite", True)):
            # Attention outputs, its default, or the whole output. Factors in float32, as our networks are: bfloat16,
            # the default, would be a handicap.
            given: Any = {"cache_interval": interval, "use_lite_mode": lite, "taylor_factors_dtype": torch.float32}
            hook = partial(diffusers_hook, config=TaylorSeerCacheConfig(**given))
            yield Setting(method, f"N{interval}", hook, interval=interval)


def shares(steps: int, wanted: Iterable[float]) -> list[int]:
    """Those shares of `steps`, as whole numbers below it."""
    return [n for n in dict.fromkeys(max(1, round(steps * share)) for share in wanted) if n < steps]


def named(forecast: bool) -> str:
    """The method of ours with or without one."""
    return OURS if forecast else f"{OURS}, no forecast"
