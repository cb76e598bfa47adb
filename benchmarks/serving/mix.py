"""Who asks for what: kinds of requests and how often each comes, drawn with a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

WEATHER = ("clear", "misty", "snowy", "stormy", "starry")
PLACES = ("forest", "mountains", "desert", "sea", "hills", "island")
TIMES = ("dawn", "noon", "sunset", "twilight", "night")


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that cost the same. `fields` are those of POST /api/generate, prompt and seed apart.

    Only requests of one kind may share a batch. `weight`: its share, relative to the mix's other kinds.
    """

    name: str
    weight: float
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    kind: str
    fields: Mapping[str, Any]

    @property
    def images(self) -> int:
        return int(self.fields.get("num_images", 1))


Mix = Sequence[Kind]

SQUARE: Mix = (Kind("tiny-sd 128×128", 1.0, {"width": 128, "height": 128}),)
MIXED: Mix = (
    Kind("tiny-sd 128×128", 0.5, {"width": 128, "height": 128}),
    Kind("tiny-sd 192×128", 0.2, {"width": 192, "height": 128}),
    Kind("tiny-sd 512×512", 0.1, {"width": 512, "height": 512}),
    Kind("tiny-flux 128×128", 0.2, {"width": 128, "height": 128, "flux_enabled": True}),
)
MIXES: Mapping[str, Mix] = {"square": SQUARE, "mixed": MIXED}


def with_caches(mix: Mix, on: bool) -> Mix:
    """The balanced preset on UNets, the first-block cache on Flux; or neither."""

    def fields(kind: Kind) -> dict[str, Any]:
        if kind.fields.get("flux_enabled"):
            return {**kind.fields, "fbcache_enabled": on}
        return {**kind.fields, **({"deepcache_enabled": True, "deepcache_preset": "balanced"} if on else {})}

    return tuple(replace(kind, fields=fields(kind)) for kind in mix)


def with_fields(mix: Mix, **fields: Any) -> Mix:
    return tuple(replace(kind, fields={**kind.fields, **fields}) for kind in mix)


def drawn(mix: Mix, seed: int) -> Iterator[Request]:
    """Without end; each with a prompt and a seed of its own."""
    source = random.Random(seed)
    weights = [kind.weight for kind in mix]
    number = 0
    while True:
        (kind,) = source.choices(mix, weights)
        prompt = f"a {source.choice(WEATHER)} {source.choice(PLACES)} at {source.choice(TIMES)}"
        yield Request(kind.name, {"prompt": prompt, "seed": number, **kind.fields})
        number += 1
