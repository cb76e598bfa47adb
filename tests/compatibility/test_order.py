"""A → B → A on one server: whatever came between, the first request's answer comes back byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from models.registry import Registry
from tests.compatibility.conftest import filled, made_for
from tests.compatibility.rows import EMBEDDING, IMG2IMG, LORA, ON, STACK

SIDE = 128
MODEL = "small-sd"
FIRST = {"model": MODEL, "prompt": "a misty forest at twilight", "width": SIDE, "height": SIDE, "steps": 3, "seed": 7}
# What comes between, by name. Each is sent once, and the first request again after it.
BETWEEN: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "LoRA under DeepCache": {**LORA, **ON["DeepCache"]},
    "embedding": EMBEDDING,
    "DeepCache": ON["DeepCache"],
    "another sampler": {"sampler": "dpmpp_2m", "scheduler": "karras"},
    "a sampler of two evaluations": {"sampler": "heun", **ON["DeepCache"]},
    "another size": {"width": 192, "seed": 8},
    "weights, a long prompt, clip skip": {"prompt": "a (stormy:1.4) sea at noon, " * 30, "clip_skip": 2},
    "another guidance": {"guidance_scale": 1.0, "guidance_rescale": 0.5},
    "guidance in a part, FreeU": {"guidance_start": 0.3, "guidance_end": 0.6, "freeu": True, **ON["DeepCache"]},
    "several at once": {"num_images": 2, "batch_size": 2},
    "hires-fix, multi-scale and LoRA under DeepCache": {**STACK, **ON["DeepCache"]},
    "a picture to begin with": IMG2IMG,
    "faces": {"adetailer": True},
    "SDPA": {"attention": "sdpa"},
    "another model": {"model": "tiny-flux", **ON["FBCache"]},
    "a LoRA of another model": {"loras": [{"name": "own-sdxl"}]},
    "no such layer": {"clip_skip": 12},
}
REFUSED = {"a LoRA of another model": "loras", "no such layer": "clip_skip"}


async def bytes_of(client: httpx.AsyncClient, fields: dict[str, Any]) -> bytes:
    response = await client.post("/api/generate", json={**FIRST, **fields}, headers={"accept": "image/png"})
    assert response.status_code == 200, response.text
    return response.content


async def test_the_first_answers_come_back(client: httpx.AsyncClient, registry: Registry, weights: Path) -> None:
    for name in (MODEL, "sdxl"):
        made_for(registry.get(name), f"own-{name}", weights)
    plain, *others = (filled(dict(fields), MODEL, SIDE) for fields in ({}, ON["DeepCache"], {**LORA, **EMBEDDING}))
    expected = await bytes_of(client, plain)
    others_expected = [await bytes_of(client, fields) for fields in others]
    for name, fields in BETWEEN.items():
        body = {**FIRST, **filled(dict(fields), MODEL, SIDE)}
        response = await client.post("/api/generate", json=body)
        if name in REFUSED:
            assert (response.status_code, response.json()["error"]["field"]) == (422, REFUSED[name])
        else:
            assert response.status_code == 200, (name, response.text)
        assert await bytes_of(client, plain) == expected, name
    assert [await bytes_of(client, fields) for fields in others] == others_expected
    assert len({expected, *others_expected}) == 3
