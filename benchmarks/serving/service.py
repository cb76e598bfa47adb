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

ALONE, BUSY = 3, 5  # requests of each kind
BATCHES = 3  # of each size


@dataclass(slots=True)
class Occupied:
    """Seconds. `alone`: latencies in an idle server; `busy`: between two ends while the next request already waits.

    They differ by what does not occupy the worker: reading and writing HTTP, and work that the server does for one
    request while it denoises another. `batches`: the time of so many images denoised together, over that of one.
    """

    alone: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    batches: dict[int, float] = field(default_factory=lambda: {1: 1.0})


@dataclass(slots=True)
class ServiceTimes:
    """By kind."""

    kinds: dict[str, Occupied] = field(default_factory=dict)

    def busy(self, kind: str, images: int, source: random.Random) -> float:
        """Drawn from what was measured; sizes between two measured ones lie on the line between them."""
        return source.choice(self.kinds[kind].busy) * self.factor(kind, images)

    def factor(self, kind: str, images: int) -> float:
        """Raises ValueError past the largest batch that was measured."""
        batches = self.kinds[kind].batches
        if images in batches:
            return batches[images]
        below = max(size for size in batches if size < images)
        above = min((size for size in batches if size > images), default=0)
        if not above:
            raise ValueError(f"batches of {images} were not measured, only of {sorted(batches)}")
        return batches[below] + (batches[above] - batches[below]) * (images - below) / (above - below)

    def rest(self, kind: str) -> float:
        """What a request takes besides the time that it occupies the worker."""
        found = self.kinds[kind]
        return statistics.median(found.alone) - statistics.median(found.busy)

    def sample(self, kinds: Sequence[tuple[str, float]], count: int, source: random.Random) -> list[float]:
        """Times of a mix's single requests, for the closed forms."""
        names = source.choices([name for name, _ in kinds], [weight for _, weight in kinds], k=count)
        return [self.busy(name, 1, source) for name in names]

    def mean(self, kinds: Sequence[tuple[str, float]], images: int = 1) -> float:
        """Of one image of a mix, drawn in batches of so many."""
        total = sum(weight for _, weight in kinds)
        return sum(
            weight / total * statistics.fmean(self.kinds[name].busy) * self.factor(name, images) / images
            for name, weight in kinds
        )

    def add(self, other: ServiceTimes) -> None:
        for kind, occupied in other.kinds.items():
            self.kinds[kind].alone += occupied.alone
            self.kinds[kind].busy += occupied.busy

    def as_dict(self) -> dict[str, Any]:
        return {
            kind: {
                "alone": [round(value, 4) for value in one.alone],
                "busy": [round(value, 4) for value in one.busy],
                "batches": {str(size): round(factor, 4) for size, factor in one.batches.items()},
            }
            for kind, one in self.kinds.items()
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> ServiceTimes:
        def read(one: Mapping[str, Any]) -> Occupied:
            return Occupied(one["alone"], one["busy"], {int(size): value for size, value in one["batches"].items()})

        return cls({kind: read(one) for kind, one in kept.items()})


def weights(mix: Mix) -> list[tuple[str, float]]:
    return [(kind.name, kind.weight) for kind in mix]


async def measure(ask: Ask, mix: Mix, *, seed: int) -> ServiceTimes:
    """Of a server that nobody else asks. Raises RuntimeError on a refusal."""
    times = ServiceTimes()
    for kind in mix:
        alone = await _loop(ask, kind, 1, ALONE, seed)
        busy = spacing(await _loop(ask, kind, 2, BUSY + 1, seed))
        times.kinds[kind.name] = Occupied([one.latency for one in alone], busy)
    return times


async def measure_batches(ask: Ask, mix: Mix, times: ServiceTimes, sizes: Sequence[int], *, seed: int) -> None:
    """Requests for several images stand for batches across requests: either way they are denoised together."""
    for kind in mix:
        medians = {}
        for size in sizes:
            (several,) = with_fields([kind], num_images=size, batch_size=size)
            medians[size] = statistics.median(spacing(await _loop(ask, several, 2, BATCHES + 1, seed)))
        times.kinds[kind.name].batches = {size: medians[size] / medians[1] for size in sizes}


def spacing(samples: Sequence[Sample]) -> list[float]:
    """Seconds from each end to the next, of two clients' requests: the next one was there before the end."""
    ends = sorted(one.finished for one in samples)
    return [later - earlier for earlier, later in pairwise(ends)]


async def _loop(ask: Ask, kind: Kind, clients: int, count: int, seed: int) -> list[Sample]:
    samples = await closed_loop(ask, clients, drawn([kind], seed), count=count)
    if refused := [one.answer.status for one in samples if not one.ok]:
        raise RuntimeError(f"{kind.name}: answered {refused[0]} where a picture was asked for")
    return samples
