"""What the service adds to one request: `POST /api/generate` beside the bare call of diffusers' own pipeline.

Both are timed in turns in one run, each time of another prompt and seed, the service first in every second pair. Of a
request's time are subtracted the bare call, with the resampling to the request's size, and the encoding of the picture,
both timed in this process, with as many threads and with the model warm on both sides. Prints what is left, and where
it lies; last, one JSON line.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import httpx
import numpy as np
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.engine.runner import share_cores
from benchmarks.report import Claim, judged, machine
from benchmarks.server import running

HOURS = ("at dawn", "at noon", "at sunset", "at twilight")
PLACES = ("forest", "mountains", "desert", "sea")
WEATHERS = ("clear", "misty", "snowy", "stormy")
PROMPTS = tuple(f"a {weather} {place} {hour}" for hour, place, weather in itertools.product(HOURS, PLACES, WEATHERS))
MOST = 10.0  # milliseconds that the service may add
WARM_UP = 2  # pairs that do not count
STAGES = ("text_seconds", "denoise_seconds", "decode_seconds")

Fields = Mapping[str, Any]
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


def bare(threads: int) -> Callable[[Sequence[Fields]], list[Image.Image]]:
    """Draws requests that differ in prompts and seeds alone in one call of tiny-sd's pipeline, with nothing of ours.

    Resampled to their size, as the service does. To be called before torch is imported.
    """
    share_cores()  # as the service's worker does
    import torch

    from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
    from models.libraries import quiet
    from models.limits import fit, render_size
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
        with quiet():
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
) -> list[Pair]:
    """Of each request, but for the first `WARM_UP`."""
    made = []
    for number, one in enumerate(asked):
        calls: list[Callable[[], Any]] = [lambda one=one: draw([one])[0], lambda one=one: ask(client, one)]
        order = (1, 0) if number % 2 else (0, 1)
        found = {which: timed(calls[which]) for which in order}
        (call, drawn), (sent, body) = found[0], found[1]
        answer = json.loads(body)
        theirs = picture(answer)
        encoding, _ = timed(lambda drawn=drawn, text=theirs.info: encoded(drawn, text))
        stages = sum(answer["timings"][stage] for stage in STAGES)
        same = np.array_equal(np.asarray(theirs), np.asarray(drawn))
        made.append(Pair(*(1000 * seconds for seconds in (sent, call, encoding, stages)), same))
    return made[WARM_UP:]


def encoded(drawn: Image.Image, text: Fields) -> bytes:
    """As PNG, with text chunks as long as the service's."""
    chunks, buffer = PngInfo(), io.BytesIO()
    for key, value in text.items():
        chunks.add_text(key, str(value))
    drawn.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def timed(call: Callable[[], _T]) -> tuple[float, _T]:
    """Seconds, and what it returned."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def figures(measured: Sequence[Pair]) -> dict[str, Any]:
    """Milliseconds. `added_p50` is the median request less the median call and the median encoding.

    Beside it the median of the pairs' own differences, with its quartiles, and that of its two parts.
    """
    names = ("request", "call", "encoding", "around", "drawing")
    median = {name: statistics.median(getattr(pair, name) for pair in measured) for name in names}
    lower, middle, upper = statistics.quantiles((pair.added for pair in measured), n=4, method="inclusive")
    return {
        **{f"{name}_p50": median[name] for name in names[:3]},
        "added_p50": median["request"] - median["call"] - median["encoding"],
        "paired": {"p25": lower, "p50": middle, "p75": upper},
        "around": median["around"],
        "drawing": median["drawing"],
        "same_pictures": sum(pair.same for pair in measured),
        "pairs": len(measured),
    }


def claims(found: Fields) -> list[Claim]:
    paired, same, number = found["paired"], found["same_pictures"], found["pairs"]
    of = "{request_p50:.1f} ms less {call_p50:.1f} and, encoding, {encoding_p50:.1f}".format(**found)
    spread = "{p50:.1f} ms (quartiles {p25:.1f} to {p75:.1f})".format(**paired)
    most = f"added, p50 of the pairs' request less call less encoding, at most {MOST:g} ms"
    return [
        Claim("both draw the same picture, byte for byte", f"{same} of {number}", same == number),
        Claim(most, spread, paired["p50"] <= MOST),
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
    draw, asked = bare(threads), [request(number, steps, size) for number in range(requests + WARM_UP)]
    settings = {"WAVESPEED_DEVICE": "cpu", "WAVESPEED_THREADS": str(threads)}
    with running(**settings) as server, server.client() as client:
        found = figures(pairs(client, draw, asked))
    print(f"tiny-sd {size}×{size}, {steps} steps; {requests} pairs of a request and the bare call, in turns.\n")
    print("\n".join(judged(claims(found))))
    rounded = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 2))
    print(json.dumps({"benchmark": "cost", **machine(), "size": size, "steps": steps, **rounded}))


if __name__ == "__main__":
    typer.run(main)
