"""Pictures that clients send: each kind is read as it is meant or refused with a remedy, before it costs anything."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.errors import Invalid, PictureTooLarge
from app.images import read_picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def read(data: bytes | str, max_pixels: int = 2**20) -> Image.Image:
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    return read_picture(text, field="img2img_image", max_pixels=max_pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(left: Any = RED, right: Any = BLUE, mode: str = "RGB") -> Image.Image:
    """32 × 16 pixels, two colours side by side, each in whole JPEG blocks."""
    image = Image.new(mode, (32, 16), right)
    image.paste(left, (0, 0, 16, 16))
    return image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *before: bytes, depth: int = 8, rows: bytes = b"") -> bytes:
    """Written by hand: a truecolour PNG with `before` ahead of its data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows or (b"\0" + b"\xff\0\0" * width) * height))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + data + chunk(b"IEND", b"")


def webp_header(kind: bytes, width: int, height: int) -> bytes:
    """The first bytes of a WebP file that declares this size and has no picture."""
    match kind:
        case b"VP8X":
            body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        case b"VP8L":
            body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + bytes(10)
        case _:
            body = b"\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(10)
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read(kind: str) -> None:
    picture = read(encoded(halves(), kind, quality=95))
    assert (picture.mode, picture.size, picture.info) == ("RGB", (32, 16), {})
    for x, colour in ((8, RED), (24, BLUE)):
        assert np.allclose(picture.getpixel((x, 8)), colour, atol=4)  # lossy formats, quality 95
    assert type(picture) is Image.Image  # not bound to a file any more


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:image/PNG;charset=x;base64,", "data:image/jpeg;base64,"]
)
def test_a_data_url_is_read_and_its_bytes_decide(head: str) -> None:
    assert read(head + base64.b64encode(encoded(halves())).decode()).getpixel((0, 0)) == RED


@pytest.mark.parametrize("wrap", ["\n", "\r\n", " \t"])
def test_white_space_in_base64_is_allowed(wrap: str) -> None:
    text = base64.b64encode(encoded(halves())).decode()
    lines = wrap.join(text[at : at + 76] for at in range(0, len(text), 76))
    assert read(f"{wrap}{lines}{wrap}").getpixel((31, 0)) == BLUE


def test_one_pixel_is_a_picture() -> None:
    picture = read(encoded(Image.new("RGB", (1, 1), GREEN)))
    assert (picture.size, picture.getpixel((0, 0))) == ((1, 1), GREEN)


@pytest.mark.parametrize(
    ("image", "kind", "left", "right"),
    [
        (halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "JPEG", RED, BLUE),
        (halves(0, 255, "L"), "PNG", (0, 0, 0), WHITE),
        (halves(0, 1, "1"), "PNG", (0, 0, 0), WHITE),
        (Image.fromarray(np.repeat(np.uint16([[0x4000, 0xFF00]] * 16), 16, axis=1)), "PNG", (64, 64, 64), WHITE),
        (halves((*RED, 255), (*BLUE, 0), "RGBA"), "PNG", RED, WHITE),
        (halves((*RED, 255), (*BLUE, 128), "RGBA"), "PNG", RED, (127, 127, 255)),
        (halves((*RED, 255), (*BLUE, 0), "RGBA"), "WEBP", RED, WHITE),
        (halves((9, 255), (9, 0), "LA"), "PNG", (9, 9, 9), WHITE),
    ],
)  # fmt: skip
def test_other_modes_become_rgb(image: Image.Image, kind: str, left: Any, right: Any) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    picture = read(encoded(image, kind, **options))
    assert picture.mode == "RGB"
    assert np.allclose(picture.getpixel((8, 8)), left, atol=1)
    assert np.allclose(picture.getpixel((24, 8)), right, atol=1)


def test_a_palette_with_a_transparent_colour_shows_white() -> None:
    image = halves(0, 1, "P")
    image.putpalette([*RED, *BLUE])
    picture = read(encoded(image, transparency=1))
    assert (picture.getpixel((0, 0)), picture.getpixel((31, 0))) == (RED, WHITE)


def test_sixteen_bits_a_channel_keep_the_upper_eight() -> None:
    row = b"\0" + struct.pack(">HHH", 0x4080, 0xFF01, 0x0102) * 4
    assert read(png(4, 4, depth=16, rows=row * 4)).getpixel((2, 2)) == (0x40, 0xFF, 0x01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The oracle is the definition: where row 0 and column 0 lie (EXIF 2.32, tag 0x0112)."""
    top_left = {1: (0, 0), 2: (-1, 0), 3: (-1, -1), 4: (0, -1), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    image = Image.new("RGB", (32, 16), WHITE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read(encoded(image, exif=exif))
    assert picture.size == ((32, 16) if orientation < 5 else (16, 32))
    x, y = top_left[orientation]
    assert picture.getpixel((x % picture.width, y % picture.height)) == RED


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"\0" * 40]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_orients_nothing(exif: bytes, kind: str) -> None:
    picture = read(encoded(halves(), kind, exif=exif))
    assert (picture.size, picture.info) == ((32, 16), {})


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
REFUSED: dict[str, tuple[Callable[[], bytes | str], str]] = {
    "nothing": (lambda: "", "empty"),
    "white space": (lambda: " \n", "empty"),
    "a path": (lambda: "/etc/passwd.png", "nothing is fetched"),
    "a path that is base64": (lambda: "/etc/passwd/", "no picture"),
    "parent folders": (lambda: "../../secret", "nothing is fetched"),
    "a file address": (lambda: "file:///etc/passwd", "nothing is fetched"),
    "an address": (lambda: "http://169.254.169.254/latest/meta-data/", "nothing is fetched"),
    "no padding": (lambda: "aGk", "not base64"),
    "NUL": (lambda: "aGk=\0", "not base64"),
    "beyond ASCII": (lambda: "aGkœ", "not base64"),
    "a data URL of text": (lambda: "data:text/plain;base64,aGk=", "another kind"),
    "a data URL of SVG": (lambda: "data:image/svg+xml;base64," + base64.b64encode(SVG).decode(), "another kind"),
    "a data URL without base64": (lambda: "data:image/png,%89PNG", "another kind"),
    "a data URL without an end": (lambda: "data:image/png;base64", "another kind"),
    "SVG": (lambda: SVG, "no picture"),
    "FITS": (lambda: b"SIMPLE  =                    T".ljust(2880), "no picture"),
    "TIFF": (lambda: encoded(halves(), "TIFF"), "no picture"),
    "GIF": (lambda: encoded(halves(), "GIF"), "no picture"),
    "BMP": (lambda: encoded(halves(), "BMP"), "no picture"),
    "text": (lambda: b"hello", "no picture"),
    "PNG's signature alone": (lambda: b"\x89PNG\r\n\x1a\n", "no picture"),
    "truncated PNG": (lambda: encoded(Image.effect_noise((64, 64), 90))[:-1000], "damaged"),
    "truncated JPEG": (lambda: encoded(Image.effect_noise((64, 64), 90), "JPEG")[:-500], "damaged"),
    "truncated WebP": (lambda: encoded(Image.effect_noise((64, 64), 90), "WEBP")[:-500], "damaged"),
    "WebP header alone": (lambda: webp_header(b"VP8X", 64, 64), "damaged"),
    "no rows": (lambda: png(4, 4, rows=b"\0"), "damaged"),
    "zero pixels": (lambda: png(0, 4, rows=b"\0"), "picture"),
    "bomb in a text chunk": (lambda: png(4, 4, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24), 9))), "damaged"),
    "bomb in a profile": (lambda: png(4, 4, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**24), 9))), "damaged"),
    "animated PNG": (
        lambda: encoded(halves(), save_all=True, append_images=[halves(GREEN)], duration=100), "animated"),
    "animated WebP": (
        lambda: encoded(halves(), "WEBP", save_all=True, append_images=[halves(GREEN)], duration=100), "animated"),
    "many scans": (lambda: encoded(halves(), "JPEG", progressive=True) + b"\xff\xda" * 100, "scans"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(Invalid, match=words) as refused:
        read(make())
    assert refused.value.field == "img2img_image"
    assert refused.value.message.count(". ") <= 2


@pytest.mark.parametrize(
    "data",
    [
        png(50_000, 50_000, rows=b"\0"),
        png(10_000, 10_000, rows=b"\0"),
        png(1025, 1024, rows=b"\0"),
        png(2**31 - 1, 1, rows=b"\0"),
        *(webp_header(kind, 16_383, 16_383) for kind in (b"VP8X", b"VP8L", b"VP8 ")),
        webp_header(b"VP8X", 2**24, 2**24),
        encoded(Image.new("L", (1025, 1024)), "JPEG"),
    ],
    ids=["50000²", "10000²", "one row more", "one long row", "VP8X", "VP8L", "VP8", "largest VP8X", "JPEG"],
)  # fmt: skip
def test_too_many_pixels_are_refused_by_the_header(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(PictureTooLarge, match="1048576 pixels") as refused:
        read(data)
    assert (refused.value.status, refused.value.field) == (413, "img2img_image")


def test_as_many_pixels_as_allowed_are_read() -> None:
    assert read(encoded(Image.new("L", (1024, 1024)))).size == (1024, 1024)
