"""Requests at the same time, with and without batching and DeepCache.

Each picture is held against what the same request gets alone, from a server that batches nothing. Prints a table and,
last, one JSON line.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from PIL import Image

from benchmarks.machine import commit
from benchmarks.server import running

WEATHERS = ("clear", "misty", "snowy", "stormy")
PLACES = ("forest", "mountains", "desert", "sea")
TIMES = ("at dawn", "at noon", "at sunset", "at twilight")
DEEPCACHE = {"deepcache_enabled": True, "deepcache_preset": "balanced"}


def body(number: int, steps: int, cached: bool) -> dict[str, Any]:
    prompt = f"a {WEATHERS[number % 4]} {PLACES[number // 4 % 4]} {TIMES[number // 2 % 4]}"
    settings = DEEPCACHE if cached else {}
    return {"prompt": prompt, "seed": number, "steps": steps, "width": 512, "height": 512, **settings}


def picture(answer: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"])))).astype(int)


class Client:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        response = self._http.post("/api/generate", json=fields)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    def metric(self, name: str) -> float:
        lines = self._http.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


@contextmanager
def serving(together: int, threads: int) -> Iterator[Client]:
    settings = {"WAVESPEED_DEVICE": "cpu", "WAVESPEED_THREADS": str(threads), "LD_MAX_BATCH_SIZE": str(together)}
    with running(**settings) as server, server.client() as http:
        client = Client(http)
        client.ask(body(0, 2, cached=False))
        yield client


def at_once(client: Client, clients: int, requests: int, steps: int, cached: bool) -> dict[str, Any]:
    """Each of `clients` asks again as soon as it is answered. Pictures by their request's number."""
    before = client.metric("wavespeed_batch_images_count")
    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda number: client.ask(body(number, steps, cached)), range(requests)))
        seconds = time.perf_counter() - started
    batches = client.metric("wavespeed_batch_images_count") - before
    return {
        "images_per_second": requests / seconds,
        "images_per_batch": requests / batches,
        "pictures": [picture(answer) for answer in answers],
    }


def tolerance(steps: int, cached: bool, together: int, threads: int) -> int:
    """Levels of 255 that the size of a batch changes in diffusers' own pipeline, with nothing of ours, doubled."""
    import torch

    from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
    from models.limits import fit
    from models.loading import quiet
    from models.registry import Registry

    torch.set_num_threads(threads)
    model: Any = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get("tiny-sd")
    prompts = [body(number, steps, cached)["prompt"] for number in range(together)]

    def drawn(numbers: list[int]) -> np.ndarray:
        with quiet():
            pipeline = model.pipeline
            pipeline.set_progress_bar_config(disable=True)
            made = pipeline(
                [prompts[number] for number in numbers],
                num_inference_steps=steps,
                guidance_scale=model.spec.guidance_scale,
                width=128,
                height=128,
                generator=[torch.Generator("cpu").manual_seed(number) for number in numbers],
            ).images
        return np.stack([np.asarray(fit(image, 512, 512)) for image in made]).astype(int)

    alone = np.concatenate([drawn([number]) for number in range(together)])
    return max(2, 2 * int(np.abs(drawn(list(range(together))) - alone).max()))


def main(
    clients: Annotated[int, typer.Option(min=1)] = 8,
    requests: Annotated[int, typer.Option(min=1)] = 32,
    together: Annotated[int, typer.Option(min=1, help="LD_MAX_BATCH_SIZE of the batching server.")] = 4,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    rows: dict[str, dict[str, Any]] = {}
    with serving(1, threads) as one_by_one, serving(together, threads) as batching:
        for cached in (False, True):
            for name, client in (("one by one", one_by_one), ("together", batching)):
                rows[f"{name}{', DeepCache' if cached else ''}"] = at_once(client, clients, requests, steps, cached)
    allowed = tolerance(steps, False, together, threads)
    for cached in ("", ", DeepCache"):
        pairs = zip(rows[f"one by one{cached}"].pop("pictures"), rows[f"together{cached}"].pop("pictures"), strict=True)
        rows[f"together{cached}"]["levels_from_alone"] = max(int(np.abs(one - other).max()) for one, other in pairs)
    for name, row in rows.items():
        print(f"{name:24}", {key: round(value, 3) for key, value in row.items()})
    speed = {name: row["images_per_second"] for name, row in rows.items()}
    batched = speed["together"] / speed["one by one"]
    caching = speed["one by one, DeepCache"] / speed["one by one"]
    both = speed["together, DeepCache"] / speed["one by one"]
    summary = {
        "commit": commit(),
        "clients": clients,
        "together": together,
        "steps": steps,
        "threads": threads,
        "batching": round(batched, 3),
        "deepcache": round(caching, 3),
        "both": round(both, 3),
        "both_over_product": round(both / (batched * caching), 3),
        "levels_allowed": allowed,
        "levels": [rows[f"together{cached}"]["levels_from_alone"] for cached in ("", ", DeepCache")],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    typer.run(main)
