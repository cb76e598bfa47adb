"""Who asks for what, of this service or of OpenAI's images API, which its peers speak; and what an answer says."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WEATHER = ("clear", "misty", "snowy", "stormy", "starry")
PLACES = ("forest", "mountains", "desert", "sea", "hills", "island")
TIMES = ("dawn", "noon", "sunset", "twilight", "night")
PATHS = {"native": "/api/generate", "openai": "/v1/images/generations"}

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
MIXES = {"square": SQUARE, "mixed": MIXED}


def with_fields(mix: Sequence[Kind], caches: bool | None = None, **fields: Any) -> list[Kind]:
    """Every kind with these fields; where `caches` is said, with the balanced preset or Flux's cache, or without."""
    unet = {"deepcache_enabled": True, "deepcache_preset": "balanced"} if caches else {}
    flux = {} if caches is None else {"fbcache_enabled": caches}
    return [
        (name, share, {**kind, **fields, **(flux if "flux_enabled" in kind else unet)}) for name, share, kind in mix
    ]


def drawn(mix: Sequence[Kind], seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Without end: a kind's name and a request of it, each with a prompt and a seed of its own."""
    source, weights, number = random.Random(seed), [weight for _, weight, _ in mix], 0
    while True:
        ((name, _, fields),) = source.choices(mix, weights)
        prompt = f"a {source.choice(WEATHER)} {source.choice(PLACES)} at {source.choice(TIMES)}"
        yield name, {"prompt": prompt, "seed": number, **fields}
        number += 1


def body(fields: Mapping[str, Any], api: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` is added as it is: what OpenAI has no name for (steps, seed, caches) is left out."""
    if api == "native":
        return {**fields, **extra}
    size = f"{fields.get('width', 512)}x{fields.get('height', 512)}"
    asked = {"prompt": fields["prompt"], "n": fields.get("num_images", 1), "size": size}
    return {**asked, "response_format": "b64_json", **extra}


def answer(status: int, content: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """What an answer says of itself. A 200 that does not hold its pictures has the status 0, as where none came.

    queue: seconds before a worker took it; service: from then to the result; None where the server does not tell.
    """
    found = {"status": status, "images": 0, "queue": None, "service": None, "computed": 0, "reused": 0, "error": ""}
    if status != 200:
        return found | {"retry_after": "retry-after" in headers, "error": content[:300]}
    try:
        told = json.loads(content)
        if "data" in told:
            pictures = [entry["b64_json"] for entry in told["data"]]
        else:
            pictures = told["images"] if "images" in told else [told["image"]]
            queue, cache = told["timings"]["queue_seconds"], told["cache"]
            found |= {"queue": queue, "service": told["timings"]["total_seconds"] - queue}
            found |= {"computed": cache["computed"], "reused": cache["reused"]}
        if not pictures or not all(isinstance(text, str) and text for text in pictures):
            raise ValueError("a 200 without its pictures")
        return found | {"images": len(pictures)}
    except (KeyError, TypeError, ValueError) as error:
        return found | {"status": 0, "error": f"{type(error).__name__}: {error}"}
