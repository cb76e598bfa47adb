"""Fields of another API that this service has nothing for: refused, unless they ask for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Neutral:
    """`values`: those that change nothing, null always among them. `remedy`: a sentence on what to do instead."""

    values: tuple[object, ...]
    remedy: str

    def accepts(self, value: object) -> bool:
        return value is None or any(_same(value, neutral) for neutral in self.values)

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the values that are taken."""
        return {"enum": [*self.values, None], "description": f"Changes nothing here. {self.remedy}"}


def without_neutral(body: Mapping[str, Any], table: Mapping[str, Neutral], where: str = "") -> dict[str, Any]:
    """The other fields of `body`. Raises Unsupported for a field of the table that asks for something.

    `where`: what the fields are in, for the names in messages, with a dot at its end.
    """
    rest = {}
    for name, value in body.items():
        if name not in table:
            rest[name] = value
        elif not table[name].accepts(value):
            wording = ", ".join(_written(neutral) for neutral in table[name].values) or "null"
            raise Unsupported(
                f"{where}{name} can only be {wording}: anything else would have no effect. {table[name].remedy}",
                field=f"{where}{name}",
            )
    return rest


def _same(one: object, other: object) -> bool:
    """In Python true is 1; in JSON it is not."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _written(value: object) -> str:
    return repr(value).lower() if isinstance(value, bool) else repr(value)
