"""Pareto fronts over speed-up and PSNR, and what a method has at a speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from benchmarks.cache.measure import Result
from benchmarks.cache.settings import FEWER

Axis = Callable[[Result], float]


def in_time(result: Result) -> float:
    return result.speedup


def in_operations(result: Result) -> float:
    return result.operations_speedup


def unbeaten(results: Iterable[Result], axis: Axis) -> list[Result]:
    """Those that no other beats in both speed-up and mean PSNR, slowest first."""
    front: list[Result] = []
    for result in sorted(results, key=lambda one: (axis(one), one.mean_psnr), reverse=True):
        if not front or result.mean_psnr > front[-1].mean_psnr:
            front.append(result)
    return front[::-1]


def shortened(results: Sequence[Result], axis: Axis, speedup: float) -> Result | None:
    """What fewer steps buy at `speedup` (`matched`). Its `label` says the steps."""
    return matched(results, FEWER, axis, speedup)


def matched(results: Sequence[Result], method: str, axis: Axis, value: float) -> Result | None:
    """What `method` gives where the axis has `value` (`at_speed`), and beyond its highest run that one."""
    own = sorted((one for one in results if one.method == method), key=axis)
    return own[-1] if own and axis(own[-1]) < value else at_speed(own, axis, value)


def at_speed(points: Iterable[Result], axis: Axis, speedup: float) -> Result | None:
    """Between the nearest of `points` on either side of `speedup`, picture by picture on a line.

    A point itself where it is as fast; None beyond either end.
    """
    ordered = sorted(points, key=axis)
    near = next((one for one in reversed(ordered) if axis(one) <= speedup), None)
    far = next((one for one in ordered if axis(one) > speedup), None)
    if near is not None and axis(near) == speedup:
        return near
    if near is None or far is None:
        return None
    share = (speedup - axis(near)) / (axis(far) - axis(near))

    def between(one: Sequence[float], other: Sequence[float]) -> list[float]:
        return [a + share * (b - a) for a, b in zip(one, other, strict=True)]

    between_psnr, between_lpips = between(near.psnr_db, far.psnr_db), between(near.lpips, far.lpips)
    return replace(near, label=f"{near.label} to {far.label}", psnr_db=between_psnr, lpips=between_lpips)
