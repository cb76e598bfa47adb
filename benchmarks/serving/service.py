"""How long a worker is occupied by each kind of request: measured over HTTP, kept as the measured values themselves."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.serving.load import Ask, Sample, closed_loop
from benchmarks.serving.mix import Kind, Mix, drawn, with_fields

ROUNDS = 2
ALONE, BUSY = 4, 6  # requests a round and kind


@dataclass(slots=True)
class Occupied:
    """Seconds. `alone`: latencies in an idle server; `busy`: between two ends while the next request already waits.

    They differ by what does not occupy the worker: reading and writing HTTP, and work that the server does for one
    request while it denoises another.
    """

    alone: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


@dataclass(slots=True)
class ServiceTimes:
    """By kind. `batches`: the time of so many images denoised together, over that of one."""

    kinds: dict[str, Occupied] = field(default_factory=dict)
    batches: dict[int, float] = field(default_factory=lambda: {1: 1.0})

    def busy(self, kind: str, images: int, source: random.Random) -> float:
        """Drawn from what was measured; sizes between two measured ones lie on the line between them."""
        return source.choice(self.kinds[kind].busy) * self.factor(images)

    def factor(self, images: int) -> float:
        """Raises ValueError past the largest batch that was measured."""
        if images in self.batches:
            return self.batches[images]
        below = max(size for size in self.batches if size < images)
        above = min((size for size in self.batches if size > images), default=0)
        if not above:
            raise ValueError(f"batches of {images} were not measured, only of {sorted(self.batches)}")
        low, high = self.batches[below], self.batches[above]
        return low + (high - low) * (images - below) / (above - below)

    def rest(self, kind: str) -> float:
        """What a request takes besides the time that it occupies the worker."""
        found = self.kinds[kind]
        return statistics.median(found.alone) - statistics.median(found.busy)

    def sample(self, kinds: Sequence[tuple[str, float]], count: int, source: random.Random) -> list[float]:
        """Times of a mix's single requests, for the closed forms."""
        names = source.choices([name for name, _ in kinds], [weight for _, weight in kinds], k=count)
        return [self.busy(name, 1, source) for name in names]

    def mean(self, kinds: Sequence[tuple[str, float]]) -> float:
        total = sum(weight for _, weight in kinds)
        return sum(weight * statistics.fmean(self.kinds[name].busy) for name, weight in kinds) / total

    def add(self, other: ServiceTimes) -> None:
        for kind, occupied in other.kinds.items():
            mine = self.kinds.setdefault(kind, Occupied())
            mine.alone += occupied.alone
            mine.busy += occupied.busy

    def as_dict(self) -> dict[str, Any]:
        kinds = {
            kind: {"alone": _rounded(occupied.alone), "busy": _rounded(occupied.busy)}
            for kind, occupied in self.kinds.items()
        }
        return {"kinds": kinds, "batches": {str(size): round(factor, 4) for size, factor in self.batches.items()}}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> ServiceTimes:
        kinds = {kind: Occupied(**occupied) for kind, occupied in kept["kinds"].items()}
        return cls(kinds, {int(size): factor for size, factor in kept["batches"].items()})


def weights(mix: Mix) -> list[tuple[str, float]]:
    return [(kind.name, kind.weight) for kind in mix]


async def measure(ask: Ask, mix: Mix, *, seed: int) -> ServiceTimes:
    """In rounds over all kinds: a machine that slows down does so for each. Raises RuntimeError on a refusal."""
    times = ServiceTimes()
    for turn in range(ROUNDS):
        for kind in mix:
            occupied = times.kinds.setdefault(kind.name, Occupied())
            occupied.alone += [one.latency for one in (await _loop(ask, kind, 1, ALONE, seed + turn))]
            occupied.busy += spacing(await _loop(ask, kind, 2, BUSY + 1, seed + turn))
    return times


async def measure_batches(ask: Ask, kind: Kind, sizes: Sequence[int], *, seed: int) -> dict[int, float]:
    """Requests for several images stand for batches across requests: either way they are denoised together."""
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(ROUNDS):
        for size in sizes:
            (several,) = with_fields([kind], num_images=size, batch_size=size)
            found[size] += spacing(await _loop(ask, several, 2, 5, seed + turn))
    medians = {size: statistics.median(values) for size, values in found.items()}
    return {size: medians[size] / medians[1] for size in sizes}


def spacing(samples: Sequence[Sample]) -> list[float]:
    """Seconds from each end to the next, of two clients' requests: the next one was there before the end."""
    ends = sorted(one.finished for one in samples)
    return [later - earlier for earlier, later in pairwise(ends)]


async def _loop(ask: Ask, kind: Kind, clients: int, count: int, seed: int) -> list[Sample]:
    samples = await closed_loop(ask, clients, drawn([kind], seed), count=count)
    if refused := [one.answer.status for one in samples if not one.ok]:
        raise RuntimeError(f"{kind.name}: answered {refused[0]} where a picture was asked for")
    return samples


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
