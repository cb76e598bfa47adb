"""Closed forms for waiting, with Poisson arrivals. Seconds, and requests a second.

They know no batches and no bounded queue; `simulation` does, and is held against them where both apply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pollaczek_khinchine(rate: float, service: Sequence[float]) -> float:
    """Mean wait before one worker, exact (M/G/1; Kleinrock, Queueing Systems I, 5.6): λ E[S²] / (2 (1 − ρ)).

    `service`: equally likely service times. Infinite at a load of 1 and above.
    """
    times = np.asarray(service)
    load = rate * times.mean()
    return float(rate * (times**2).mean() / (2 * (1 - load))) if load < 1 else math.inf


def erlang_c(workers: int, load: float) -> float:
    """Probability that an arrival has to wait (M/M/k); `load` is λ E[S], the workers that are busy on average."""
    if load >= workers:
        return 1.0
    blocked = 1.0  # Erlang B by its recursion: factorials of large fleets overflow
    for worker in range(1, workers + 1):
        blocked = load * blocked / (worker + load * blocked)
    return blocked / (1 - load / workers * (1 - blocked))


def allen_cunneen(rate: float, service: Sequence[float], workers: int) -> float:
    """Mean wait before `workers` with one queue (M/G/k), approximately: that of M/M/k times (1 + c²) / 2.

    Allen, Probability, Statistics and Queueing Theory, 2nd ed., 5.3. Exact for one worker.
    """
    times = np.asarray(service)
    mean = float(times.mean())
    load = rate * mean
    if load >= workers:
        return math.inf
    variation = float(times.var()) / mean**2
    return erlang_c(workers, load) * mean / (workers - load) * (1 + variation) / 2
