"""docs/serving.md and the tables of docs/planning.md, written from the figures and from nothing else."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Claim, judged, markdown, percentile
from benchmarks.serving.plan import NAMES, Demand, Fleet, Prediction, predict, setting
from benchmarks.serving.service import rest

FLAT = 0.05  # growth of resident memory that counts as none
NEAR = 0.2  # of a prediction
KEPT = 0.9  # of the capacity, under overload
Entry = Mapping[str, Any]

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
_PREDICTED = """\
From the service times that were measured just before and after, the simulation of
[planning.md](planning.md) predicts the latencies: of 200 runs as long as the measured one and with as many
arrivals, with 95 % of single runs between the bounds by the luck of when they come. *Replayed*: of the very
arrivals; what is left is the error of the model. *Closed form*: Pollaczek and Khinchine's mean.
"""
COLUMNS = (
    "load | setting | requests | offered /s | images /s | p50 s | p95 s | p99 s | wait p50 / p95 s | in time "
    "| goodput /s | hit rate | 429 / 503 | server / worker MB (growth) | late"
)


def write(file: Path, kept: Mapping[str, Any]) -> None:
    """`kept`: scenarios by name, each with its command, conditions and entries. Their plots lie beside the page."""
    lines = ["# Under load", "", "Written by the commands that it names; edit those, not the figures.", ""]
    kinds = dict.fromkeys(kind for one in kept.values() for entry in one["entries"] for kind, _ in entry["mix"])
    lines += [_HOW + ", ".join(kinds) + ".", ""]
    sections = {
        "closed": lambda entries: judged(of_closed(entries)),
        "open": _at_load,
        "overload": lambda entries: judged(claim for entry in entries for claim in of_overload(entry)),
    }
    for name, section in sections.items():
        if name in kept:
            (title, before), entries = _TITLES[name], kept[name]["entries"]
            lines += [
                f"## {title.format(entries[0])}",
                "",
                f"`{kept[name]['command']}`",
                "",
                kept[name]["conditions"],
                "",
            ]
            lines += [before.format(entries[0]), ""] if before else []
            lines += [*markdown(COLUMNS, map(cells, entries)), *section(entries)]
            lines += [f"![{name}](images/serving-{name}.png)", ""]
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


_TITLES = {
    "closed": (
        "{0[clients]} clients that ask at once again",
        "{0[rounds]} rounds over all settings; images a second are the median of them.",
    ),
    "open": ("Random arrivals at 70 % of the capacity", ""),
    "overload": ("Three times too much", ""),
}


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
        f"{entry['name']} | {setting(entry)} | {found['requests']} | {found['offered']:.2f} | {found['finished']:.2f} "
        f"| {took} | {waited} | {found['within']:.0%} in {found['objective']:g} s | {found['goodput']:.2f} | {hits} "
        f"| {statuses.get('429', 0)} / {statuses.get('503', 0)} | {memory('server')} / {memory('workers')} "
        f"| {1000 * found['late']:.0f} ms"
    )


def of_closed(entries: Sequence[Entry]) -> list[Claim]:
    """What batches and caches add to the finished images of busy clients."""
    claims = []
    for name in dict.fromkeys(entry["name"] for entry in entries):
        here = [entry for entry in entries if entry["name"] == name]
        finished = {(one["rules"]["caches"], one["rules"]["max_batch"]): one["figures"]["finished"] for one in here}
        most = max(size for _, size in finished)
        for label, rules in (("batches", (False, most)), ("caches", (True, 1)), ("both", (True, most))):
            gain = finished[rules] / finished[False, 1]
            claims.append(Claim(f"{name}: images a second with {label} over without", f"{gain:.2f}×"))
    return claims


def _at_load(entries: Sequence[Entry]) -> list[str]:
    found = [(setting(entry), predict(entry)) for entry in entries]
    columns = " |  | measured | predicted | single runs | error | replayed | error | closed form"
    table = markdown(columns, (_predicted(where, one, name) for where, one in found for name in NAMES))
    loads = ", ".join(f"{one.load:.0%}" for _, one in found)
    drifts = ", ".join(f"{entry['drift']:+.1%}" for entry in entries)
    said = f"Load in this order: {loads} of the capacity. Service times after over before: {drifts}."
    claims = [claim for where, one in found for claim in of_prediction(where, one)]
    return ["### The plan's prediction", "", _PREDICTED, *table, said, "", *judged(claims)]


def _predicted(where: str, one: Prediction, name: str) -> str:
    exact = f"{one.closed_form:.3f} s" if name == "mean" and one.closed_form is not None else ""
    return (
        f"{where} | {name} | {one.measured[name]:.3f} s | {one.model[name]:.3f} s "
        f"| {one.low[name]:.3f}–{one.high[name]:.3f} | {one.error(name):+.1%} | {one.replay[name]:.3f} s "
        f"| {one.replay_error(name):+.1%} | {exact}"
    )


def of_prediction(where: str, one: Prediction) -> list[Claim]:
    return [
        Claim(
            f"{where}: {name} latency predicted within {NEAR:.0%}",
            f"{one.model[name]:.3f} s for {one.measured[name]:.3f} s, {one.error(name):+.0%}; "
            f"replayed, {one.replay_error(name):+.0%}",
            abs(one.error(name)) <= NEAR,
        )
        for name in NAMES
    ]


def of_overload(entry: Entry) -> list[Claim]:
    """Whether the server, asked for too much, does what it can and refuses the rest at once."""
    found, held, rules = entry["figures"], entry["held"], entry["rules"]
    waited, silent, rounds = held["waiting_most"], found["without_retry_after"], last(rules)
    p99, bound = found["latency"]["p99"], rounds * held["service_longest"]
    finished, capacity, where = found["finished"], entry["capacity"], f"batches of {rules['max_batch']}"
    counts = ", ".join(f"{count} × {status}" for status, count in found["statuses"].items())
    far, rate = f"{p99:.2f} s of {bound:.2f} s", f"{finished:.2f} of {capacity:.2f}"
    told: list[tuple[str, str, bool]] = [
        ("every request is answered, 200 or 429", counts, found["statuses"].keys() <= {"200", "429"}),
        ("every 429 says when to come back", f"{silent} without `Retry-After`", silent == 0),
        (
            f"never more than {rules['queue']} wait",
            f"{waited} at most",
            waited is not None and waited <= rules["queue"],
        ),
        (f"p99 of accepted requests at most {rounds} times the longest service", far, p99 <= bound),
        (f"images a second, at least {KEPT:.0%} of the capacity", rate, finished >= KEPT * capacity),
    ]
    for part in ("server", "workers"):
        change, size = held[f"{part}_growth"], held[f"{part}_mb"]
        seen = "not seen" if change is None else f"{change:+.1%}, {size:.0f} MB at the end"
        told.append((f"memory of the {part} grows by at most {FLAT:.0%}", seen, change is not None and change <= FLAT))
    return [Claim(f"{where}: {sentence}", measured, holds) for sentence, measured, holds in told]


def last(rules: Mapping[str, Any]) -> int:
    """Services until the answer of one that took the last place in a queue of one kind, its own included."""
    return math.ceil(rules["queue"] / rules["max_batch"]) + 1


def planning(entries: Sequence[Entry], fleets: Sequence[Fleet], demand: Demand) -> dict[str, list[str]]:
    """The tables of docs/planning.md, by the name that marks their place."""
    times = (
        "setting | kind | share | occupied, p50 s | p95 s | deviation / mean | besides, s | batches of 2 / 3 / 4 take"
    )
    fleet = (
        "setting | a machine takes, /s | its workers are busy | machines | workers | one queue over all would need "
        "| a thousand images cost | saved"
    )
    said = (
        f"{demand.rate:g} requests a second, {demand.share:.0%} of them within {demand.objective:g} s, a worker's hour "
        f"at {demand.price:g}:"
    )
    first = next((one.cost for one in fleets if one.cost is not None), 0.0)
    kinds = [_times(entry, *kind) for entry in entries for kind in entry["mix"]]
    return {
        "times": markdown(times, kinds),
        "fleet": [said, "", *markdown(fleet, (_fleet(one, first) for one in fleets))],
    }


def _times(entry: Entry, kind: str, share: float) -> str:
    one = entry["times"][kind]
    busy = one["busy"]
    batches = " / ".join(f"{factor:.2f}" for size, factor in sorted(one["batches"].items()) if size != "1")
    return (
        f"{setting(entry)} | {kind} | {share:.0%} | {percentile(busy, 0.5):.3f} | {percentile(busy, 0.95):.3f} "
        f"| {statistics.pstdev(busy) / statistics.fmean(busy):.2f} | {rest(one):+.3f} "
        f"| {batches and batches + ' times as long'}"
    )


def _fleet(one: Fleet, first: float) -> str:
    if one.cost is None:
        return f"{one.name} | none: an idle machine misses the objective | | | | | | "
    return (
        f"{one.name} | {one.per_machine:.2f} | {one.busy:.0%} | {one.machines} | {one.workers} "
        f"| {'–' if one.pooled is None else one.pooled} | {one.cost:.2f} | {1 - one.cost / first:.0%}"
    )


def marked(text: str, tables: Mapping[str, list[str]]) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced. Raises ValueError without them."""
    for name, lines in tables.items():
        new = "\n".join(["", *lines])
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda at, new=new: at[1] + new + at[2], text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"the page marks the place of {name!r} {found} times")
    return text
