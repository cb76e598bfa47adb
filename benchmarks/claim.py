"""What a benchmark is held to: a sentence, the figures, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_VERDICT = {True: "holds", False: "**does not hold**", None: "–"}


@dataclass(frozen=True, slots=True)
class Claim:
    """`holds` is None for a figure that nothing was demanded of."""

    sentence: str
    measured: str
    holds: bool | None = None


def table(claims: Sequence[Claim]) -> list[str]:
    """Lines of Markdown, an empty one last."""
    rows = [f"| {claim.sentence} | {claim.measured} | {_VERDICT[claim.holds]} |" for claim in claims]
    return ["| | measured | |", "|---|---|---|", *rows, ""]
