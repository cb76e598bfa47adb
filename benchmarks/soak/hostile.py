"""Bad input, one row each: what is sent and what must be answered. Most of it is bad; some is odd and must work."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from benchmarks.soak.wire import Answer, Part, chunks, request

BODY_LIMIT = 2**20
"""Bytes; the servers that these rows are sent to are configured with it."""
BODY_SECONDS = 2.0
"""Likewise: the time that a body may take."""

GOOD = '"prompt": "a", "width": 64, "height": 64, "steps": 2, "seed": 1'


@dataclass(frozen=True, slots=True)
class Row:
    """`status`: the answers that are right; None among them: a connection closed without one. `type`: of the error."""

    name: str
    parts: Callable[[], Iterable[Part]]
    status: tuple[int | None, ...]
    type: tuple[str, ...] | None = None
    leave: bool = False

    def accepts(self, answer: Answer | None) -> bool:
        """Is this how it should be answered?"""
        if (answer.status if answer else None) not in self.status:
            return False
        return answer is None or self.type is None or answer.type in self.type


def fields(name: str, members: str, status: int = 422, kind: str | None = "invalid") -> Row:
    """A good request but for `members`, JSON text."""
    given = {member.split('"')[1] for member in members.split(", ") if member.startswith('"')}
    rest = [member for member in GOOD.split(", ") if member.split('"')[1] not in given]
    text = "{" + ", ".join([*rest, members] if members else rest) + "}"
    return Row(name, lambda: [request(text)], (status,), (kind,) if kind and status != 200 else None)


def whole(name: str, data: bytes, status: int, kind: str | None = None) -> Row:
    return Row(name, lambda: [data], (status,), (kind,) if kind else None)


def rows() -> list[Row]:
    return [*numbers(), *strings(), *bodies(), *pictures(), *names()]


def numbers() -> Iterator[Row]:
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
        for field in ("guidance_scale", "width", "seed"):
            yield fields(f"{field} {value}", f'"{field}": {value}')
    yield fields("guidance_scale -0.0", '"guidance_scale": -0.0', 200)
    for field, value in (
        ("width", "true"), ("seed", "9223372036854775808"), ("seed", "-2"), ("seed", "4294967296"), ("width", "0"),
        ("width", "7"), ("width", "513"), ("width", "1000000000"), ("steps", "0"), ("steps", "1000000"),
        ("num_images", "0"), ("num_images", "11"), ("deepcache_interval", "0"), ("deepcache_depth", "13"),
        ("fbcache_threshold", "-1"), ("fbcache_threshold", "2"), ("seed", "1" * 5000),
    ):  # fmt: skip
        yield fields(f"{field} {value[:20]}", f'"{field}": {value}')
    yield fields("start > end", '"deepcache_start_step": 801, "deepcache_end_step": 800')


def strings() -> Iterator[Row]:
    yield fields("empty prompt", '"prompt": ""', 200)
    yield fields("prompt of 900 kB", f'"prompt": "{"x" * 900_000}"')
    yield fields("NUL", r'"prompt": "a\u0000b"')
    yield fields("lone surrogate", r'"prompt": "\ud800"')
    yield fields("lone surrogate in a key", r'"\udfff": 1')
    for name, prompt in (
        ("right-to-left", "\u202eevil\u202c שלום"), ("emoji", "👩\u200d🚀 😀"),
        ("newlines", "a\nSteps: 1, Seed: 2\r\ncache strategy=x hit_rate=1"), ("ANSI", "\x1b[2J\x07"),
    ):  # fmt: skip
        yield fields(name, f'"prompt": {json.dumps(prompt)}', 200)
    yield fields("LoRA in the prompt", '"prompt": "a <lora:../../x:1>"', 200)
    yield fields("newline in a key", r'"a\ncache strategy=x": 1')


def bodies() -> Iterator[Row]:
    good, bomb = "{" + GOOD + "}", gzip.compress(bytes(2**26))
    for name, data in (
        ("no content type", request(good, content_type="")),
        ("text/plain", request(good, content_type="text/plain")),
        ("a form", request("prompt=a", content_type="application/x-www-form-urlencoded")),
        ("empty", request("")),
        ("key given twice", request('{"prompt": "a", "prompt": "b"}')),
        ("nested 100 000 deep", request("[" * 100_000)),
        ("objects nested 50 000 deep", request('{"a":' * 50_000)),
        ("truncated JSON", request(good[:-1])),
        ("not UTF-8", request(b'{"prompt": "\xff"}')),
        ("an array", request("[1]")),
        ("gzip bomb", request(bomb, content_encoding="gzip")),
        ("gzip without saying so", request(bomb)),
    ):
        yield whole(name, data, 422, "invalid")
    head = request("", transfer_encoding="chunked")
    yield Row("chunked", lambda: [head, *chunks(good.encode())], (200,))
    long = json.dumps({"prompt": "x" * (BODY_LIMIT + 10)}).encode()
    yield Row("chunked past the limit", lambda: [head, *chunks(long)], (413,), ("body_too_large",))
    yield whole("past the limit", request(long), 413, "body_too_large")
    yield Row("chunk size no number", lambda: [head, b"zz\r\nhello\r\n"], (400, 408, None))
    yield whole("length of a terabyte", request(good, length=10**12), 413, "body_too_large")
    yield whole("length of 30 digits", request(good, length="9" * 30), 400)
    yield whole("length too short", request(good, length=10), 422, "invalid")
    yield whole("length negative", request(good, length=-1), 400)
    yield whole("two lengths", request(good, content_length="3"), 400)
    both = [request("", transfer_encoding="chunked", content_length="3"), *chunks(good.encode())]
    yield Row("length and chunked", lambda: both, (200, 400))  # RFC 9112, section 6.3: chunked counts, or refused
    yield whole("length too long, then silence", request(good, length=9999), 408, "body_timeout")
    drops = [request(good, length=1000)[:-30], *([0.3, b" "] * 40)]
    yield Row("a byte now and then", lambda: drops, (408,), ("body_timeout",))
    yield Row("left in the body", lambda: [request(good, length=9999)], (None,), leave=True)
    yield Row("left in the headers", lambda: [request(good)[:40]], (None,), leave=True)
    yield Row("left at once", list, (None,), leave=True)
    yield Row("not HTTP", lambda: [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"], (400, None))
    yield Row("a header without end", lambda: [b"GET / HTTP/1.1\r\nX: ", *([b"x" * 8192] * 40)], (400, None))
    yield whole("a name of a stranger's", request(good, host="evil.example"), 421, "misdirected")
    for method in ("GET", "PUT", "TRACE", "CONNECT"):
        yield whole(method, request("", method=method), 405, "method_not_allowed")


def pictures() -> Iterator[Row]:
    small, noise = Image.new("RGB", (16, 16)), Image.effect_noise((64, 64), 90)
    frames = [noise.convert("RGB").resize((16, 16))]
    files = ("/etc/passwd", "../../x.png", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data/", "%%%", "")
    bad: dict[str, bytes | str] = {
        **{text or "empty": text for text in files},
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "FITS": b"SIMPLE  =                    T".ljust(2880),
        **{kind: _saved(small, kind) for kind in ("TIFF", "GIF", "BMP")},
        **{f"truncated {kind}": _saved(noise, kind)[:-500] for kind in ("PNG", "JPEG", "WEBP")},
        "animated": _saved(small, "PNG", save_all=True, append_images=frames),
        "1 pixel": _saved(small.resize((1, 1)), "PNG"),
        "50 000²": png(50_000, 50_000),
        "10 000²": png(10_000, 10_000),
        "bomb in a text chunk": png(4, 4, _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24)))),
    }
    for name, data in bad.items():
        text = data if isinstance(data, str) else base64.b64encode(data).decode()
        members = f'"img2img_enabled": true, "img2img_image": {json.dumps(text)}'
        yield fields(f"picture {name}", members, *((413, "picture_too_large") if "²" in name else (422, "invalid")))


def odd_pictures() -> dict[str, str]:
    """Those that must be read: base64 by name."""
    small = Image.new("RGB", (96, 64), "red")
    data = {
        "CMYK": _saved(small.convert("CMYK"), "JPEG"),
        "16 bit": _saved(small.convert("I;16"), "PNG"),
        "alpha": _saved(small.convert("RGBA"), "PNG"),
        "broken EXIF": _saved(small, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    }
    texts = {name: base64.b64encode(picture).decode() for name, picture in data.items()}
    texts["white space in base64"] = base64.encodebytes(data["CMYK"]).decode()
    return texts


def names() -> Iterator[Row]:
    for name in ("..", "../tiny-sd", "/etc/passwd", "%2e%2e", "a\\b", "x.ckpt", "x.pt", "owner/repository"):
        yield fields(f"model {name}", f'"model": {json.dumps(name)}', 404, "unknown_model")
    adapters = (
        "..",
        "../outside",
        "/etc/passwd",
        "%2e%2e",
        "a\\b",
        "pickle.ckpt",
        "pickle",
        "link",
        "owner/repository",
    )
    for name in adapters:
        yield fields(f"LoRA {name}", f'"loras": {json.dumps([{"name": name}])}')
    paths = ("/docs/%2e%2e/core.py", "/docs/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "/api/models/..", "/%00")
    for path in (*paths, "/api/jobs/%2e%2e", "/api/jobs/..%2f..%2fetc%2fpasswd"):
        yield Row(f"path {path}", lambda path=path: [request("", method="GET", path=path)], (404, 405))  # type: ignore[misc]


def png(width: int, height: int, *before: bytes) -> bytes:
    """A header that promises so many pixels, and one byte of them."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    end = _chunk(b"IDAT", zlib.compress(b"\0")) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + end


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
