"""Measure servers under load. Each command prints a table and, last, one JSON line."""

from __future__ import annotations

import json
import os
import re
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
from benchmarks.server import SERVE
from benchmarks.serving import page, plan
from benchmarks.serving.load import Load, Target
from benchmarks.serving.requests import MIXED, MIXES, PATHS, with_fields
from benchmarks.serving.scenarios import Setup, at_load, closed, measured, overload

FILE = ROOT / "docs" / "serving.json"
PAGE = ROOT / "docs" / "serving.md"
SCENARIOS = {"closed": closed, "open": at_load, "overload": overload}
Scenario = StrEnum("Scenario", list(SCENARIOS))
ApiName = StrEnum("ApiName", list(PATHS))
MixName = StrEnum("MixName", list(MIXES))
Objective = Annotated[float, typer.Option(min=0, help="Seconds within which a request should be answered.")]
Seed = Annotated[int, typer.Option(help="Of arrivals and requests.")]
Data = Annotated[Path, typer.Option(help="Where what was measured is kept.")]
Page = Annotated[Path, typer.Option("--page", help="The page to write.")]

cli = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@cli.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        scenarios()


@cli.command()
def scenarios(
    names: Annotated[list[Scenario] | None, typer.Argument(help="Which ones; all if none is named.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of an open loop; the others take a share of it.")] = 100.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of every request.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="That the server's worker computes with.")] = 1,
    objective: Objective = 2.0,
    seed: Seed = 0,
    serve: Annotated[str | None, typer.Option(help="Module to run as the server instead of `app serve`.")] = None,
    model: Annotated[str | None, typer.Option(help="Of every request, instead of the mix's.")] = None,
    data: Data = FILE,
    file: Page = PAGE,
) -> None:
    """Measure against servers of its own and write docs/serving.md with its plots."""
    fields = {"steps": steps} | ({"model": model} if model else {})
    mixed = [kind for kind in MIXED if not (model and "flux_enabled" in kind[2])]  # Flux names its own model
    given: Any = {"threads": threads, "seconds": seconds, "objective": objective, "seed": seed}
    setup = Setup(serve=("-m", serve) if serve else SERVE, mixed=mixed, fields=fields, **given)
    kept, chosen = read(data), [name for name in SCENARIOS if names is None or name in names]
    for name in chosen:
        entries = json.loads(json.dumps(SCENARIOS[name](setup)))  # as it is read back
        command = shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]])
        kept[name] = {"command": command, "conditions": _conditions(setup), "entries": entries}
        write(data, {name: kept[name] for name in SCENARIOS if name in kept})
        show(name, page.COLUMNS, map(page.cells, entries))
    again(data, file)
    claims = [claim for entry in kept.get("overload", {"entries": []})["entries"] for claim in page.of_overload(entry)]
    claims += page.of_closed(kept["closed"]["entries"]) if "closed" in kept else []
    told = {name: {**kept[name], "entries": list(map(short, kept[name]["entries"]))} for name in chosen}
    print(json.dumps({"scenarios": told, "claims": [asdict(claim) for claim in claims]}))


@cli.command("page")
def again(data: Data = FILE, file: Page = PAGE) -> None:
    """Write docs/serving.md and its plots again from what was measured before."""
    from benchmarks.serving.plot import scenario  # matplotlib, which only the page needs

    kept = read(data)
    page.write(file, kept)
    for name, one in kept.items():
        scenario(name, one["entries"], file.parent / "images" / f"serving-{name}.png")


@cli.command("load")
def one_load(
    url: Annotated[str, typer.Option(help="Of a server that runs, such as http://127.0.0.1:7861.")],
    api: Annotated[ApiName, typer.Option(help="native: this service's; openai: POST /v1/images/generations.")] = (
        ApiName.native  # type: ignore[attr-defined]
    ),
    rate: Annotated[float | None, typer.Option(help="Requests a second of an open loop.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Of a closed loop, instead of a rate.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of the load.")] = 60.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of it that are left out.")] = 5.0,
    mix: Annotated[MixName, typer.Option(help="Of requests; openai sends prompt, size and number alone.")] = (
        MixName.square  # type: ignore[attr-defined]
    ),
    caches: Annotated[bool, typer.Option(help="native: whether requests cache.")] = False,
    size: Annotated[str | None, typer.Option(help="Such as 512x512, of every request.")] = None,
    steps: Annotated[int | None, typer.Option(help="native: of every request.")] = None,
    extra: Annotated[str, typer.Option(help="JSON object added to every request's body.")] = "{}",
    objective: Objective = 2.0,
    seed: Seed = 0,
    pid: Annotated[int | None, typer.Option(help="Of the server, if it runs here: its memory is watched.")] = None,
    key: Annotated[str | None, typer.Option(envvar="API_KEY", help="Bearer key.")] = None,
) -> None:
    """One load against any server of this API or of OpenAI's: exactly one of --rate and --clients."""
    if (rate is None) == (clients is None):
        raise typer.BadParameter("give either --rate or --clients")
    fields: dict[str, Any] = {"steps": steps} if steps else {}
    if size:
        if (sides := re.fullmatch(r"(\d+)x(\d+)", size)) is None:
            raise typer.BadParameter(f"{size!r} is no size such as 512x512")
        fields |= {"width": int(sides[1]), "height": int(sides[2])}
    target = Target(url, pid, api, _object(extra), {"authorization": f"Bearer {key}"} if key else {})
    name, asked = f"{rate:g} a second" if rate else f"{clients} clients", with_fields(MIXES[mix], caches, **fields)
    loop: dict[str, Any] = {"objective": objective, "seed": seed, "rate": rate, "clients": clients}
    load = Load(name=name, mix=asked, seconds=seconds, warm_up=warm_up, **loop)
    try:
        target.warm(asked, 1)
        found = measured(load, [target.run(load)], caches, 0)
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
    fleets = [plan.fleet(plan.Setting.of(entry, workers), demand) for entry in entries]
    tables = page.planning(entries, fleets, demand)
    print("\n".join(line for lines in tables.values() for line in lines))
    if file is not None:
        from benchmarks.serving.plot import draw, load_curves

        file.write_text(page.marked(file.read_text(encoding="utf-8"), tables), encoding="utf-8")
        draw(load_curves, entries, file.parent / "images" / "planning.png", workers, share, objective)
    print(json.dumps({"demand": asdict(demand), "fleets": [asdict(one) for one in fleets]}))


def read(file: Path) -> dict[str, Any]:
    """Scenarios by name: `command`, `conditions` and `entries`, as `scenarios.measured` makes them.

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


def _conditions(setup: Setup) -> str:
    here = machine()
    fields = ", ".join(f"{name} {value}" for name, value in setup.fields.items())
    return (
        f"{here['device']}, {os.cpu_count()} cores: the worker computes with {setup.threads} thread"
        f"{'s' if setup.threads > 1 else ''}, HTTP and the load's own client have the rest. Every request: {fields}. "
        f"Seed {setup.seed}. Python {here['python']}, {named(here['versions'])}, locust {version('locust')}. "
        f"Commit {here['commit']}."
    )


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is no JSON object")
    return found


if __name__ == "__main__":
    cli()
