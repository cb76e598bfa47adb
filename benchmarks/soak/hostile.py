"""Bad input, one row each: what is sent and what must be answered. Most of it is bad; some is odd and must work.

Of wrong values and pictures there are a few; tests/e2e/test_bad_input.py sends these and the tables of tests/app.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks import server
from benchmarks.soak.wire import Answer, Part, chunked, request

BODY_LIMIT = 2**20  # bytes; the servers that these rows are sent to are configured so
BODY_SECONDS = 2.0  # that a body may take
SETTINGS = {
    "WAVESPEED_DEVICE": "cpu",
    "WAVESPEED_MAX_BODY_BYTES": str(BODY_LIMIT),
    "WAVESPEED_BODY_SECONDS": str(BODY_SECONDS),
}
GOOD = {"prompt": "a", "width": 64, "height": 64, "steps": 2, "seed": 1}


@dataclass(frozen=True, slots=True)
class Row:
    """`status`: the answers that are right; None among them: a connection closed without one. `type`: of the error."""

    name: str
    parts: Sequence[Part]
    status: tuple[int | None, ...]
    type: str | None = None
    leave: bool = False

    def accepts(self, answer: Answer | None) -> bool:
        """Is this how it should be answered?"""
        if (answer.status if answer else None) not in self.status:
            return False
        return answer is None or self.type is None or answer.type == self.type


def fields(name: str, members: str, status: int = 422, kind: str | None = "invalid") -> Row:
    """A good request but for `members`, JSON text."""
    rest = [f'"{key}": {json.dumps(value)}' for key, value in GOOD.items() if f'"{key}"' not in members]
    return Row(name, [request("{" + ", ".join([*rest, members]) + "}")], (status,), None if status == 200 else kind)


def rows() -> list[Row]:
    return [*values(), *bodies(), *(picture(*one) for one in pictures().items()), *paths()]


REFUSED = r"""
"guidance_scale": NaN
"\udfff": 1
"a\ncache strategy=x": 1
"deepcache_start_step": 801, "deepcache_end_step": 800
"""
TAKEN = r"""
"guidance_scale": -0.0
"prompt": ""
"prompt": "\u202eevil\u202c שלום"
"prompt": "👩‍🚀 😀"
"prompt": "a\nSteps: 1, Seed: 2\r\ncache strategy=x hit_rate=1"
"prompt": "\u001b[2J\u0007"
"prompt": "a <lora:../../x:1>"
"""
MODELS = ("..", "../tiny-sd", "/etc/passwd", "%2e%2e", "a\\b", "x.ckpt", "x.pt", "owner/repository")


def values() -> Iterator[Row]:
    """A line of these is a request's members, and its row's name."""
    yield from (fields(line, line) for line in REFUSED.split("\n") if line)
    yield from (fields(line, line, 200) for line in TAKEN.split("\n") if line)
    yield fields("a number of 5 000 digits", f'"seed": {"1" * 5000}')
    yield fields("prompt of 900 kB", f'"prompt": "{"x" * 900_000}"')
    for name in MODELS:
        yield fields(f"model {name}", f'"model": {json.dumps(name)}', 404, "unknown_model")


def bodies() -> Iterator[Row]:
    text = json.dumps(GOOD)
    good, bomb = text.encode(), gzip.compress(bytes(2**26))
    for name, data in {
        "no content type": request(good, content_type=""),
        "text/plain": request(good, content_type="text/plain"),
        "a form": request("prompt=a", content_type="application/x-www-form-urlencoded"),
        "empty": request(""),
        "key given twice": request('{"prompt": "a", "prompt": "b"}'),
        "nested 100 000 deep": request("[" * 100_000),
        "objects nested 50 000 deep": request('{"a":' * 50_000),
        "truncated JSON": request(good[:-1]),
        "not UTF-8": request(b'{"prompt": "\xff"}'),
        "an array": request("[1]"),
        "gzip bomb": request(bomb, content_encoding="gzip"),
        "gzip without saying so": request(bomb),
        "length too short": request(good, length=10),
    }.items():
        yield Row(name, [data], (422,), "invalid")
    long = json.dumps({"prompt": "x" * (BODY_LIMIT + 10)}).encode()
    for name, sent in {
        "chunked past the limit": chunked(long),
        "past the limit": [request(long)],
        "length of a terabyte": [request(good, length=10**12)],
    }.items():
        yield Row(name, sent, (413,), "body_too_large")
    for name, data in {
        "length of 30 digits": request(good, length="9" * 30),
        "length negative": request(good, length=-1),
        "two lengths": request(good, content_length="3"),
    }.items():
        yield Row(name, [data], (400,))
    yield Row("chunked", chunked(good), (200,))
    # RFC 9112, section 6.3: chunked counts, or refused
    yield Row("length and chunked", chunked(good, content_length="3"), (200, 400))
    yield Row("chunk size no number", [*chunked(b"")[:1], b"zz\r\nhello\r\n"], (400, 408, None))
    yield Row("length too long, then silence", [request(good, length=9999)], (408,), "body_timeout")
    drops = [request(good, length=1000)[:-30], *([0.3, b" "] * 40)]
    yield Row("a byte now and then", drops, (408,), "body_timeout")
    yield Row("left in the body", [request(good, length=9999)], (None,), leave=True)
    yield Row("left in the headers", [request(good)[:40]], (None,), leave=True)
    yield Row("left at once", [], (None,), leave=True)
    yield Row("not HTTP", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"], (400, None))
    yield Row("a header without end", [b"GET / HTTP/1.1\r\nX: ", *([b"x" * 8192] * 40)], (400, None))
    yield Row("a name of a stranger's", [request(good, host="evil.example")], (421,), "misdirected")
    for method in ("GET", "PUT", "TRACE", "CONNECT"):
        yield Row(method, [request("", method=method)], (405,), "method_not_allowed")


def paths() -> Iterator[Row]:
    up = ("/docs/%2e%2e/core.py", "/docs/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "/api/models/..", "/%00")
    for path in (*up, "/api/jobs/%2e%2e", "/api/jobs/..%2f..%2fetc%2fpasswd"):
        yield Row(f"path {path}", [request("", method="GET", path=path)], (404, 405))


def pictures() -> dict[str, bytes | str]:
    """Uploads that must not be read, by name: bytes, or what stands in place of their base64."""
    files = ("/etc/passwd", "../../x.png", "http://169.254.169.254/latest/meta-data/", "%%%", "")
    return {
        **{text or "empty": text for text in files},
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "GIF": _saved(Image.new("RGB", (16, 16)), "GIF"),
        "truncated JPEG": _saved(Image.effect_noise((64, 64), 90), "JPEG")[:-500],
        "1 pixel": _saved(Image.new("RGB", (1, 1)), "PNG"),
        "10 000²": _saved(Image.new("1", (10_000, 10_000)), "PNG"),
    }


def picture(name: str, data: bytes | str) -> Row:
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    members = f'"img2img_enabled": true, "img2img_image": {json.dumps(text)}'
    return fields(f"picture {name}", members, *((413, "picture_too_large") if "²" in name else (422, "invalid")))


def odd_picture() -> str:
    """One that must be read, in base64 with white space. Other odd ones: tests/app/test_pictures.py."""
    return base64.encodebytes(_saved(Image.new("CMYK", (96, 64), (0, 255, 255, 0)), "JPEG")).decode()


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def running(
    command: Sequence[str] = server.SERVE, prepare: Callable[[Path], None] | None = None, **settings: str
) -> AbstractContextManager[server.Server]:
    """As `benchmarks.server.running`, with bodies bounded low."""
    return server.running(command, prepare, **(SETTINGS | settings))
