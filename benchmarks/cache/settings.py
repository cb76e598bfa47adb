"""What is measured: a name, and the cache that it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from app.http.schemas import PRESETS
from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from cache.flops import deepest_branch

UNCACHED = "uncached"
FEWER = "fewer steps"
OURS = "ours"
PLAIN_REUSE = f"{OURS}, plain reuse"
PUBLISHED = "DeepCache 0.1.1"
PRESET = "presets"
WISHED = "cache_speedup"

DEPTHS = (0, 1, 2, 3, 4)
FEWER_STEPS = (0.8, 0.6, 0.55, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)  # shares of the whole run's

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
    """The document's presets, or usual thresholds, after the uncached run."""
    if kind == "deepcache":
        named: dict[str, CacheStrategy] = {name: DeepCache(*values.values()) for name, values in PRESETS.items()}
    else:
        named = {f"threshold {value}": FirstBlockCache(threshold=value) for value in (0.03, 0.05, 0.1, 0.2, 0.3)}
    return [PLAIN, *(Setting(OURS, label, ours(strategy)) for label, strategy in named.items())]


def branches(costs: Sequence[float]) -> dict[int, int]:
    """The first of `DEPTHS` that chooses each branch: equal branches are equal settings."""
    found: dict[int, int] = {}
    for depth in DEPTHS:
        if (branch := deepest_branch(costs, depth)) is not None:
            found.setdefault(branch, depth)
    return found


def shares(steps: int, wanted: Iterable[float]) -> list[int]:
    """Those shares of `steps`, as whole numbers below it."""
    return [n for n in dict.fromkeys(max(1, round(steps * share)) for share in wanted) if n < steps]
