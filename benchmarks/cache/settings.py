"""The grids: which settings of ours and of each peer are measured on which kind of denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import typer

from benchmarks.cache.peers import CacheDiT, DiffusersHook, PublishedDeepCache
from cache import CacheStrategy, DeepCache, Denoiser, FirstBlockCache, NoCache, TransformerDenoiser, UNetDenoiser
from cache.cost import deepest_branch
from cache.deepcache import DEEPEST
from cache.forecast import ORDERS, WITHOUT_WITNESS

UNCACHED = "uncached"
FEWER = "fewer steps"
OURS = "ours"
NO_LAYER = f"{OURS}, no layer in reused steps"

Make = Callable[[Any, int], CacheStrategy]  # of the pipeline and the number of steps


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of a plot.

    method: what its points are drawn and compared as. steps: of the run, None for those of the uncached one.
    interval, branch, threshold, forecast: what the comparisons look a setting up by, where it has one.
    default: the strategy as it comes, but for its interval and depth.
    alone: a cache that decides while it runs, and for its batch as a whole; its pictures are to be drawn one by one.
    """

    method: str
    label: str
    make: Make
    steps: int | None = None
    interval: int | None = None
    branch: int | None = None
    threshold: float | None = None
    forecast: str | None = None
    default: bool = False
    alone: bool = False

    @property
    def ours(self) -> bool:
        return self.method.startswith(OURS)

    @property
    def name(self) -> str:
        return f"{self.method} {self.label}".strip()


@dataclass(frozen=True, slots=True)
class Grid:
    """What the full benchmark varies.

    `fewer`: steps of the shortened uncached runs, as shares of the whole one's; `cached_fewer`: of shortened runs under
    our cache.
    """

    intervals: Sequence[int] = (2, 3, 4, 5, 6, 7, 8)
    depths: Sequence[int] = (0, 1, 2, 3, 4)
    thresholds: Sequence[float] = (0.026, 0.027, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)
    forecasts: Sequence[str] = tuple(ORDERS)
    fewer: Sequence[float] = (0.8, 0.65, 0.5, 0.4, 0.33, 0.25, 0.2)
    cached_fewer: Sequence[float] = (0.8, 0.6, 0.5, 0.4, 0.3)

    def narrowed(self, **chosen: str | None) -> Grid:
        """With lists that commas separate for some of it. Raises typer.BadParameter."""
        found = {}
        for name, text in chosen.items():
            if text is not None:
                known = getattr(self, name)
                try:
                    found[name] = tuple(type(known[0])(part) for part in text.split(","))
                except ValueError:
                    raise typer.BadParameter(f"{text!r} is no comma-separated list of numbers") from None
                if name == "forecasts" and not set(found[name]) <= set(known):
                    raise typer.BadParameter(f"{text}: there are {', '.join(known)}")
        return dataclasses.replace(self, **found)


def ours(strategy: CacheStrategy) -> Make:
    return lambda host, steps: strategy


def uncached() -> Setting:
    return Setting(UNCACHED, "", _PLAIN)


_PLAIN = ours(NoCache())


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
    return [uncached(), *(Setting(OURS, label, ours(strategy)) for label, strategy in named.items())]


def full(denoiser: Denoiser, steps: int, grid: Grid) -> list[Setting]:
    """The whole grid for the cache of a UNet or a transformer."""
    if isinstance(denoiser, UNetDenoiser):
        settings = _unet(denoiser.branch_costs, grid, steps)
    elif isinstance(denoiser, TransformerDenoiser):
        settings = _transformer(sum(map(len, denoiser.blocks)), grid, steps)
    else:
        raise TypeError(f"{type(denoiser).__name__} is neither a UNet's view nor a transformer's")
    shortened = [Setting(FEWER, f"{n}", ours(NoCache()), steps=n) for n in shares(steps, grid.fewer)]
    return [uncached(), *shortened, *settings]


def _unet(costs: Sequence[float], grid: Grid, steps: int) -> Iterator[Setting]:
    """Ours as it comes, with guidance reused, where reused steps run no layer, and evenly placed with each forecast.

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
            half = dataclasses.replace(strategy, guidance="reuse")
            yield here(f"{OURS}, guidance reused", label, ours(half))
            if depth == min(depths.values()):
                bare = dataclasses.replace(strategy, depth=DEEPEST)
                yield here(NO_LAYER, f"N{interval} d{DEEPEST}", ours(bare))
            for forecast in forecasts(DeepCache, grid):
                even = with_forecast(strategy, forecast)
                yield here(f"{OURS}, {forecast}, evenly placed", label, ours(even), forecast=forecast)
            for count in shares(steps, grid.cached_fewer):
                yield here(f"{OURS}, guidance reused, fewer steps", f"{count} {label}", ours(half), steps=count)
            published = partial(PublishedDeepCache, interval=interval, branch=branch)
            yield here("DeepCache 0.1.1", f"N{interval} b{branch}", published)


def _transformer(blocks: int, grid: Grid, steps: int) -> Iterator[Setting]:
    """Ours with each forecast, the default also in shortened runs, beside the published ones."""
    import torch
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    for threshold in grid.thresholds:
        for forecast in forecasts(FirstBlockCache, grid):
            strategy = with_forecast(FirstBlockCache(threshold=threshold), forecast)
            method, default = f"{OURS}, {forecast}", strategy == FirstBlockCache(threshold=threshold)
            here = partial(Setting, make=ours(strategy), threshold=threshold, forecast=forecast)
            yield here(method, f"{threshold}", default=default)
            for count in shares(steps, grid.cached_fewer) if default else ():
                yield here(f"{method}, fewer steps", f"{count} {threshold}", steps=count)
        hook = partial(DiffusersHook, config=FirstBlockCacheConfig(threshold=threshold))
        yield Setting("diffusers FirstBlockCache", f"{threshold}", hook, threshold=threshold, alone=True)
    for interval in grid.intervals:
        for method, lite in (("diffusers TaylorSeer", False), ("diffusers TaylorSeer lite", True)):
            # Attention outputs, its default, or the whole output. Factors in float32, as our networks are: bfloat16,
            # the default, would be a handicap.
            pace: Any = {"cache_interval": interval, "use_lite_mode": lite, "taylor_factors_dtype": torch.float32}
            hook = partial(DiffusersHook, config=TaylorSeerCacheConfig(**pace))
            yield Setting(method, f"N{interval}", hook, interval=interval)
    for threshold in grid.thresholds:
        for first, warmup in ((8, 8), (1, 4)):  # DBCache as it comes, and with one first block and 4 warm-up calls
            if first >= blocks:
                continue  # it would skip nothing
            settings = {"residual_diff_threshold": threshold, "Fn_compute_blocks": first, "max_warmup_steps": warmup}
            for taylor in (0, 1):
                method = f"cache-dit F{first}W{warmup}{' Taylor' if taylor else ''}"
                make = partial(CacheDiT, settings=settings, taylor=taylor)
                yield Setting(method, f"{threshold}", make, threshold=threshold, alone=True)


def shares(steps: int, wanted: Iterable[float]) -> list[int]:
    """Those shares of `steps`, as whole numbers below it."""
    return [n for n in dict.fromkeys(max(1, round(steps * share)) for share in wanted) if n < steps]


def forecasts(strategy: type[Any], grid: Grid) -> list[str]:
    """Those of the grid's forecasts that the strategy can make, its default first."""
    able = ORDERS if strategy is FirstBlockCache else WITHOUT_WITNESS
    return sorted((name for name in grid.forecasts if name in able), key=lambda name: name != strategy().forecast)


def with_forecast(strategy: Any, forecast: str) -> CacheStrategy:
    """`strategy` with that forecast and, where it can place its computed calls otherwise, with them evenly placed."""
    names = {field.name for field in dataclasses.fields(strategy)}
    wanted = {"forecast": forecast, "schedule": "uniform"}
    changed: CacheStrategy = dataclasses.replace(strategy, **{k: v for k, v in wanted.items() if k in names})
    return changed
