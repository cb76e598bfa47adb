"""docs/serving.md with its plots and the tables of docs/planning.md, drawn from the figures and from nothing else."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import Claim, judged, markdown, percentile, save
from benchmarks.serving.plan import NAMES, Demand, Fleet, Prediction, Setting, predict, setting
from benchmarks.serving.simulation import mean, rest

FLAT = 0.05  # growth of resident memory that counts as none
NEAR = 0.2  # of a prediction
KEPT = 0.9  # of the capacity, under overload
COLORS = ("#6c757d", "#2a9d8f", "#f77f00", "#c1121f")
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
    for name, one in kept.items():
        entries, picture = one["entries"], f"images/serving-{name}.png"
        predictions = [predict(entry) for entry in entries] if name == "open" else []
        lines += [f"## {TITLES[name].format(entries[0])}", "", f"`{one['command']}`", "", one["conditions"], ""]
        if name == "closed":
            lines += [f"{entries[0]['rounds']} rounds over all settings; images a second are the median of them.", ""]
        lines += markdown(COLUMNS, map(cells, entries))
        lines += _predicted(entries, predictions) if predictions else judged(claims({name: one}))
        lines += [f"![{name}]({picture})", ""]
        with panel(TITLES[name].format(entries[0]), file.parent / picture) as axes:
            if name == "open":
                draw_open(entries, predictions, axes)
            else:
                {"closed": draw_closed, "overload": draw_overload}[name](entries, axes)
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


TITLES = {
    "closed": "{0[clients]} clients that ask at once again",
    "open": "Random arrivals at 70 % of the capacity",
    "overload": "Three times too much",
}


def claims(kept: Mapping[str, Any]) -> list[Claim]:
    found = [claim for entry in kept.get("overload", {"entries": []})["entries"] for claim in of_overload(entry)]
    return found + (of_closed(kept["closed"]["entries"]) if "closed" in kept else [])


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


def _predicted(entries: Sequence[Entry], found: Sequence[Mapping[str, Prediction]]) -> list[str]:
    rows = [(setting(entry), name, one[name]) for entry, one in zip(entries, found, strict=True) for name in NAMES]
    table = markdown(
        " |  | measured | predicted | single runs | error | replayed | error | closed form",
        (
            f"{where} | {name} | {one.measured:.3f} s | {one.model:.3f} s | {one.low:.3f}–{one.high:.3f} "
            f"| {one.error:+.1%} | {one.replay:.3f} s | {one.replay_error:+.1%} "
            f"| {'' if one.exact is None else f'{one.exact:.3f} s'}"
            for where, name, one in rows
        ),
    )
    loads = ", ".join(f"{len(one['points']) / one['seconds'] / one['capacity']:.0%}" for one in entries)
    drifts = ", ".join(f"{entry['drift']:+.1%}" for entry in entries)
    said = f"Load in this order: {loads} of the capacity. Service times after over before: {drifts}."
    return ["### The plan's prediction", "", _PREDICTED, *table, said, "", *judged(of_prediction(*one) for one in rows)]


def of_prediction(where: str, name: str, one: Prediction) -> Claim:
    measured = f"{one.model:.3f} s for {one.measured:.3f} s, {one.error:+.0%}; replayed, {one.replay_error:+.0%}"
    return Claim(f"{where}: {name} latency predicted within {NEAR:.0%}", measured, abs(one.error) <= NEAR)


def of_overload(entry: Entry) -> list[Claim]:
    """Whether the server, asked for too much, does what it can and refuses the rest at once."""
    found, held, rules = entry["figures"], entry["held"], entry["rules"]
    waited, queue, silent, rounds = held["waiting_most"], rules["queue"], found["without_retry_after"], last(rules)
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


@contextmanager
def panel(title: str, file: Path) -> Iterator[Any]:
    """A picture of one panel, with its legend below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    yield axes
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save(figure, file)


def draw_closed(entries: Sequence[Entry], axes: Any) -> None:
    """Images a second, a group of bars for each mix."""
    loads, names = (list(dict.fromkeys(name(entry) for entry in entries)) for name in (lambda e: e["name"], setting))
    for number, name in enumerate(names):
        here = {entry["name"]: entry["figures"]["finished"] for entry in entries if setting(entry) == name}
        places = [at + (number - (len(names) - 1) / 2) * 0.2 for at in range(len(loads))]
        bars = axes.bar(places, [here[load] for load in loads], 0.19, label=name, color=COLORS[number % 4])
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(range(len(loads)), loads)
    axes.set_ylabel("finished images a second")
    axes.margins(y=0.12)


def draw_open(entries: Sequence[Entry], predictions: Sequence[Mapping[str, Prediction]], axes: Any) -> None:
    """Latencies as they were, and as they were predicted."""
    label: str | None = "p50 and p95 as predicted, with the luck of 95 % of runs"
    for number, (entry, found) in enumerate(zip(entries, predictions, strict=True)):
        good = [latency for at, latency, status, *_ in entry["points"] if status == 200 and at >= entry["warm_up"]]
        named = f"{setting(entry)}, {entry['rate']:.2f} /s"
        axes.ecdf(good, label=named, color=COLORS[number % 4])
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            one = found[name]
            bounds = [[one.model - one.low], [one.high - one.model]]
            style: Any = {"color": COLORS[number % 4], "marker": "D", "capsize": 3, "linewidth": 1, "label": label}
            axes.errorbar(one.model, share, xerr=bounds, **style)
            label = None
    axes.set(xlabel="latency from the scheduled arrival, seconds", ylabel="share of requests")
    axes.set_xlim(left=0)


def draw_overload(entries: Sequence[Entry], axes: Any) -> None:
    """When which request was answered, and the bound for those that were taken."""
    for number, entry in enumerate(entries):
        for status, marker, label in ((200, ".", "accepted"), (429, "x", "refused, 429")):
            points = [(at, latency) for at, latency, answered, *_ in entry["points"] if answered == status]
            at, seconds = zip(*points, strict=True) if points else ((), ())
            axes.plot(at, seconds, marker, color=COLORS[number % 4], markersize=4, label=f"{setting(entry)}: {label}")
        bound = last(entry["rules"]) * entry["held"]["service_longest"]
        axes.axhline(bound, color=COLORS[number % 4], linewidth=0.8, label="longest service × those of the last place")
    axes.set(xlabel="seconds", ylabel="seconds to the answer")


def draw_plan(settings: Sequence[Setting], demand: Demand, file: Path) -> None:
    """The plan's latency over the rate of a machine, up to where its queue overflows."""
    with panel("Where the objective (black) ends what a machine can take", file) as axes:
        for number, one in enumerate(settings):
            most = one.machine.workers / mean(one.times, one.kinds, one.machine.max_batch)
            rates = [most * part / 20 for part in range(1, 20)]
            found = [[outcome.latency for outcome in one.simulated(rate)[0]] for rate in rates]
            percentiles = [percentile(latencies, demand.share) for latencies in found]
            axes.plot(rates, percentiles, color=COLORS[number % 4], label=one.name)
        axes.axhline(demand.objective, color="black", linewidth=0.8)
        axes.set_xlabel(f"requests a second to a machine of {settings[0].machine.workers} workers")
        axes.set(ylabel=f"p{100 * demand.share:g} latency, seconds", ylim=(0, 4 * demand.objective))
