"""docs/serving.md, written from the figures and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claim import table
from benchmarks.serving.figures import percentile
from benchmarks.serving.kept import setting
from benchmarks.serving.plan import Demand, Fleet
from benchmarks.serving.prediction import NAMES, Prediction, predict
from benchmarks.serving.service import ServiceTimes
from benchmarks.serving.verdict import of_closed, of_overload, of_prediction

_HOW = """\
**Open loop**: requests come at the times of a Poisson process, whether or not those before them are answered. A
latency counts from the scheduled time, not from the sending: a client that is held up by a slow server must not make it
look fast. *Late* is the 99th percentile of what the client itself was behind its schedule. **Closed loop**: clients
that ask again as soon as they are answered.

The first seconds of an open loop are left out; a closed loop counts up to its last answer. A percentile is the least
measured value that so many values do not exceed. *In time* is the share of all requests, refused ones included, that
got their pictures within the objective, and *goodput* how many a second those are. *Wait* is what the answers say of
their time in the queue. Memory is resident, of the server's process and of its worker; growth is that of the median of
the last third over the first.

Kinds of requests: """


def write(file: Path, kept: Mapping[str, Any], plots: Mapping[str, str]) -> None:
    """`kept`: scenarios by name, each with conditions and entries; `plots`: by scenario, relative to the page."""
    lines = ["# Under load", "", "Written by the commands that it names; edit those, not the figures.", ""]
    kinds = {kind: None for one in kept.values() for entry in one["entries"] for kind, _ in entry["mix"]}
    lines += [_HOW + ", ".join(kinds) + ".", ""]
    for name, section in _SECTIONS.items():
        if name in kept:
            lines += section(kept[name])
            if name in plots:
                lines += [f"![{name}]({plots[name]})", ""]
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _closed(one: Mapping[str, Any]) -> list[str]:
    clients = one["entries"][0]["clients"]
    lines = [f"## {clients} clients that ask at once again", "", *_conditions(one)]
    lines += [f"{one['entries'][0]['rounds']} rounds over all settings; images a second are the median of them.", ""]
    lines += [*rows(one["entries"]), *table(of_closed(one["entries"]))]
    return lines


def _at_load(one: Mapping[str, Any]) -> list[str]:
    entries = one["entries"]
    lines = ["## Random arrivals at 70 % of the capacity", "", *_conditions(one)]
    lines += [*rows(entries), "### The plan's prediction", ""]
    lines += [
        "From the service times that were measured just before and after, the simulation of",
        "[planning.md](planning.md) predicts the latencies: of 200 runs as long as the measured one and with as many",
        "arrivals, with 95 % of single runs between the bounds by the luck of when they come. *Replayed*: of the very",
        "arrivals; what is left is the error of the model. *Closed form*: Pollaczek and Khinchine's mean.",
        "",
        "| | | measured | predicted | single runs | error | replayed | error | closed form |",
        "|---" * 9 + "|",
    ]
    claims, loads = [], []
    for entry in entries:
        prediction = predict(entry)
        lines += [_predicted(entry, prediction, name) for name in NAMES]
        claims += of_prediction(setting(entry), prediction)
        loads.append(f"{prediction.load:.0%}")
    drifts = ", ".join(f"{entry['drift']:+.1%}" for entry in entries)
    lines += [
        "",
        f"Load in this order: {', '.join(loads)} of the capacity. Service times after over before: {drifts}.",
        "",
        *table(claims),
    ]
    return lines


def _predicted(entry: Mapping[str, Any], found: Prediction, name: str) -> str:
    exact = f"{found.closed_form:.3f} s" if name == "mean" and found.closed_form is not None else ""
    return (
        f"| {setting(entry)} | {name} | {found.measured[name]:.3f} s | {found.model[name]:.3f} s "
        f"| {found.low[name]:.3f}–{found.high[name]:.3f} | {found.error(name):+.1%} | {found.replay[name]:.3f} s "
        f"| {found.replay_error(name):+.1%} | {exact} |"
    )


def _overload(one: Mapping[str, Any]) -> list[str]:
    lines = ["## Three times too much", "", *_conditions(one), *rows(one["entries"])]
    return lines + table([claim for entry in one["entries"] for claim in of_overload(entry)])


def _conditions(one: Mapping[str, Any]) -> list[str]:
    return [f"`{one['command']}`", "", one["conditions"], ""]


_SECTIONS = {"closed": _closed, "open": _at_load, "overload": _overload}


def rows(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of Markdown with a line an entry, an empty line last."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return [*lines, *("| " + " | ".join(cells(entry)) + " |" for entry in entries), ""]


COLUMNS = (
    "load",
    "setting",
    "requests",
    "offered /s",
    "images /s",
    "p50 s",
    "p95 s",
    "p99 s",
    "wait p50 / p95 s",
    "in time",
    "goodput /s",
    "hit rate",
    "429 / 503",
    "server / worker MB (growth)",
    "late",
)


def cells(entry: Mapping[str, Any]) -> list[str]:
    found, held = entry["figures"], entry["held"]
    latency, wait, statuses = found["latency"], found["wait"], found["statuses"]
    return [
        f"{entry['name']}",
        setting(entry),
        str(found["requests"]),
        f"{found['offered']:.2f}",
        f"{found['finished']:.2f}",
        *([f"{latency[name]:.3f}" for name in ("p50", "p95", "p99")] if latency else ["–"] * 3),
        f"{wait['p50']:.3f} / {wait['p95']:.3f}" if wait else "–",
        f"{found['within']:.0%} in {found['objective']:g} s",
        f"{found['goodput']:.2f}",
        "–" if found["hit_rate"] is None else f"{found['hit_rate']:.2f}",
        f"{statuses.get('429', 0)} / {statuses.get('503', 0)}",
        " / ".join(_memory(held, part) for part in ("server", "workers")),
        f"{1000 * found['late']:.0f} ms",
    ]


def _memory(held: Mapping[str, Any], part: str) -> str:
    if held[f"{part}_mb"] is None:
        return "–"
    change = held[f"{part}_growth"]
    return f"{held[f'{part}_mb']:.0f}" + ("" if change is None else f" ({change:+.1%})")


def planning(entries: Sequence[Mapping[str, Any]], fleets: Sequence[Fleet], demand: Demand) -> dict[str, list[str]]:
    """The tables of docs/planning.md, by the name that marks their place."""
    return {"times": _times(entries), "fleet": _fleets(fleets, demand)}


def _times(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| setting | kind | share | occupied, p50 s | p95 s | deviation / mean | besides, s "
        "| batches of 2 / 3 / 4 take |",
        "|---" * 8 + "|",
    ]
    for entry in entries:
        times = ServiceTimes.from_dict(entry["times"])
        for kind, weight in entry["mix"]:
            one = times.kinds[kind]
            p50, p95 = percentile(one.busy, 0.5), percentile(one.busy, 0.95)
            variation = statistics.pstdev(one.busy) / statistics.fmean(one.busy)
            batches = " / ".join(f"{factor:.2f}" for size, factor in sorted(one.batches.items()) if size > 1)
            lines.append(
                f"| {setting(entry)} | {kind} | {weight:.0%} | {p50:.3f} | {p95:.3f} | {variation:.2f} "
                f"| {times.rest(kind):+.3f} | {batches and batches + ' times as long'} |"
            )
    return [*lines, ""]


def _fleets(fleets: Sequence[Fleet], demand: Demand) -> list[str]:
    lines = [
        f"{demand.rate:g} requests a second, {demand.share:.0%} of them within {demand.objective:g} s, a worker's hour "
        f"at {demand.price:g}:",
        "",
        "| setting | a machine takes, /s | its workers are busy | machines | workers | one queue over all would need "
        "| a thousand images cost | saved |",
        "|---" * 8 + "|",
    ]
    first = next((one.cost for one in fleets if one.cost is not None), None)
    for one in fleets:
        if one.cost is None or first is None:
            lines.append(f"| {one.name} | none: an idle machine misses the objective | | | | | | |")
            continue
        lines.append(
            f"| {one.name} | {one.per_machine:.2f} | {one.busy:.0%} | {one.machines} | {one.workers} "
            f"| {'–' if one.pooled is None else one.pooled} | {one.cost:.2f} | {1 - one.cost / first:.0%} |"
        )
    return [*lines, ""]
