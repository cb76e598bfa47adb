"""Who asks for what, and what an answer says."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HOURS = ("at dawn", "at noon", "at sunset", "at twilight", "at night")
PLACES = ("forest", "mountains", "desert", "sea", "hills", "island")
WEATHERS = ("clear", "misty", "snowy", "stormy", "starry")
PROMPTS = [f"a {weather} {place} {hour}" for hour, place, weather in itertools.product(HOURS, PLACES, WEATHERS)]
PATH = "/api/generate"

Kind = tuple[str, float, Mapping[str, Any]]
"""A name, its share of the requests relative to the others', and the fields of POST /api/generate.

Requests of one kind cost the same, and only they may share a batch.
"""
SQUARE: Sequence[Kind] = (("tiny-sd 128×128", 1.0, {"width": 128, "height": 128}),)
MIXED: Sequence[Kind] = (
    ("tiny-sd 128×128", 0.5, {"width": 128, "height": 128}),
    ("tiny-sd 192×128", 0.2, {"width": 192, "height": 128}),
    ("tiny-sd 512×512", 0.1, {"width": 512, "height": 512}),
    ("tiny-flux 128×128", 0.2, {"width": 128, "height": 128, "flux_enabled": True}),
)


def with_fields(mix: Sequence[Kind], caches: bool, **fields: Any) -> list[Kind]:
    """Every kind with these fields, and with the balanced preset or Flux's cache, or without."""
    unet = {"deepcache_enabled": True, "deepcache_preset": "balanced"} if caches else {}
    flux = {"fbcache_enabled": caches}
    return [
        (name, share, {**kind, **fields, **(flux if "flux_enabled" in kind else unet)}) for name, share, kind in mix
    ]


def drawn(mix: Sequence[Kind], seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Without end: a kind's name and a request of it, each with a prompt and a seed of its own."""
    source, weights, number = random.Random(seed), [weight for _, weight, _ in mix], 0
    while True:
        ((name, _, fields),) = source.choices(mix, weights)
        yield name, {"prompt": source.choice(PROMPTS), "seed": number, **fields}
        number += 1


def answer(status: int, content: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """What an answer says of itself. A 200 that does not hold its pictures has the status 0, as where none came.

    queue: seconds before a worker took it; service: from then to the result.
    """
    found = {"status": status, "images": 0, "queue": None, "service": None, "computed": 0, "reused": 0, "error": ""}
    if status != 200:
        return found | {"retry_after": "retry-after" in headers, "error": content[:300]}
    try:
        told = json.loads(content)
        pictures = told["images"] if "images" in told else [told["image"]]
        if not pictures or not all(isinstance(text, str) and text for text in pictures):
            raise ValueError("a 200 without its pictures")
        queue, total = (told["timings"][name] for name in ("queue_seconds", "total_seconds"))
        found |= {name: told["cache"][name] for name in ("computed", "reused")}
        return found | {"queue": queue, "service": total - queue, "images": len(pictures)}
    except (KeyError, TypeError, ValueError) as error:
        return found | {"status": 0, "error": f"{type(error).__name__}: {error}"}
