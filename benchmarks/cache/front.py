"""Pareto fronts over speed-up and PSNR, and where a peer's point lies against ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.cache.measure import Result
from benchmarks.cache.settings import FEWER

Axis = Callable[[Result], float]


def in_time(result: Result) -> float:
    return result.speedup


def in_operations(result: Result) -> float:
    return result.operations_speedup


AXES: dict[str, Axis] = {"time": in_time, "operations": in_operations}


def our_front(results: Iterable[Result], axis: Axis) -> list[Result]:
    """Those of ours that no other of ours beats in both speed-up and mean PSNR, slowest first.

    A shortened run in which the cache never acted is fewer steps, and none of ours.
    """
    front: list[Result] = []
    acting = (one for one in results if one.ours and one.acts and one.hit_rate > 0)
    for result in sorted(acting, key=lambda one: (axis(one), one.mean_psnr), reverse=True):
        if not front or result.mean_psnr > front[-1].mean_psnr:
            front.append(result)
    return front[::-1]


def above(results: Sequence[Result], axis: Axis) -> Iterator[tuple[Result, float | None]]:
    """Points of peers, fewer steps included, that our front does not cover, and by how many dB they lie above it.

    The front is a polyline. None beyond an end of it: a point beyond the fast end counts whatever its quality, one
    beyond the slow end only if it is nearer to the uncached pictures than all of ours.
    """
    front = our_front(results, axis)
    speeds, heights = [axis(one) for one in front], [one.mean_psnr for one in front]
    for peer in (one for one in results if one.acts and not one.ours):
        if front and speeds[0] <= axis(peer) <= speeds[-1]:
            if (by := peer.mean_psnr - float(np.interp(axis(peer), speeds, heights))) > 0:
                yield peer, by
        elif not any(axis(one) >= axis(peer) and one.mean_psnr >= peer.mean_psnr for one in front):
            yield peer, None


def at_least(results: Iterable[Result], measure: Axis, wanted: float) -> Result | None:
    """The result that reaches `wanted` by the least, or None."""
    return min((one for one in results if measure(one) >= wanted), key=measure, default=None)


def shortened(results: Sequence[Result], axis: Axis, speedup: float) -> Result | None:
    """What fewer steps buy at `speedup` (`matched`). Its `label` says the steps."""
    return matched(results, FEWER, axis, speedup)


def matched(results: Sequence[Result], method: str, axis: Axis, value: float) -> Result | None:
    """What `method` gives where the axis has `value`: between its nearest runs on either side, by picture on a line.

    The lower run itself where it lies there or no higher one is known; None without one. The label says between which.
    """
    own = sorted((one for one in results if one.method == method), key=axis)
    near = next((one for one in reversed(own) if axis(one) <= value), None)
    far = next((one for one in own if axis(one) > value), None)
    if near is None or far is None or axis(near) == value:
        return near
    share = (value - axis(near)) / (axis(far) - axis(near))
    between = [a + share * (b - a) for a, b in zip(near.psnr_db, far.psnr_db, strict=True)]
    return replace(near, label=f"{near.label} to {far.label}", psnr_db=between)
