"""What a queue before one worker does to requests, written out: the oracle of loads and simulations."""

from __future__ import annotations

from collections.abc import Sequence


def lindley(arrivals: Sequence[float], services: Sequence[float]) -> list[float]:
    """Latencies before one worker: W' = max(0, W + S − A) (Lindley 1952)."""
    wait, found = 0.0, []
    for number, service in enumerate(services):
        if number:
            wait = max(0.0, wait + services[number - 1] - (arrivals[number] - arrivals[number - 1]))
        found.append(wait + service)
    return found
