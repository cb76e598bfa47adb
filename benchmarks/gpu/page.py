"""The results of scripts/gpu-check as a page of tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.report import conditions, table

Row = Mapping[str, Any]
COLUMNS = "setting | images | s a step | speed-up | first run, s | hit rate | GB, denoising | GB, whole run"
WORDS = 80  # characters of an error in a table


def page(result: Row) -> str:
    """result: what __main__ has gathered so far; a part that is not in it was not reached."""
    machine, parts = result["machine"], result["parts"]
    lines = ["# GPU check", "", conditions(machine), ""]
    if result["small"]:
        lines += ["Small models: this tries the code, and no figure here means anything.", ""]
    lines += table("part | | seconds", (f"{one['name']} | {one['state']} | {one['seconds']}" for one in parts))
    lines += tested([row for part in parts for row in part["rows"] if "test" in row])
    measured = [row for part in parts for row in part["rows"] if "model" in row]
    for model in dict.fromkeys(row["model"] for row in measured):
        lines += [f"## {model}", "", *of_model([row for row in measured if row["model"] == model])]
    for part in parts:
        if tail := part.get("tail"):
            lines += [f"## Last words of {part['name']}", "", "```", *tail, "```", ""]
    return "\n".join(lines)


def tested(rows: list[Row]) -> Iterator[str]:
    counts = Counter(row["outcome"] for row in rows)
    yield f"Tests: {', '.join(f'{number} {outcome}' for outcome, number in counts.items()) or 'none'}."
    yield ""
    if bad := [row for row in rows if row["outcome"] in ("failed", "error")]:
        yield from (f"* {row['outcome']}: `{row['test']}`" for row in bad)
        yield ""


def of_model(rows: list[Row]) -> Iterator[str]:
    simulated = {row["setting"]: row for row in rows if row.get("simulated")}
    planned = [tuple(one) for row in rows for one in row.get("planned", ())]
    found = {(row["setting"], row["images"]): row for row in rows if "images" in row}
    yield from table(COLUMNS, (cells(key, found) for key in planned))
    compared = [line for name in simulated for line in beside(name, found.get((name, 1), {}), simulated[name])]
    yield from table("waits and launches in four steps, bytes | measured | simulated", compared)


def cells(key: tuple[str, int], found: Mapping[tuple[str, int], Row]) -> str:
    name, images = key
    row = found.get(key, {"error": "not reached"})
    if error := row.get("error"):
        return f"{name} | {images} | {error[:WORDS].replace('|', '/')} | | | | |"
    base = found.get(("uncached", images), {})
    seconds = row["seconds_per_step"]
    speedup = f"{base['seconds_per_step'] / seconds:.2f}×" if "seconds_per_step" in base else "–"
    gigabytes = " | ".join(billions(row[name]) for name in ("peak_bytes", "most_bytes"))
    hits = "–" if row["hit_rate"] is None else f"{row['hit_rate']:.2f}"
    return f"{name} | {images} | {seconds:.4f} | {speedup} | {row['first_seconds']} | {hits} | {gigabytes}"


def beside(name: str, measured: Row, simulated: Row) -> Iterator[str]:
    for key, what in (("waits", "host waits"), ("launches", "kernels and copies")):
        found = measured.get(key)
        yield f"{name}: {what} | {'–' if found is None else found} | {simulated[key]}"
    for key, what in (("peak_bytes", "GB, denoising"), ("most_bytes", "GB, whole run")):
        yield f"{name}: {what} | {billions(measured.get(key))} | {billions(simulated[key])}"


def billions(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f}"
