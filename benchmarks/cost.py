"""What the service adds to one request: `POST /api/generate` beside the bare call of the same model.

Both are timed in turns in one run, each time of another prompt and seed, the service first in every second pair. Of a
request's time are subtracted the bare call and the encoding of its picture, both timed in this process, with as many
threads and with the model warm in both. Prints what is left, and where it lies; last, one JSON line.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from app import images
from app.engine.base import Job
from app.engine.report import summarise_passes
from benchmarks.claim import Claim, table
from benchmarks.machine import machine
from benchmarks.server import running
from cache import NoCache
from models.base import Generation, GenerationParams

PROMPTS = tuple(
    f"a {weather} {place} {hour}"
    for hour, place, weather in itertools.product(
        ("at dawn", "at noon", "at sunset", "at twilight"),
        ("forest", "mountains", "desert", "sea"),
        ("clear", "misty", "snowy", "stormy"),
    )
)
MOST = 10.0  # milliseconds that the service may add
WARM_UP = 2  # pairs that do not count
STAGES = ("text_seconds", "denoise_seconds", "decode_seconds")

Draw = Callable[[GenerationParams], Generation]


@dataclass(frozen=True, slots=True)
class Pair:
    """One request and the bare call for it, in milliseconds.

    request: from sending it to the last byte of the answer. call: of the model, in this process. encoding: of that
    picture, here. drawing: what the service adds within the model's own stages (text, denoising, decoding), by the
    times that both sides tell of them: cores and caches that are shared. same: the two pictures, byte for byte.
    """

    request: float
    call: float
    encoding: float
    drawing: float
    same: bool

    @property
    def added(self) -> float:
        """By the service, encoding apart."""
        return self.request - self.call - self.encoding

    @property
    def around(self) -> float:
        """What it adds before and after drawing: HTTP, checks, queue, pipes, the answer."""
        return self.added - self.drawing


def pairs(client: httpx.Client, draw: Draw, params: Sequence[GenerationParams]) -> list[Pair]:
    """Of each one of `params`, but for the first `WARM_UP`. Raises httpx.HTTPStatusError."""
    made = []
    for number, one in enumerate(params):
        if number % 2:
            (request, answer), (call, drawn) = timed(lambda one=one: ask(client, one)), timed(lambda one=one: draw(one))
        else:
            (call, drawn), (request, answer) = timed(lambda one=one: draw(one)), timed(lambda one=one: ask(client, one))
        job = Job(id="bare", model="bare", params=one, strategy=NoCache())  # for what a PNG says of itself
        text = images.metadata(job, one.seeds[0], summarise_passes(drawn.passes))
        encoding, _ = timed(lambda drawn=drawn, text=text: images.encode(drawn.images[0], "png", text))
        body = json.loads(answer)
        theirs = images.read_picture(body["image"], field="image", max_pixels=one.width * one.height)
        drawing = sum(body["timings"][stage] - getattr(drawn.timings, stage) for stage in STAGES)
        made.append(
            Pair(
                request=1000 * request,
                call=1000 * call,
                encoding=1000 * encoding,
                drawing=1000 * drawing,
                same=np.array_equal(np.asarray(theirs), np.asarray(drawn.images[0])),
            )
        )
    return made[WARM_UP:]


def ask(client: httpx.Client, params: GenerationParams) -> bytes:
    """The answer's body, not read yet: what a client makes of it is its own time."""
    fields = {name: getattr(params, name) for name in ("prompt", "width", "height", "steps", "guidance_scale")}
    response = client.post("/api/generate", json={**fields, "seed": params.seeds[0]})
    response.raise_for_status()
    return response.content


def timed[T](call: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what it returned."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def figures(measured: Sequence[Pair]) -> dict[str, Any]:
    """Milliseconds. `added_p50` is the median request less the median call and the median encoding.

    Beside it the median of the pairs' own differences, with its quartiles, and that of its two parts.
    """

    def median(name: str) -> float:
        return statistics.median(getattr(pair, name) for pair in measured)

    p50 = {name: median(name) for name in ("request", "call", "encoding")}
    lower, middle, upper = statistics.quantiles((pair.added for pair in measured), n=4, method="inclusive")
    return {
        **{f"{name}_p50": value for name, value in p50.items()},
        "added_p50": p50["request"] - p50["call"] - p50["encoding"],
        "paired": {"p25": lower, "p50": middle, "p75": upper},
        "around": median("around"),
        "drawing": median("drawing"),
        "same_pictures": sum(pair.same for pair in measured),
        "pairs": len(measured),
    }


def claims(found: dict[str, Any]) -> list[Claim]:
    paired = found["paired"]
    of = f"{found['request_p50']:.1f} ms less {found['call_p50']:.1f} and, encoding, {found['encoding_p50']:.1f}"
    spread = f"{paired['p50']:.1f} ms (quartiles {paired['p25']:.1f} to {paired['p75']:.1f})"
    same, number = found["same_pictures"], found["pairs"]
    return [
        Claim("both draw the same picture, byte for byte", f"{same} of {number}", same == number),
        Claim(
            f"p50 of the request less p50 of the call and of encoding, at most {MOST:g} ms",
            f"{found['added_p50']:.1f} ms: {of}",
            found["added_p50"] <= MOST,
        ),
        Claim(f"the same pair by pair, at most {MOST:g} ms", spread, paired["p50"] <= MOST),
        Claim("of it around the drawing: HTTP, checks, queue, pipes, the answer", f"{found['around']:.1f} ms"),
        Claim("of it within text, denoising and decoding: shared cores and caches", f"{found['drawing']:.1f} ms"),
    ]


def main(
    requests: Annotated[int, typer.Option(min=2)] = 30,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    size: Annotated[int, typer.Option(min=64, help="Pixels a side; tiny-sd draws at 128 and resamples.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Of the model, in the service and here.")] = 1,
) -> None:
    import torch

    from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
    from models.registry import Registry

    torch.set_num_threads(threads)
    model = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(DEFAULT)
    params = [
        GenerationParams(
            prompt=PROMPTS[seed % len(PROMPTS)],
            width=size,
            height=size,
            steps=steps,
            guidance_scale=model.spec.guidance_scale,
            seeds=(seed,),
        )
        for seed in range(requests + WARM_UP)
    ]
    with (
        running(WAVESPEED_DEVICE="cpu", WAVESPEED_THREADS=str(threads)) as server,
        httpx.Client(base_url="http://{}:{}".format(*server.address), timeout=600) as client,
    ):
        found = figures(pairs(client, lambda one: model.generate(one, NoCache(), lambda step: None), params))
    print(f"{DEFAULT} {size}×{size}, {steps} steps; {requests} pairs of a request and the bare call, in turns.\n")
    print("\n".join(table(claims(found))))
    print(json.dumps({"benchmark": "cost", **machine("cpu"), "size": size, "steps": steps, **_rounded(found)}))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
