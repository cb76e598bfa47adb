"""The command line: each command prints a table and, last, one JSON line."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from app.cli.compare import processor, versions
from benchmarks.machine import PACKAGES, ROOT, commit
from benchmarks.server import SERVE
from benchmarks.serving import kept as store
from benchmarks.serving import page, plan
from benchmarks.serving.api import APIS
from benchmarks.serving.mix import MIXED, MIXES, with_caches, with_fields
from benchmarks.serving.scenarios import Measured, Rules, Setup, at_load, closed, overload
from benchmarks.serving.target import Load, Run, reaching
from benchmarks.serving.verdict import of_closed, of_overload

SCENARIOS = {"closed": closed, "open": at_load, "overload": overload}
Scenario = StrEnum("Scenario", list(SCENARIOS))
ApiName = StrEnum("ApiName", list(APIS))
MixName = StrEnum("MixName", list(MIXES))

cli = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@cli.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        scenarios()


@cli.command("scenarios")
def scenarios(
    names: Annotated[list[Scenario] | None, typer.Argument(help="Which ones; all if none is named.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of an open loop; the others take a share of it.")] = 100.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of every request.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="That the server's worker computes with.")] = 1,
    objective: Annotated[float, typer.Option(min=0, help="Seconds within which a request should be answered.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and requests.")] = 0,
    serve: Annotated[str | None, typer.Option(help="Module to run as the server instead of `app serve`.")] = None,
    model: Annotated[str | None, typer.Option(help="Of every request, instead of the mix's.")] = None,
    data: Annotated[Path, typer.Option(help="Where what was measured is kept.")] = store.FILE,
    file: Annotated[Path, typer.Option("--page", help="The page to write.")] = ROOT / "docs" / "serving.md",
) -> None:
    """Measure against servers of its own and write docs/serving.md with its plots."""
    fields = {"steps": steps} | ({"model": model} if model else {})
    mixed = [kind for kind in MIXED if not (model and "flux_enabled" in kind.fields)]  # Flux names its own model
    command = ("-m", serve) if serve else SERVE
    setup = Setup(
        serve=command, mixed=mixed, fields=fields, threads=threads, seconds=seconds, objective=objective, seed=seed
    )
    chosen = [name for name in SCENARIOS if names is None or name in names]
    kept = store.read(data)
    for name in chosen:
        entries = [measured.as_dict() for measured in asyncio.run(SCENARIOS[name](setup))]
        command_line = shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]])
        kept[name] = {"command": command_line, "conditions": _conditions(setup), "entries": entries}
        store.write(data, {name: kept[name] for name in SCENARIOS if name in kept})
        _print(name, entries)
    page.write(file, kept, _draw(kept, file))
    claims = [claim for entry in kept.get("overload", {"entries": []})["entries"] for claim in of_overload(entry)]
    claims += of_closed(kept["closed"]["entries"]) if "closed" in kept else []
    measured = store.summary({name: kept[name] for name in chosen})
    print(json.dumps({"scenarios": measured, "claims": [asdict(claim) for claim in claims]}))


@cli.command("page")
def drawn_again(
    data: Annotated[Path, typer.Option(help="What was measured.")] = store.FILE,
    file: Annotated[Path, typer.Option("--page", help="The page to write.")] = ROOT / "docs" / "serving.md",
) -> None:
    """Write docs/serving.md and its plots again from what was measured before."""
    kept = store.read(data)
    page.write(file, kept, _draw(kept, file))


@cli.command("load")
def load(
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
    objective: Annotated[float, typer.Option(min=0, help="Seconds within which a request should be answered.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and requests.")] = 0,
    pid: Annotated[int | None, typer.Option(help="Of the server, if it runs here: its memory is watched.")] = None,
    key: Annotated[str | None, typer.Option(envvar="API_KEY", help="Bearer key.")] = None,
) -> None:
    """One load against any server of this API or of OpenAI's: exactly one of --rate and --clients."""
    if (rate is None) == (clients is None):
        raise typer.BadParameter("give either --rate or --clients")
    fields: dict[str, Any] = {"steps": steps} if steps else {}
    if size:
        fields["width"], fields["height"] = _size(size)
    asked = with_caches(with_fields(MIXES[mix], **fields), caches)
    one = Load(
        name=f"{rate:g} a second" if rate else f"{clients} clients",
        mix=asked,
        seconds=seconds,
        warm_up=warm_up,
        objective=objective,
        seed=seed,
        rate=rate,
        clients=clients,
    )
    try:
        run = asyncio.run(_load(url, APIS[api](_object(extra)), pid, key, one))
    except (httpx.HTTPError, RuntimeError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    entry = Measured(Rules(caches, 0), run).as_dict()
    _print(url, [entry])
    print(json.dumps(store.summary({"load": {"entries": [entry]}})["load"]["entries"][0]))


async def _load(url: str, api: Any, pid: int | None, key: str | None, one: Load) -> Run:
    async with reaching(url, api, pid, key) as target:
        await target.warm(one.mix, 1)
        return await target.run(one)


@cli.command("plan")
def planned(
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second at the peak.")] = 1000.0,
    objective: Annotated[float, typer.Option(min=0, help="Seconds.")] = 1.0,
    share: Annotated[float, typer.Option(min=0.01, max=0.999, help="Of requests that must keep it.")] = 0.95,
    price: Annotated[float, typer.Option(min=0, help="Of a worker's hour; the default is an example.")] = 2.0,
    workers: Annotated[int, typer.Option(min=1, help="Of a machine, with one queue.")] = 8,
    data: Annotated[Path, typer.Option(help="What `scenarios open` measured.")] = store.FILE,
    file: Annotated[Path | None, typer.Option("--write", help="Page whose marked tables are written anew.")] = None,
) -> None:
    """Fleet size and price from what was measured."""
    entries = store.read(data).get("open", {"entries": []})["entries"]
    if not entries:
        print(f"{data} holds no open loop: run `python -m benchmarks.serving scenarios open` first", file=sys.stderr)
        raise typer.Exit(1)
    demand = plan.Demand(rate=rate, objective=objective, share=share, price=price)
    fleets = [plan.fleet(name, *rest, demand) for name, *rest in plan.settings(entries, workers)]
    tables = page.planning(entries, fleets, demand)
    print("\n".join(line for lines in tables.values() for line in lines))
    if file is not None:
        from benchmarks.serving.plot import load_curves

        file.write_text(marked(file.read_text(encoding="utf-8"), tables), encoding="utf-8")
        load_curves(entries, workers, share, objective, file.parent / "images" / "planning.png")
    print(json.dumps({"demand": asdict(demand), "fleets": [{**asdict(one), "workers": one.workers} for one in fleets]}))


def marked(text: str, tables: dict[str, list[str]]) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced. Raises ValueError without them."""
    for name, lines in tables.items():
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda match, lines=lines: match[1] + "\n".join(["", *lines]) + match[2],
            text,
            flags=re.DOTALL,
        )
        if found != 1:
            raise ValueError(f"the page marks the place of {name!r} {found} times")
    return text


def _conditions(setup: Setup) -> str:
    named = ", ".join(f"{name} {number}" for name, number in versions(PACKAGES).items() if number)
    fields = ", ".join(f"{name} {value}" for name, value in setup.fields.items())
    return (
        f"{processor()}, {os.cpu_count()} cores: the worker computes with {setup.threads} thread"
        f"{'s' if setup.threads > 1 else ''}, HTTP and the load's own client have the rest. Every request: {fields}. "
        f"Seed {setup.seed}. Python {platform.python_version()}, {named}. Commit {commit()}."
    )


def _draw(kept: dict[str, Any], file: Path) -> dict[str, str]:
    from benchmarks.serving.plot import DRAWN  # matplotlib, which only the page needs

    plots = {}
    for name, one in kept.items():
        plots[name] = f"images/serving-{name}.png"
        DRAWN[name](one["entries"], file.parent / plots[name])
    return plots


def _print(title: str, entries: Sequence[dict[str, Any]]) -> None:
    shown = Table(*page.COLUMNS, title=title)
    for entry in entries:
        shown.add_row(*page.cells(entry))
    Console(width=200).print(shown)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size such as 512x512")
    return int(match[1]), int(match[2])


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
