"""What the scenarios look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import save
from benchmarks.serving.page import last
from benchmarks.serving.plan import Setting, curve, predict, setting
from benchmarks.serving.service import mean

_COLORS = ("#6c757d", "#2a9d8f", "#f77f00", "#c1121f")
Entries = Sequence[Mapping[str, Any]]


def closed(entries: Entries, panel: Axes) -> str:
    """Images a second, a group of bars for each mix."""
    loads, names = (list(dict.fromkeys(name(entry) for entry in entries)) for name in (lambda e: e["name"], setting))
    for number, name in enumerate(names):
        here = {entry["name"]: entry["figures"]["finished"] for entry in entries if setting(entry) == name}
        places = [at + (number - (len(names) - 1) / 2) * 0.2 for at in range(len(loads))]
        bars = panel.bar(places, [here[load] for load in loads], 0.19, label=name, color=_COLORS[number % 4])
        panel.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    panel.set_xticks(range(len(loads)), loads)
    panel.set_ylabel("finished images a second")
    panel.margins(y=0.12)
    return f"{entries[0]['clients']} clients that ask at once again"


def at_load(entries: Entries, panel: Axes) -> str:
    """Latencies as they were, and as they were predicted."""
    label: str | None = "p50 and p95 as predicted, with the luck of 95 % of runs"
    for number, entry in enumerate(entries):
        good = [latency for at, latency, status, *_ in entry["points"] if status == 200 and at >= entry["warm_up"]]
        shares = [(place + 1) / len(good) for place in range(len(good))]
        color = _COLORS[number % 4]
        named = f"{setting(entry)}, {entry['rate']:.2f} /s"
        panel.step(sorted(good), shares, where="post", color=color, label=named)
        found = predict(entry)
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            middle = found.model[name]
            bounds = [[middle - found.low[name]], [found.high[name] - middle]]
            style: Any = {"color": color, "marker": "D", "capsize": 3, "linewidth": 1, "label": label}
            panel.errorbar(middle, share, xerr=bounds, **style)
            label = None
    panel.set_xlabel("latency from the scheduled arrival, seconds")
    panel.set_ylabel("share of requests")
    panel.set_xlim(left=0)
    return "Random arrivals at 70 % of the capacity"


def overload(entries: Entries, file: Path) -> None:
    """Latencies, the queue and memory over time."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(3, len(entries), sharex=True, squeeze=False, height_ratios=(2, 1, 1))
    for (top, middle, low), entry in zip(panels.T, entries, strict=True):
        for status, color, label in ((200, _COLORS[1], "accepted"), (429, _COLORS[3], "refused, 429")):
            points = [(at, latency) for at, latency, answered, *_ in entry["points"] if answered == status]
            top.plot(*zip(*points, strict=True), ".", color=color, markersize=4, label=label) if points else None
        bound = last(entry["rules"]) * entry["held"]["service_longest"]
        top.axhline(bound, color="black", linewidth=0.8, label="longest service × those of the last place")
        top.set_title(f"{setting(entry)}: {entry['rate']:.1f} requests a second", fontsize="medium")
        at, server, workers, waiting = zip(*entry["looks"], strict=True)
        middle.step(at, [number or 0 for number in waiting], where="post", color=_COLORS[2])
        middle.axhline(entry["rules"]["queue"], color="black", linewidth=0.8)
        for name, size, color in (("server", server, _COLORS[0]), ("worker", workers, _COLORS[3])):
            low.plot(at, [part / 1e6 for part in size], color=color, label=name)
        low.margins(y=0.2)
        low.set_ylim(bottom=0)
        low.set_xlabel("seconds")
        for panel in (top, middle, low):
            panel.axvspan(0, entry["warm_up"], color="#adb5bd", alpha=0.3, linewidth=0)
            panel.grid(alpha=0.25)
    for panel, label in zip(panels[:, 0], ("seconds to the answer", "waiting", "resident MB"), strict=True):
        panel.set_ylabel(label)
    panels[0][0].legend(fontsize=8)
    panels[2][0].legend(fontsize=8)
    save(figure, file)


def load_curves(entries: Entries, panel: Axes, workers: int, share: float, objective: float) -> str:
    """The plan's latency over the rate of a machine, up to where its queue overflows."""
    for number, one in enumerate(Setting.of(entry, workers) for entry in entries):
        most = workers / mean(one.times, one.kinds, one.machine.max_batch)
        rates = [most * part / 20 for part in range(1, 20)]
        panel.plot(rates, curve(one, rates, share), color=_COLORS[number % 4], label=one.name)
    panel.axhline(objective, color="black", linewidth=0.8)
    panel.set_xlabel(f"requests a second to a machine of {workers} workers")
    panel.set_ylabel(f"p{100 * share:g} latency, seconds")
    panel.set_ylim(0, 4 * objective)
    return "Where the objective (black) ends what a machine can take"


def draw(plot: Any, entries: Entries, file: Path, *more: Any) -> None:
    """A picture of one panel, with its legend below."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    panel.set_title(plot(entries, panel, *more), fontsize="medium")
    panel.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save(figure, file)


def scenario(name: str, entries: Entries, file: Path) -> None:
    if name == "overload":
        overload(entries, file)
    else:
        draw({"closed": closed, "open": at_load}[name], entries, file)
