"""What the service adds to one request: `POST /api/generate` beside the bare call of diffusers' own pipeline.

Both are timed in turns in one run, each time of another prompt and seed, the service first in every second pair. Of a
request's time are subtracted the bare call, with the resampling to the request's size, and the encoding of the picture,
both timed in this process, with as many threads and with the model warm on both sides. Prints what is left, and where
it lies; last, one JSON line.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import httpx
import numpy as np
import typer
from PIL.Image import Image

from app import images
from app.engine.runner import share_cores
from app.engine.types import Job
from benchmarks.claim import Claim, table
from benchmarks.machine import machine
from benchmarks.server import running
from cache import NoCache
from models.base import GenerationParams

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

Draw = Callable[[GenerationParams], Image]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Pair:
    """One request and the bare call for it, in milliseconds.

    request: from sending it to the last byte of the answer. call: of the pipeline, in this process. encoding: of that
    picture, here. stages: what the answer says of text, denoising and decoding. same: the two pictures, byte for byte.
    """

    request: float
    call: float
    encoding: float
    stages: float
    same: bool

    @property
    def added(self) -> float:
        """By the service, encoding apart."""
        return self.request - self.call - self.encoding

    @property
    def around(self) -> float:
        """What it adds before and after drawing: HTTP, checks, queue, pipes, the answer."""
        return self.request - self.stages - self.encoding

    @property
    def drawing(self) -> float:
        """What it adds while it draws: reports of steps, cores and caches that are shared."""
        return self.stages - self.call


def pairs(client: httpx.Client, draw: Draw, params: Sequence[GenerationParams]) -> list[Pair]:
    """Of each one of `params`, but for the first `WARM_UP`. Raises httpx.HTTPStatusError."""
    made = []
    for number, one in enumerate(params):
        if number % 2:
            (request, answer), (call, drawn) = timed(lambda one=one: ask(client, one)), timed(lambda one=one: draw(one))
        else:
            (call, drawn), (request, answer) = timed(lambda one=one: draw(one)), timed(lambda one=one: ask(client, one))
        job = Job(id="bare", model="bare", params=one, strategy=NoCache())  # for what a PNG says of itself
        text = images.metadata(job, one.seeds[0], {})
        encoding, _ = timed(lambda drawn=drawn, text=text: images.encode(drawn, "png", text))
        body = json.loads(answer)
        theirs = images.read_picture(body["image"], field="image", max_pixels=one.width * one.height)
        made.append(
            Pair(
                request=1000 * request,
                call=1000 * call,
                encoding=1000 * encoding,
                stages=1000 * sum(body["timings"][stage] for stage in STAGES),
                same=np.array_equal(np.asarray(theirs), np.asarray(drawn)),
            )
        )
    return made[WARM_UP:]


def ask(client: httpx.Client, params: GenerationParams) -> bytes:
    """The answer's body, not read yet: what a client makes of it is its own time."""
    fields = {name: getattr(params, name) for name in ("prompt", "width", "height", "steps", "guidance_scale")}
    response = client.post("/api/generate", json={**fields, "seed": params.seeds[0]})
    response.raise_for_status()
    return response.content


def timed(call: Callable[[], _T]) -> tuple[float, _T]:
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
            f"added, p50 of the pairs' request less call less encoding, at most {MOST:g} ms",
            spread,
            paired["p50"] <= MOST,
        ),
        Claim("of it around the drawing: HTTP, checks, queue, pipes, the answer", f"{found['around']:.1f} ms"),
        Claim("of it while drawing: reports of steps, shared cores and caches", f"{found['drawing']:.1f} ms"),
        # No verdict: on a machine that others use too, the three medians are of different moments.
        Claim("p50 of all requests less those of all calls and encodings", f"{found['added_p50']:.1f} ms: {of}"),
    ]


def main(
    requests: Annotated[int, typer.Option(min=2)] = 30,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    size: Annotated[int, typer.Option(min=64, help="Pixels a side; tiny-sd draws at 128 and resamples.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Of the model, in the service and here.")] = 1,
) -> None:
    share_cores()  # as the service's worker does
    import torch

    from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
    from models.limits import fit, render_size
    from models.loading import quiet
    from models.registry import Registry

    torch.set_num_threads(threads)
    model: Any = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(DEFAULT)
    model.pipeline.set_progress_bar_config(disable=True)

    def draw(one: GenerationParams) -> Image:
        width, height = render_size(model.spec, one.width, one.height)
        with quiet():
            made = model.pipeline(
                one.prompt,
                num_inference_steps=one.steps,
                guidance_scale=one.guidance_scale,
                width=width,
                height=height,
                generator=torch.Generator("cpu").manual_seed(one.seeds[0]),
            )
        return fit(made.images[0], one.width, one.height)

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
        server.client() as client,
    ):
        found = figures(pairs(client, draw, params))
    print(f"{DEFAULT} {size}×{size}, {steps} steps; {requests} pairs of a request and the bare call, in turns.\n")
    print("\n".join(table(claims(found))))
    print(json.dumps({"benchmark": "cost", **machine("cpu"), "size": size, "steps": steps, **_rounded(found)}))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
