"""The fields of a request, from app/http/schemas.py into the client's types and the tables of docs/api.md.

`.venv/bin/python docs/fields.py` writes both; a test says whether they are current.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from app.http.schemas import GenerateRequest  # noqa: E402  # the checkout's, wherever this is run

CLIENT, PAGE = ROOT / "app" / "client.py", ROOT / "docs" / "api.md"
BELOW = "# Below: written by docs/fields.py.\n"
CACHES = re.compile("(deepcache|fbcache|cache)_")


def client(text: str) -> str:
    """app/client.py, given as it is, with the types that the model of the body has now."""
    parts: dict[str, str] = {}
    _typed(GenerateRequest, "Fields", "All but the prompt; what each means stands in docs/api.md.", parts)
    source = text[: text.index(BELOW)] + BELOW + "\n\n" + "\n\n".join(parts.values())
    ruff = [sys.executable, "-m", "ruff", "format", "-"]
    return subprocess.run(ruff, input=source, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _typed(model: type[BaseModel], name: str, docstring: str, parts: dict[str, str]) -> None:
    lines = [f"class {name}(TypedDict, total=False):", f'    """{docstring}"""\n']
    for field, info in model.model_fields.items():
        if field != "prompt":
            lines.append(f"    {field}: {_written(info.annotation, parts)}")
    parts[name] = "\n".join(lines) + "\n"


def _written(kind: Any, parts: dict[str, str]) -> str:
    """As it stands in a source; the types of models within go into `parts` before."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is NoneType:
        return "None"
    if origin is Annotated:
        return _written(inside[0], parts)
    if origin in (Union, UnionType):
        return " | ".join(_written(one, parts) for one in inside)
    if origin is Literal:
        return f"Literal[{', '.join(json.dumps(one) for one in inside)}]"
    if origin in (list, tuple):
        return f"list[{_written(inside[0], parts)}]"
    if issubclass(kind, BaseModel):
        name = f"{kind.__name__}Field"
        if name not in parts:
            _typed(kind, name, (kind.__doc__ or "").strip().splitlines()[0], parts)
        return name
    return str(kind.__name__)


def page(text: str) -> str:
    """docs/api.md, given as it is, with the tables that the model of the body has now."""
    names = list(GenerateRequest.model_fields)
    first = next(index for index, name in enumerate(names) if CACHES.match(name))
    caches = [name for name in names if CACHES.match(name)]
    rest = [name for name in names[first:] if name not in caches]
    for group, members in (("picture", names[:first]), ("caches", caches), ("more", rest)):
        marked = rf"(<!-- {group}, by docs/fields\.py -->\n).*?\n\n"
        table = "\n".join(["| field | | default | |", "|---|---|---|---|", *map(_row, members)])
        text, found = re.subn(marked, lambda match, table=table: f"{match[1]}{table}\n\n", text, flags=re.DOTALL)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"{PAGE}: {found} tables are marked {group!r}")
    return text


def _row(name: str) -> str:
    info = GenerateRequest.model_fields[name]
    schema = GenerateRequest.model_json_schema()
    if info.is_required():
        default = "required"
    else:
        default = {"": "empty", "[]": "none"}.get(str(info.default), f"`{json.dumps(info.default)}`".replace('"', ""))
    return f"| `{name}` | {values(schema['properties'][name], schema)} | {default} | {info.description} |"


def values(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """What a field takes, from its JSON Schema, in a few words."""
    match next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema):
        case {"enum": names}:
            return ", ".join(f"`{name}`" for name in names)
        case {"type": "boolean"}:
            return "true or false"
        case {"minimum": least, "maximum": most}:
            return f"{least} to {most}"
        case {"exclusiveMinimum": least, "exclusiveMaximum": most}:
            return f"above {least}, below {most}"
        case {"exclusiveMinimum": least, **rest}:
            return f"above {least}" + (f", to {rest['maximum']}" if "maximum" in rest else "")
        case {"type": "array", "maxItems": most, "items": {"$ref": address}}:
            inside = whole["$defs"][address.rpartition("/")[2]]["properties"]
            return f"up to {most} of `{{{', '.join(json.dumps(name) for name in inside)}}}`"
        case {"minLength": 1}:
            return "a name"
        case {"type": "string", "maxLength": most}:
            return f"up to {most} characters"
        case {"type": "string"}:
            return "base64 or a data URL"
        case other:
            raise ValueError(f"no words for {other}")


if __name__ == "__main__":
    for path, written in ((CLIENT, client), (PAGE, page)):
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
