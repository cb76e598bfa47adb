"""The grids: which settings of ours and of each peer are measured on which kind of denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

from app.http.schemas import PRESETS
from benchmarks.cache.peers import cache_dit, diffusers_hook, published_deepcache
from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache, TransformerDenoiser, UNetDenoiser
from cache.deepcache import DEEPEST
from cache.flops import deepest_branch

UNCACHED = "uncached"
FEWER = "fewer steps"
OURS = "ours"
OURS_FEWER = f"{OURS}, {FEWER}"
EVEN = f"{OURS}, evenly placed"
PLAIN_REUSE = f"{OURS}, plain reuse"
PUBLISHED = "DeepCache 0.1.1"
PRESET = "presets"
WISHED = "cache_speedup"

# What the full benchmark varies. Of steps: shares of the whole run's.
INTERVALS = (2, 3, 4, 5, 6, 7, 8)
DEPTHS = (0, 1, 2, 3, 4)
THRESHOLDS = (0.026, 0.027, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)
FEWER_STEPS = (0.8, 0.6, 0.55, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
CACHED_STEPS = (0.7, 0.5, 0.3)

Make = Callable[[Any, int], CacheStrategy]  # of the pipeline and the number of steps


@dataclass
class Point:
    """What a point of a plot is called, and what the comparisons look it up by.

    method: what its points are drawn and compared as. steps: of the run, None for those of the uncached one.
    """

    method: str
    label: str
    _: KW_ONLY
    steps: int | None = None
    interval: int | None = None
    branch: int | None = None

    @property
    def ours(self) -> bool:
        return self.method.startswith(OURS)

    @property
    def name(self) -> str:
        return f"{self.method} {self.label}".strip()


@dataclass
class Setting(Point):
    make: Make


def ours(strategy: CacheStrategy, **changes: Any) -> Make:
    changed = dataclasses.replace(strategy, **changes)  # type: ignore[type-var]
    return lambda host, steps: changed


PLAIN = Setting(UNCACHED, "", ours(NoCache()))


def presets(kind: str) -> list[Setting]:
    """What the quick benchmark measures: the document's presets, or usual thresholds."""
    if kind == "deepcache":
        named: dict[str, CacheStrategy] = {name: DeepCache(*values.values()) for name, values in PRESETS.items()}
    else:
        named = {f"threshold {value}": FirstBlockCache(threshold=value) for value in (0.03, 0.05, 0.1, 0.2, 0.3)}
    return [PLAIN, *(Setting(OURS, label, ours(strategy)) for label, strategy in named.items())]


def full(denoiser: UNetDenoiser | TransformerDenoiser, steps: int) -> list[Setting]:
    """The whole grid for the cache of a UNet or a transformer."""
    if isinstance(denoiser, UNetDenoiser):
        settings = _unet(denoiser.branch_costs, steps)
    else:
        settings = _transformer(sum(map(len, denoiser.blocks)), steps)
    return [PLAIN, *(Setting(FEWER, f"{n}", PLAIN.make, steps=n) for n in shares(steps, FEWER_STEPS)), *settings]


def branches(costs: Sequence[float]) -> dict[int, int]:
    """The first of `DEPTHS` that chooses each branch: equal branches are equal settings."""
    found: dict[int, int] = {}
    for depth in DEPTHS:
        if (branch := deepest_branch(costs, depth)) is not None:
            found.setdefault(branch, depth)
    return found


def _unet(costs: Sequence[float], steps: int) -> Iterator[Setting]:
    """Ours as it comes and in its variants; evenly is how the published helper places its calls."""
    chosen = branches(costs)
    for interval in INTERVALS:
        for branch, depth in chosen.items():
            here = partial(Setting, interval=interval, branch=branch)
            label, strategy = f"N{interval} d{depth} b{branch}", DeepCache(interval=interval, depth=depth)
            half = ours(strategy, guidance="reuse")
            yield here(OURS, label, ours(strategy))
            yield here(f"{OURS}, guidance reused", label, half)
            if depth == min(chosen.values()):
                yield here(
                    f"{OURS}, no layer in reused steps", f"N{interval} d{DEEPEST}", ours(strategy, depth=DEEPEST)
                )
            yield here(EVEN, label, ours(strategy, schedule="uniform"))
            yield here(PLAIN_REUSE, label, ours(strategy, schedule="uniform", forecast=False))
            for count in shares(steps, CACHED_STEPS):
                yield here(f"{OURS}, guidance reused, {FEWER}", f"{count} {label}", half, steps=count)
            published = partial(published_deepcache, interval=interval, branch=branch)
            yield here(PUBLISHED, f"N{interval} b{branch}", published)


def _transformer(blocks: int, steps: int) -> Iterator[Setting]:
    """Ours with and without forecast, with it also in shortened runs, beside the published ones."""
    import torch
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    for threshold in THRESHOLDS:
        label, strategy = f"{threshold}", FirstBlockCache(threshold=threshold)
        yield Setting(OURS, label, ours(strategy))
        yield Setting(PLAIN_REUSE, label, ours(strategy, forecast=False))
        for count in shares(steps, CACHED_STEPS):
            yield Setting(OURS_FEWER, f"{count} {label}", ours(strategy), steps=count)
        hook = partial(diffusers_hook, config=FirstBlockCacheConfig(threshold=threshold))
        yield Setting("diffusers FirstBlockCache", label, hook)
        for first_blocks, warmup in ((8, 8), (1, 4)):  # DBCache as it comes; with one first block and 4 warm-up calls
            pace = {"residual_diff_threshold": threshold, "max_warmup_steps": warmup, "Fn_compute_blocks": first_blocks}
            for calibrator in (None, "TaylorSeer") if first_blocks < blocks else ():  # else it would skip nothing
                method = f"cache-dit F{first_blocks}W{warmup}{' Taylor' if calibrator else ''}"
                yield Setting(method, label, partial(cache_dit, settings=pace, calibrator=calibrator))
    for interval in INTERVALS:
        for method, lite in (("diffusers TaylorSeer", False), ("diffusers TaylorSeer lite", True)):
            # Attention outputs, its default, or the whole output. Factors in float32, as our networks are: bfloat16,
            # the default, would be a handicap.
            given: Any = {"cache_interval": interval, "use_lite_mode": lite, "taylor_factors_dtype": torch.float32}
            hook = partial(diffusers_hook, config=TaylorSeerCacheConfig(**given))
            yield Setting(method, f"N{interval}", hook, interval=interval)


def shares(steps: int, wanted: Iterable[float]) -> list[int]:
    """Those shares of `steps`, as whole numbers below it."""
    return [n for n in dict.fromkeys(max(1, round(steps * share)) for share in wanted) if n < steps]
