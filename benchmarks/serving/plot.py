"""What the scenarios look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.serving.kept import setting
from benchmarks.serving.plan import curve, settings
from benchmarks.serving.prediction import predict
from benchmarks.serving.verdict import longest_wait

_COLORS = ("#6c757d", "#2a9d8f", "#f77f00", "#c1121f")
_GREY = "#adb5bd"


def closed(entries: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Images a second, a group of bars for each mix."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    loads = list(dict.fromkeys(entry["name"] for entry in entries))
    names = list(dict.fromkeys(setting(entry) for entry in entries))
    for number, name in enumerate(names):
        here = {entry["name"]: entry["figures"]["finished"] for entry in entries if setting(entry) == name}
        places = [at + (number - (len(names) - 1) / 2) * 0.2 for at in range(len(loads))]
        bars = panel.bar(places, [here[load] for load in loads], 0.19, label=name, color=_COLORS[number % 4])
        panel.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    panel.set_xticks(range(len(loads)), loads)
    panel.set_ylabel("finished images a second")
    panel.margins(y=0.12)
    _finish(figure, panel, file, f"{entries[0]['clients']} clients that ask at once again")


def at_load(entries: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Latencies as they were, and as they were predicted."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, entry in enumerate(entries):
        found = sorted(
            latency for at, latency, status, *_ in entry["points"] if status == 200 and at >= entry["warm_up"]
        )
        shares = [(place + 1) / len(found) for place in range(len(found))]
        color = _COLORS[number % 4]
        panel.step(found, shares, where="post", color=color, label=f"{setting(entry)}, {entry['rate']:.2f} /s")
        predicted = predict(entry)
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            panel.errorbar(
                predicted.model[name],
                share,
                xerr=[[predicted.model[name] - predicted.low[name]], [predicted.high[name] - predicted.model[name]]],
                color=color,
                marker="D",
                capsize=3,
                linewidth=1,
                label="p50 and p95 as predicted, with the luck of 95 % of runs"
                if number == 0 and share == 0.5
                else None,
            )
    panel.set_xlabel("latency from the scheduled arrival, seconds")
    panel.set_ylabel("share of requests")
    panel.set_xlim(left=0)
    _finish(figure, panel, file, "Random arrivals at 70 % of the capacity")


def overload(entries: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Latencies, the queue and memory over time."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(3, len(entries), sharex=True, squeeze=False, height_ratios=(2, 1, 1))
    for column, entry in enumerate(entries):
        top, middle, low = (panels[row][column] for row in range(3))
        for status, color, label in ((200, _COLORS[1], "accepted"), (429, _COLORS[3], "refused, 429")):
            points = [(at, latency) for at, latency, answered, *_ in entry["points"] if answered == status]
            top.plot(*zip(*points, strict=True), ".", color=color, markersize=4, label=label) if points else None
        bound = longest_wait(entry["rules"]) * entry["held"]["service_longest"]
        top.axhline(bound, color="black", linewidth=0.8, label="longest service × those of the last place")
        top.set_title(f"{setting(entry)}: {entry['rate']:.1f} requests a second", fontsize="medium")
        looks = entry["looks"]
        middle.step([look[0] for look in looks], [look[3] or 0 for look in looks], where="post", color=_COLORS[2])
        middle.axhline(entry["rules"]["queue"], color="black", linewidth=0.8)
        for place, (name, color) in enumerate((("server", _COLORS[0]), ("worker", _COLORS[3])), start=1):
            low.plot([look[0] for look in looks], [look[place] / 1e6 for look in looks], color=color, label=name)
        low.margins(y=0.2)
        low.set_ylim(bottom=0)
        low.set_xlabel("seconds")
        for panel in (top, middle, low):
            panel.axvspan(0, entry["warm_up"], color=_GREY, alpha=0.3, linewidth=0)
            panel.grid(alpha=0.25)
    for panel, label in zip(panels[:, 0], ("seconds to the answer", "waiting", "resident MB"), strict=True):
        panel.set_ylabel(label)
    panels[0][0].legend(fontsize=8)
    panels[2][0].legend(fontsize=8)
    _save(figure, file)


def load_curves(entries: Sequence[Mapping[str, Any]], workers: int, share: float, objective: float, file: Path) -> None:
    """The plan's latency over the rate of a machine, up to where its queue overflows."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, (name, machine, kinds, times) in enumerate(settings(entries, workers)):
        most = machine.workers / times.mean(kinds, machine.max_batch)
        rates = [most * part / 20 for part in range(1, 20)]
        panel.plot(rates, curve(machine, kinds, times, rates, share), color=_COLORS[number % 4], label=name)
    panel.axhline(objective, color="black", linewidth=0.8)
    panel.set_xlabel(f"requests a second to a machine of {workers} workers")
    panel.set_ylabel(f"p{100 * share:g} latency, seconds")
    panel.set_ylim(0, 4 * objective)
    _finish(figure, panel, file, "Where the objective (black) ends what a machine can take")


def _finish(figure: Figure, panel: Axes, file: Path, title: str) -> None:
    panel.set_title(title, fontsize="medium")
    panel.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


DRAWN = {"closed": closed, "open": at_load, "overload": overload}
