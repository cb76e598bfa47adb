"""Waiting: the simulation beside a closed form and loops written here, and the fleet from it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from benchmarks.serving import page, plan
from benchmarks.serving.plan import Machine, Times, poisson_kinds, simulate
from tests.benchmarks.lindley import lindley


def fixed(*seconds: float, **batches: float) -> Times:
    """Kinds a, b, … that always take so long; x3: what a batch of three takes, over one."""
    factors = {"1": 1.0} | {size[1:]: factor for size, factor in batches.items()}
    named = zip("abcdef", seconds, strict=False)
    return {name: {"alone": [one], "busy": [one], "batches": factors} for name, one in named}


class Recorded(random.Random):
    """Keeps what was drawn of the service times."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drawn: list[float] = []

    def choice(self, options: Sequence[float]) -> float:
        self.drawn.append(options[int(self.random() * len(options))])
        return self.drawn[-1]


def test_the_simulation_of_one_worker_is_lindley_s_recursion() -> None:
    times = {"a": {"alone": [1.0], "busy": [0.2, 0.5, 0.9, 2.0], "batches": {"1": 1.0}}}
    source = Recorded(2)
    arrivals = poisson_kinds(0.8, 500, [("a", 1.0)], source)
    outcomes = simulate(Machine(queue_size=500), arrivals, times, source)
    expected = lindley([at for at, _ in arrivals], source.drawn)
    rest = 1.0 - 0.7  # median alone less median busy
    assert [one.latency for one in outcomes if one] == pytest.approx([one + rest for one in expected])


def test_the_simulation_of_several_workers_is_the_recursion_of_the_earliest_free() -> None:
    """Kiefer and Wolfowitz 1955: each goes to the worker that is free first."""
    arrivals = poisson_kinds(3.4, 500, [("a", 1.0)], random.Random(1))
    outcomes = simulate(Machine(workers=4, queue_size=500), arrivals, fixed(1.0), random.Random(0))
    free = [0.0] * 4
    for (at, _), one in zip(arrivals, outcomes, strict=True):
        begin = max(at, min(free))
        free[free.index(min(free))] = begin + 1.0
        assert one is not None
        assert one.wait == pytest.approx(begin - at)


def test_the_simulated_mean_wait_comes_to_the_closed_form() -> None:
    """Pollaczek and Khinchine, exact before one worker (Kleinrock, Queueing Systems I, 5.6): λ E[S²] / (2 (1 − ρ))."""
    source, rate, services = random.Random(5), 1.0, [0.2, 0.4, 1.5]
    times = {"a": {"alone": [0.4], "busy": services, "batches": {"1": 1.0}}}
    arrivals = poisson_kinds(rate, 40_000, [("a", 1.0)], source)
    waits = [one.wait for one in simulate(Machine(queue_size=10_000), arrivals, times, source) if one]
    squares, load = sum(one**2 for one in services) / 3, rate * sum(services) / 3
    assert sum(waits) / len(waits) == pytest.approx(rate * squares / (2 * (1 - load)), rel=0.05)


def test_a_full_queue_refuses() -> None:
    at_once = [(0.0, "a")] * 5
    outcomes = simulate(Machine(queue_size=3), at_once, fixed(1.0), random.Random(0))
    assert [one and one.latency for one in outcomes] == [1.0, 2.0, 3.0, 4.0, None]


def test_a_batch_is_the_oldest_one_s_kind_up_to_its_size() -> None:
    arrivals = [(0.0, "a"), (0.1, "b"), (0.2, "a"), (0.3, "b"), (0.4, "a"), (0.5, "b"), (0.6, "b")]
    # a alone 0–1; three b 1–5 (2.0 × 2.0); two a 5–6.5 (1.0 × 1.5); the last b 6.5–8.5
    for timeout, waited in ((0.0, 0.0), (0.8, 0.1)):  # for company of the kind that came just now: an eighth of it
        machine = Machine(max_batch=3, batch_timeout=timeout)
        found = simulate(machine, arrivals, fixed(1.0, 2.0, x2=1.5, x3=2.0), random.Random(0))
        outcomes = [one for one in found if one]
        assert [one.batch for one in outcomes] == [1, 3, 2, 3, 2, 3, 1]
        assert [one.latency + at for one, (at, _) in zip(outcomes, arrivals, strict=True)] == pytest.approx(
            [1.0, 5.0, 6.5, 5.0, 6.5, 5.0, 8.5 + waited]
        )


def test_a_batch_that_was_not_measured_is_not_guessed() -> None:
    with pytest.raises(KeyError, match="3"):
        simulate(Machine(max_batch=3), [(0.0, "a")] * 4, fixed(1.0, x2=1.5), random.Random(0))


def test_a_fleet_keeps_its_objective_and_one_step_more_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ARRIVALS", 4000)
    times, kinds, machine = fixed(0.5, 1.0), [("a", 3.0), ("b", 1.0)], Machine(workers=4)
    demand = plan.Demand(rate=100.0, objective=2.0, share=0.95, price=1.8)
    setting = plan.Setting("x", machine, kinds, times)
    one = plan.fleet(setting, demand)
    assert setting.within(one.per_machine, 2.0) >= 0.95
    assert setting.within(one.per_machine * 1.01, 2.0) < 0.95
    assert one.machines == math.ceil(100 / one.per_machine)
    assert one.workers == 4 * one.machines
    assert one.busy == pytest.approx(one.per_machine * 0.625 / 4, rel=0.03)  # of finitely many arrivals
    assert one.cost == pytest.approx(one.workers * 1.8 / (100 * 3600) * 1000)


def test_no_fleet_keeps_an_objective_below_the_service_time() -> None:
    demand = plan.Demand(rate=1.0, objective=0.4, share=0.95, price=1.0)
    one = plan.fleet(plan.Setting("x", Machine(), [("a", 1.0)], fixed(0.5)), demand)
    assert (one.per_machine, one.machines, one.cost) == (0.0, 0, 0.0)
    assert "misses the objective" in "\n".join(page.planning([], [one], demand)["fleet"])
