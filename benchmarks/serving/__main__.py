"""Measure servers under load. Each command prints a table and, last, one JSON line."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.report import ROOT, machine, named, show
from benchmarks.serving import page, plan
from benchmarks.serving.load import Load, Target, entry
from benchmarks.serving.requests import SQUARE
from benchmarks.serving.scenarios import Setup, at_load, closed, overload

FILE = ROOT / "docs" / "serving.json"
SCENARIOS = {"closed": closed, "open": at_load, "overload": overload}
Scenario = StrEnum("Scenario", list(SCENARIOS))
Data = Annotated[Path, typer.Option(help="Where what was measured is kept; its page and images lie beside it.")]

cli = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@cli.command()
def scenarios(
    names: Annotated[list[Scenario] | None, typer.Argument(help="Which ones; all if none is named.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of an open loop; the others take a share of it.")] = 100.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of every request.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="That the server's worker computes with.")] = 1,
    data: Data = FILE,
) -> None:
    """Measure against servers of its own and write docs/serving.md with its plots."""
    kept, chosen = read(data), [name for name in SCENARIOS if names is None or name in names]
    for name in chosen:
        entries = json.loads(json.dumps(SCENARIOS[name](Setup(steps=steps, threads=threads, seconds=seconds))))
        command, here = shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]), machine()
        conditions = (
            f"{here['device']}, {os.cpu_count()} cores: the worker computes with {threads} thread"
            f"{'s' if threads > 1 else ''}, HTTP and the load's own client have the rest. Every request: steps "
            f"{steps}. Seed 0. Python {here['python']}, {named(here['versions'])}, locust {version('locust')}. "
            f"Commit {here['commit']}."
        )
        kept[name] = {"command": command, "conditions": conditions, "entries": entries}
        write(data, {name: kept[name] for name in SCENARIOS if name in kept})
        show(name, page.COLUMNS, map(page.cells, entries))
    again(data)
    told = {name: {**kept[name], "entries": list(map(short, kept[name]["entries"]))} for name in chosen}
    print(json.dumps({"scenarios": told, "claims": [asdict(claim) for claim in page.claims(kept)]}))


@cli.command("page")
def again(data: Data = FILE) -> None:
    """Write docs/serving.md and its plots again from what was measured before."""
    page.write(data.with_suffix(".md"), read(data))


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
        target.warm(mix, 1)
        found = entry(load, [target.run(load)], rules={"asked": fields})
    except (httpx.HTTPError, RuntimeError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    show(url, page.COLUMNS, [page.cells(found)])
    print(json.dumps(short(found)))


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
    entries = read(data).get("open", {"entries": []})["entries"]
    if not entries:
        print(f"{data} holds no open loop: run `python -m benchmarks.serving scenarios open` first", file=sys.stderr)
        raise typer.Exit(1)
    demand = plan.Demand(rate=rate, objective=objective, share=share, price=price)
    settings = [plan.Setting.of(entry, workers) for entry in entries]
    fleets = [plan.fleet(one, demand) for one in settings]
    tables = page.planning(entries, fleets, demand)
    print("\n".join(line for lines in tables.values() for line in lines))
    if file is not None:
        file.write_text(page.marked(file.read_text(encoding="utf-8"), tables), encoding="utf-8")
        page.draw_plan(settings, demand, file.parent / "images" / "planning.png")
    print(json.dumps({"demand": asdict(demand), "fleets": [asdict(one) for one in fleets]}))


def read(file: Path) -> dict[str, Any]:
    """Scenarios by name: `command`, `conditions` and `entries`, as `load.entry` makes them.

    The page, the plots and the plan are drawn from it and from nothing else.
    """
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(file: Path, kept: Mapping[str, Any]) -> None:
    """A line an entry, so that a new measurement is a change of its lines alone."""
    parts = []
    for name, one in kept.items():
        entries = ",\n  ".join(json.dumps(entry) for entry in one["entries"])
        head = json.dumps({key: value for key, value in one.items() if key != "entries"})
        parts.append(f' {json.dumps(name)}: {head[:-1]}, "entries": [\n  {entries}\n ]}}')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def short(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only plots and the plan read."""
    return {name: value for name, value in entry.items() if name not in ("points", "looks", "times")}


if __name__ == "__main__":
    cli()
