"""Prints docs/compatibility.md from the rows that the tests run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tests.compatibility.files import FILES
from tests.compatibility.rows import ON, ROWS, FileRow, Row

HEAD = """# Compatibility

What works with what, as the test suite runs it: every line below is a row of `tests/compatibility/rows.py`, sent
through the HTTP API. A ✅ line draws on each of the models and its report shows reused calls; a ❌ line is refused (422
`incompatible`) with the remedy. `tiny-sd` and `tiny-flux` are the embedded models; the others are pipelines of the true
class and topology, at small width and with random weights (`small-sd`: two levels, quick to compile). This page is
printed by `python -m tests.compatibility.page`; a test fails when it is not current.
"""

FILE_HEAD = """
## Kinds of file

Each line is a file with its writer's key names and shapes, at small width and with random numbers. ❌: it is refused
with this sentence. The key is one of its tensors. Every file is called `ink` here.

✅ of a checkpoint: dropped into the folder of checkpoints it is a model of this family, and each number of its
networks is exactly the one that the file stands for (of packed weights, by the formulas of the package `gguf`): that is
stricter than a picture within one level. ✅ of a LoRA or an embedding: its picture is that of weights merged by hand,
within one level of 255; beside it stands what `warnings` says. A refusal of a LoRA tells Stable Diffusion 1.5 and 2.1
apart by their true widths, which these small models have not got.
"""


def page() -> str:
    parts = [HEAD]
    for cache in ON:
        on = ", ".join(f"`{field}: {_json(value)}`" for field, value in ON[cache].items())
        parts.append(
            f"\n## {cache}\n\nSwitched on by {on}.\n\n| | {cache} with | models | requests |\n|---|---|---|---|\n"
        )
        parts += [_line(row) for row in ROWS if row.cache == cache]
    parts.append(FILE_HEAD)
    for group in dict.fromkeys(row.group for row in FILES):
        parts.append(f"\n### {group}\n\n| | kind | model | key | |\n|---|---|---|---|---|\n")
        parts += [_file(row) for row in FILES if row.group == group]
    return "".join(parts)


def _file(row: FileRow) -> str:
    model, key = (f"`{name}`" if name else "" for name in (row.model, row.key))
    return f"| {'❌' if row.refused else '✅'} | {row.kind} | {model} | {key} | {row.said} |\n"


def _line(row: Row) -> str:
    mark = "✅" if row.remedy is None else "❌"
    beside = f"{row.beside}: {row.note}" if row.note else row.beside
    models = ", ".join(f"`{model}`" for model in row.models)
    requests = "; ".join(_fields(fields) for fields in row.fields) if row.fields != ({},) else ""
    if row.remedy is not None:
        field, words = row.remedy
        requests += f"{' → ' if requests else ''}error at `{field}`: “… {words} …”"
    return f"| {mark} | {beside} | {models} | {requests} |\n"


def _fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"`{field}: {_json(value)}`" for field, value in fields.items())


def _json(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_json, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_json(inner)}' for key, inner in value.items())}}}"
    return str(value)


if __name__ == "__main__":
    sys.stdout.write(page())
