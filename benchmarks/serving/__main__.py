"""Measure servers under load. Each command prints a table and, last, one JSON line."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from subprocess import CalledProcessError
from typing import Annotated, Any

import httpx
import typer

from benchmarks.report import ROOT, conditions, fill, judged, machine, show, table
from benchmarks.serving import page, plan
from benchmarks.serving.load import Load, Target, entry
from benchmarks.serving.requests import SQUARE
from benchmarks.serving.scenarios import Setup, at_load, overload

FILE = ROOT / "docs" / "serving.json"
SCENARIOS = {"open": (at_load, page.of_open), "overload": (overload, page.of_overload)}
Scenario = StrEnum("Scenario", list(SCENARIOS))
Data = Annotated[Path, typer.Option(help="Where what was measured is kept; its page lies beside it.")]

cli = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@cli.command()
def scenarios(
    names: Annotated[list[Scenario] | None, typer.Argument(help="Which ones; all if none is named.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of an open loop; the others take a share of it.")] = 100.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of every request.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="That the server's worker computes with.")] = 1,
    data: Data = FILE,
) -> None:
    """Measure against servers of its own and write the tables of docs/serving.md."""
    kept = read(data)
    command = shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]])
    for name in names or list(Scenario):
        measure, claims = SCENARIOS[name]
        kept[name] = measure(Setup(steps=steps, threads=threads, seconds=seconds))
        lines = ",\n".join(f"{json.dumps(one)}: {json.dumps(entries)}" for one, entries in kept.items())
        data.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        tables = [*table(page.COLUMNS, map(page.cells, kept[name])), *judged(claims(kept[name]))]
        show(tables)
        where = f"{conditions(machine())} The worker computes with {threads} of the cores, HTTP and the load's client "
        fill(data.with_suffix(".md"), {name: [f"`{command}`", "", where + "have the rest.", "", *tables]})
    told = {name: {"entries": kept[name], "claims": list(map(asdict, SCENARIOS[name][1](kept[name])))} for name in kept}
    print(json.dumps({"benchmark": "serving", **machine(), "scenarios": told}))


@cli.command("load")
def one_load(
    url: Annotated[str, typer.Option(help="Of a server that runs, such as http://127.0.0.1:7861.")],
    rate: Annotated[float | None, typer.Option(help="Requests a second of an open loop.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Of a closed loop, instead of a rate.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of the load.")] = 60.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of it that are left out.")] = 5.0,
    fields: Annotated[str, typer.Option(help="JSON object added to every request's body.")] = "{}",
    pid: Annotated[int | None, typer.Option(help="Of the server, if it runs here: its memory is watched.")] = None,
) -> None:
    """One load against a running server: exactly one of --rate and --clients."""
    if (rate is None) == (clients is None):
        raise typer.BadParameter("give either --rate or --clients")
    try:
        mix = [(name, share, {**kind, **json.loads(fields)}) for name, share, kind in SQUARE]
    except (TypeError, ValueError):
        raise typer.BadParameter(f"{fields!r} is no JSON object") from None
    name = f"{rate:g} a second" if rate else f"{clients} clients"
    load = Load(name=name, mix=mix, seconds=seconds, warm_up=warm_up, rate=rate, clients=clients)
    target = Target(url, pid)
    try:
        target.warm(mix)
        found = entry(load, *target.run(load), rules={"asked": fields})
    except (httpx.HTTPError, RuntimeError, CalledProcessError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    show(table(page.COLUMNS, [page.cells(found)]))
    print(json.dumps(found))


@cli.command("plan")
def planned(
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second at the peak.")] = 1000.0,
    objective: Annotated[float, typer.Option(min=0, help="Seconds.")] = 1.0,
    share: Annotated[float, typer.Option(min=0.01, max=0.999, help="Of requests that must keep it.")] = 0.95,
    price: Annotated[float, typer.Option(min=0, help="Of a worker's hour; the default is an example.")] = 2.0,
    workers: Annotated[int, typer.Option(min=1, help="Of a machine, with one queue.")] = 8,
    data: Data = FILE,
    file: Annotated[Path | None, typer.Option("--write", help="Page whose marked tables are written anew.")] = None,
) -> None:
    """Fleet size and price from what was measured."""
    if not (entries := read(data).get("open")):
        print(f"{data} holds no open loop: run `python -m benchmarks.serving scenarios open` first", file=sys.stderr)
        raise typer.Exit(1)
    demand = plan.Demand(rate=rate, objective=objective, share=share, price=price)
    settings = [plan.Setting.of(entry, workers) for entry in entries]
    fleets = [plan.fleet(one, demand) for one in settings]
    tables = page.planning(entries, fleets, demand)
    show(line for lines in tables.values() for line in lines)
    if file is not None:
        fill(file, tables)
        page.draw_plan(settings, demand, file.parent / "images" / "planning.png")
    print(json.dumps({"demand": asdict(demand), "fleets": [asdict(one) for one in fleets]}))


def read(file: Path) -> dict[str, Any]:
    """Entries as `load.entry` makes them, by their scenario."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


if __name__ == "__main__":
    cli()
