"""The prompt syntax of AUTOMATIC1111's web UI: (word), (word:1.3), [word], BREAK, a backslash for brackets as text.

Needs neither torch nor a model, so that a request can be refused before it waits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from models.errors import ModelError

STRONGER = 1.1  # of (word)
WEAKER = 1 / STRONGER  # of [word]
HIGHEST = 10.0
MOST_WEAKENED = 32  # parts weighted below 1: each costs one more reading of the whole prompt

_TOKEN = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|[\\:]")
_EDIT = re.compile(r"(?<!\\)\[[^\[\]]*[:|][^\[\]]*\]")
_LORA_TAG = re.compile(r"<\s*(?:lora|lyco)\s*:[^<>]*>", re.IGNORECASE)
_COMPOSED = re.compile(r"\bAND\b")
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_EXPLICIT = re.compile(r"(?<!\\)\([^()]*:\s*[+-]?[\d.]+\s*\)")


class BadPrompt(ModelError):
    """A weight that no picture can be drawn with. The message quotes the words."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A stretch of the prompt; its `weight` is 1 as it stands, 0 not there."""

    text: str
    weight: float = 1.0


def parse(prompt: str) -> tuple[Fragment, ...]:
    """The prompt without its brackets, neighbours of one weight joined; () for an empty one.

    Brackets nest and their weights multiply. One that is never closed reaches to the end; one that closes nothing is
    text. Raises BadPrompt.
    """
    texts: list[str] = []
    opened: list[tuple[str, int]] = []  # bracket, index of the first text inside
    starts: dict[int, list[float]] = {}
    ends: dict[int, int] = {}

    def close(factor: float) -> None:
        _, start = opened.pop()
        if start < len(texts):
            starts.setdefault(start, []).append(factor)
            ends[len(texts)] = ends.get(len(texts), 0) + 1

    for match in _TOKEN.finditer(prompt):
        token, weight = match[0], match["weight"]
        inside = opened[-1][0] if opened else ""
        if token in ("(", "["):
            opened.append((token, len(texts)))
        elif weight is not None and inside == "(":
            close(float(weight))
        elif token == ")" and inside == "(":
            close(STRONGER)
        elif token == "]" and inside == "[":
            close(WEAKER)
        elif token.startswith("\\") and len(token) == 2:
            texts.append(token[1])
        else:
            texts.append(token)
    while opened:
        close(STRONGER if opened[-1][0] == "(" else WEAKER)

    fragments: list[Fragment] = []
    weights = [1.0]
    for index, text in enumerate(texts):
        del weights[len(weights) - ends.get(index, 0) :]
        for factor in starts.get(index, ()):
            weights.append(weights[-1] * factor)
        _add(fragments, text, weights[-1])
    _check(fragments)
    return tuple(fragments)


def _add(fragments: list[Fragment], text: str, weight: float) -> None:
    if fragments and (fragments[-1].weight == weight or not text.strip()):
        fragments[-1] = Fragment(fragments[-1].text + text, fragments[-1].weight)
    else:
        fragments.append(Fragment(text, weight if text.strip() else 1.0))


def _check(fragments: list[Fragment]) -> None:
    for fragment in fragments:
        if not 0 <= fragment.weight <= HIGHEST:  # false for a weight beyond all floats as well
            raise BadPrompt(
                f"The weight of {fragment.text.strip()[:40]!r} is {fragment.weight:g}. Brackets multiply; give a "
                rf"weight from 0 to {HIGHEST:g}, or write \( and \) for brackets that are text."
            )
    weakened = sum(fragment.weight < 1 for fragment in fragments)
    if weakened > MOST_WEAKENED:
        raise BadPrompt(
            f"{weakened} parts of the prompt are weighted below 1; at most {MOST_WEAKENED} can be. Join some of them."
        )


def plain(fragments: tuple[Fragment, ...]) -> str:
    """The text alone."""
    return "".join(fragment.text for fragment in fragments)


def windows(fragments: tuple[Fragment, ...]) -> list[tuple[Fragment, ...]]:
    """The parts between the words BREAK, each of which an encoder is to read from the beginning of a window.

    A part without words is none; at least one is returned, which may be empty.
    """
    parts: list[list[Fragment]] = [[]]
    for fragment in fragments:
        first, *others = _BREAK.split(fragment.text)
        parts[-1].append(Fragment(first, fragment.weight))
        parts += [[Fragment(text, fragment.weight)] for text in others]
    kept = [tuple(one for one in part if one.text) for part in parts]
    return [part for part in kept if plain(part).strip()] or kept[:1]


def weighted(fragments: tuple[Fragment, ...]) -> bool:
    return any(fragment.weight != 1 for fragment in fragments)


def remarks(prompt: str, *, weights: bool) -> list[str]:
    """Sentences on syntax of other tools that is read as plain words here.

    `weights`: whether the model reads weights at all.
    """
    sentences = []
    if _LORA_TAG.search(prompt):
        sentences.append("<lora:…> in a prompt is read as plain words; name the adapter in loras instead.")
    if _COMPOSED.search(prompt):
        sentences.append("AND in a prompt does not draw prompts together here; it is read as a word.")
    if _CHOICE.search(prompt):
        sentences.append("{a|b} in a prompt chooses nothing here; all of it is read as words.")
    if not weights and _BREAK.search(prompt):
        sentences.append("This model reads its text in one piece: BREAK is a word to it.")
    if weights and _EDIT.search(prompt):
        sentences.append("[a:b:0.5] and [a|b] do not edit the prompt between steps here; they only weaken their words.")
    if not weights and _EXPLICIT.search(prompt):
        sentences.append("This model reads no weights: (word:1.3) is plain text to it.")
    return sentences
