"""What docs/serving.md and docs/planning.md show of the figures: tables, claims and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Claim, percentile, save, table
from benchmarks.serving.plan import NAMES, Demand, Fleet, Setting, mean, named, rest

FLAT = 0.05  # growth of resident memory that counts as none
NEAR = 0.2  # of a prediction
KEPT = 0.9  # of the capacity, under overload
Entry = Mapping[str, Any]

COLUMNS = (
    "load | setting | requests | offered /s | images /s | p50 s | p95 s | p99 s | wait p50 / p95 s | in time "
    "| goodput /s | hit rate | 429 / 503 | server / worker MB (growth) | late"
)


def cells(entry: Entry) -> str:
    found, held = entry["figures"], entry["held"]
    latency, wait, statuses = found["latency"], found["wait"], found["statuses"]

    def memory(part: str) -> str:
        change, size = held[f"{part}_growth"], held[f"{part}_mb"]
        return "–" if size is None else f"{size:.0f}" + ("" if change is None else f" ({change:+.1%})")

    took = "{p50:.3f} | {p95:.3f} | {p99:.3f}".format(**latency) if latency else "– | – | –"
    waited = "{p50:.3f} / {p95:.3f}".format(**wait) if wait else "–"
    hits = "–" if found["hit_rate"] is None else f"{found['hit_rate']:.2f}"
    return (
        f"{entry['name']} | {named(entry['rules'])} | {found['requests']} | {found['offered']:.2f} "
        f"| {found['finished']:.2f} | {took} | {waited} | {found['within']:.0%} in {found['objective']:g} s "
        f"| {found['goodput']:.2f} | {hits} | {statuses.get('429', 0)} / {statuses.get('503', 0)} "
        f"| {memory('server')} / {memory('workers')} | {1000 * found['late']:.0f} ms"
    )


def of_open(entries: Sequence[Entry]) -> list[Claim]:
    """Whether the plan's simulation, given the arrivals that came, says what was measured."""
    claims = []
    for entry in entries:
        for name in NAMES:
            real, said = entry["figures"]["latency"][name], entry["replayed"][name]
            figures = f"{said:.3f} s for {real:.3f} s, {said / real - 1:+.0%}"
            sentence = f"{named(entry['rules'])}: {name} latency replayed within {NEAR:.0%}"
            claims.append(Claim(sentence, figures, abs(said / real - 1) <= NEAR))
        drift = f"{entry['drift']:+.1%}"
        claims.append(Claim(f"{named(entry['rules'])}: service times after the load over before", drift))
    return claims


def of_overload(entries: Sequence[Entry]) -> list[Claim]:
    """Whether the servers, asked for too much, do what they can and refuse the rest at once."""
    return [claim for entry in entries for claim in _overloaded(entry)]


def _overloaded(entry: Entry) -> list[Claim]:
    found, held, rules = entry["figures"], entry["held"], entry["rules"]
    waited, queue, silent = held["waiting_most"], rules["queue"], found["without_retry_after"]
    rounds = math.ceil(queue / rules["max_batch"]) + 1  # services until who took the last place has its answer
    p99, bound = found["latency"]["p99"], rounds * held["service_longest"]
    finished, capacity, where = found["finished"], entry["capacity"], f"batches of {rules['max_batch']}"
    counts = ", ".join(f"{count} × {status}" for status, count in found["statuses"].items())
    far, rate = f"{p99:.2f} s of {bound:.2f} s", f"{finished:.2f} of {capacity:.2f}"
    told: list[tuple[str, str, bool]] = [
        ("every request is answered, 200 or 429", counts, found["statuses"].keys() <= {"200", "429"}),
        ("every 429 says when to come back", f"{silent} without `Retry-After`", silent == 0),
        (f"never more than {queue} wait", f"{waited} at most", waited is not None and waited <= queue),
        (f"p99 of accepted requests at most {rounds} times the longest service", far, p99 <= bound),
        (f"images a second, at least {KEPT:.0%} of the capacity", rate, finished >= KEPT * capacity),
    ]
    for part in ("server", "workers"):
        change, size = held[f"{part}_growth"], held[f"{part}_mb"]
        seen = "not seen" if change is None else f"{change:+.1%}, {size:.0f} MB at the end"
        told.append((f"memory of the {part} grows by at most {FLAT:.0%}", seen, change is not None and change <= FLAT))
    return [Claim(f"{where}: {sentence}", measured, holds) for sentence, measured, holds in told]


def planning(entries: Sequence[Entry], fleets: Sequence[Fleet], demand: Demand) -> dict[str, list[str]]:
    """The tables of docs/planning.md, by the name that marks their place."""
    times = (
        "setting | kind | share | occupied, p50 s | p95 s | deviation / mean | besides, s | batches of 2 / 3 / 4 take"
    )
    fleet = "setting | a machine takes, /s | its workers are busy | machines | workers | a thousand images cost | saved"
    said = (
        f"{demand.rate:g} requests a second, {demand.share:.0%} of them within {demand.objective:g} s, a worker's hour "
        f"at {demand.price:g}:"
    )
    first = next((one.cost for one in fleets if one.machines), 0.0)
    kinds = [_times(entry, *kind) for entry in entries for kind in entry["mix"]]
    return {"times": table(times, kinds), "fleet": [said, "", *table(fleet, (_fleet(one, first) for one in fleets))]}


def _times(entry: Entry, kind: str, share: float) -> str:
    one = entry["times"][kind]
    busy = one["busy"]
    batches = " / ".join(f"{factor:.2f}" for size, factor in sorted(one["batches"].items()) if size != "1")
    return (
        f"{named(entry['rules'])} | {kind} | {share:.0%} | {percentile(busy, 0.5):.3f} | {percentile(busy, 0.95):.3f} "
        f"| {statistics.pstdev(busy) / statistics.fmean(busy):.2f} | {rest(one):+.3f} "
        f"| {batches and batches + ' times as long'}"
    )


def _fleet(one: Fleet, first: float) -> str:
    if not one.machines:
        return f"{one.name} | none: an idle machine misses the objective | | | | | "
    return (
        f"{one.name} | {one.per_machine:.2f} | {one.busy:.0%} | {one.machines} | {one.workers} "
        f"| {one.cost:.2f} | {1 - one.cost / first:.0%}"
    )


def draw_plan(settings: Sequence[Setting], demand: Demand, file: Path) -> None:
    """The plan's latency over the rate of a machine, up to where its queue overflows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    for one in settings:
        most = one.machine.workers / mean(one.times, one.kinds, one.machine.max_batch)
        rates = [most * part / 20 for part in range(1, 20)]
        latencies = [[outcome.latency for outcome in one.simulated(rate)[0]] for rate in rates]
        axes.plot(rates, [percentile(found, demand.share) for found in latencies], label=one.name)
    axes.axhline(demand.objective, color="black", linewidth=0.8, label="objective")
    axes.set_xlabel(f"requests a second to a machine of {settings[0].machine.workers} workers")
    axes.set(ylabel=f"p{100 * demand.share:g} latency, seconds", ylim=(0, 4 * demand.objective))
    axes.legend()
    save(figure, file)
