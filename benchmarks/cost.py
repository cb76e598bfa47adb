"""What the service adds to one request: `POST /api/generate` beside the bare call of diffusers' own pipeline.

Both are timed in turns in one run, each time of another prompt and seed, the service first in every second pair. Of a
request's time are subtracted the bare call, with the resampling to the request's size, and the encoding of the picture,
both timed in this process, with as many threads and with the model warm on both sides. Prints what is left, and where
it lies; last, one JSON line.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from PIL import Image

from app.engine.runner import share_cores
from app.images import encode
from benchmarks.report import Claim, judged, machine, show
from benchmarks.server import running
from benchmarks.serving.requests import PROMPTS

MOST = 10.0  # milliseconds that the service may add
WARM_UP = 2  # pairs that do not count
STAGES = ("text_seconds", "denoise_seconds", "decode_seconds")

Fields = Mapping[str, Any]


def parted(request: float, call: float, encoding: float, stages: float) -> dict[str, float]:
    """One request beside the bare call for it, in milliseconds.

    request: from sending it to the last byte of the answer. call: of the pipeline, in this process. encoding: of that
    picture, here. stages: what the answer says of text, denoising and decoding.
    """
    return {
        "request": request,
        "call": call,
        "encoding": encoding,
        "added": request - call - encoding,
        "around": request - stages - encoding,  # HTTP, checks, queue, pipes, the answer
        "drawing": stages - call,  # reports of steps, cores and caches that are shared
    }


def bare(threads: int) -> Callable[[Sequence[Fields]], list[Image.Image]]:
    """Draws requests that differ in prompts and seeds alone in one call of tiny-sd's pipeline, with nothing of ours.

    Enlarged to their size, as the service does. To be called before torch is imported.
    """
    share_cores()  # as the service's worker does
    import torch

    from models import fine
    from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
    from models.libraries import quiet
    from models.limits import fine_decoder, fit, render_size
    from models.registry import Registry

    torch.set_num_threads(threads)
    model: Any = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(DEFAULT)
    model.pipeline.set_progress_bar_config(disable=True)

    def draw(asked: Sequence[Fields]) -> list[Image.Image]:
        size = asked[0]["width"], asked[0]["height"]
        width, height = render_size(model.spec, *size)
        given = {"num_inference_steps": asked[0]["steps"], "guidance_scale": model.spec.guidance_scale}
        seeds = [torch.Generator("cpu").manual_seed(fields["seed"]) for fields in asked]
        prompts = [fields["prompt"] for fields in asked]
        folder = fine_decoder(model.spec, (width, height), *size)
        with quiet(), fine.decoding(model.pipeline.vae, folder, model.device):
            made = model.pipeline(prompts, generator=seeds, width=width, height=height, **given).images
        return [fit(image, *size) for image in made]

    return draw


def request(number: int, steps: int, size: int = 512) -> dict[str, Any]:
    """Its neighbours have other prompts, and each has a seed of its own."""
    sides = {"width": size, "height": size}
    return {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": steps, **sides}


def ask(client: httpx.Client, fields: Fields) -> bytes:
    """The answer's body, not read yet: what a client makes of it is its own time. Raises httpx.HTTPStatusError."""
    return client.post("/api/generate", json=fields).raise_for_status().content


def picture(answer: Fields) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["image"])))


def pairs(
    client: httpx.Client, draw: Callable[[Sequence[Fields]], list[Image.Image]], asked: Sequence[Fields]
) -> list[dict[str, Any]]:
    """Of each request, but for the first `WARM_UP`."""
    made = []
    for number, one in enumerate(asked):
        calls: list[Callable[[], Any]] = [lambda one=one: draw([one])[0], lambda one=one: ask(client, one)]
        order = (1, 0) if number % 2 else (0, 1)
        found = {which: timed(calls[which]) for which in order}
        (call, drawn), (sent, body) = found[0], found[1]
        answer = json.loads(body)
        theirs = picture(answer)
        encoding, _ = timed(lambda drawn=drawn, text=theirs.info: encode(drawn, "png", text))
        stages = sum(answer["timings"][stage] for stage in STAGES)
        same = np.array_equal(np.asarray(theirs), np.asarray(drawn))
        made.append(parted(*(1000 * seconds for seconds in (sent, call, encoding, stages))) | {"same": same})
    return made[WARM_UP:]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def figures(measured: Sequence[Fields]) -> dict[str, Any]:
    """Milliseconds, medians over the pairs; of what the service adds the quartiles, too."""
    names = ("request", "call", "encoding", "around", "drawing")
    return {
        **{name: statistics.median(pair[name] for pair in measured) for name in names},
        "added": statistics.quantiles((pair["added"] for pair in measured), n=4, method="inclusive"),
        "same_pictures": sum(pair["same"] for pair in measured),
        "pairs": len(measured),
    }


def claims(found: Fields) -> list[Claim]:
    same, number, (lower, added, upper) = found["same_pictures"], found["pairs"], found["added"]
    most = f"added, median of the pairs' request less call less encoding, at most {MOST:g} ms"
    spread = f"{added:.1f} ms (quartiles {lower:.1f} to {upper:.1f})"
    return [
        Claim("both draw the same picture, byte for byte", f"{same} of {number}", same == number),
        Claim(most, spread, added <= MOST),
        Claim("of it around the drawing: HTTP, checks, queue, pipes, the answer", f"{found['around']:.1f} ms"),
        Claim("of it while drawing: reports of steps, shared cores and caches", f"{found['drawing']:.1f} ms"),
    ]


def main(
    requests: Annotated[int, typer.Option(min=2)] = 30,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    size: Annotated[int, typer.Option(min=64, help="Pixels a side; tiny-sd draws at 128 and resamples.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Of the model, in the service and here.")] = 1,
) -> None:
    draw, asked = bare(threads), [request(number, steps, size) for number in range(requests + WARM_UP)]
    settings = {"WAVESPEED_DEVICE": "cpu", "WAVESPEED_THREADS": str(threads)}
    with running(**settings) as server, server.client() as client:
        found = figures(pairs(client, draw, asked))
    print(f"tiny-sd {size}×{size}, {steps} steps; {requests} pairs of a request and the bare call, in turns.\n")
    show(judged(claims(found)))
    print(json.dumps({"benchmark": "cost", **machine(), "threads": threads, "size": size, "steps": steps, **found}))


if __name__ == "__main__":
    typer.run(main)
