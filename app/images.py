"""Pictures to bytes, and a client's picture or what stands in it from text, trusted in nothing."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from app.errors import Invalid, PictureTooLarge, ServiceError

OutputFormat = Literal["png", "jpeg", "webp"]
_ENDINGS: Mapping[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_QUALITY = 95
_READ = ("PNG", "JPEG", "WEBP")  # every other decoder stays unreached, whatever the bytes pose as
_REMEDY = "Send a PNG, JPEG or WebP file; in JSON as base64, or as data:image/png;base64,…"
_DATA_URLS = ("image/png", "image/jpeg", "image/jpg", "image/webp")  # jpg is no media type, and what many write
_NOISE = 8  # levels
_SCANS = 100  # of a progressive JPEG, each a pass over all pixels; encoders write about ten
_LONGEST_TEXTS = 2**20  # characters; a few bytes unfold to so many
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]


def format_of(path: Path) -> OutputFormat:
    """What a file's ending asks for. Raises ServiceError."""
    try:
        return _ENDINGS[path.suffix.lower()]
    except KeyError:
        raise ServiceError(f"{path.name}: name a file that ends in {', '.join(_ENDINGS)}.") from None


def encode(image: Image.Image, output_format: OutputFormat, text: Mapping[str, str] | None = None) -> bytes:
    """`text` becomes text chunks of a PNG; the other formats carry none."""
    buffer = io.BytesIO()
    if output_format == "png":
        chunks = PngInfo()
        for key, value in (text or {}).items():
            chunks.add_itxt(key, value) if not value.isascii() else chunks.add_text(key, value)
        image.save(buffer, "PNG", pnginfo=chunks)
    else:
        image.convert("RGB").save(buffer, output_format.upper(), quality=_QUALITY)
    return buffer.getvalue()


def read_picture(text: str, *, field: str, max_pixels: int) -> Image.Image:
    """The picture in `text`, base64 or a data URL, as RGB, upright by its EXIF orientation, without metadata.

    Blocking, for up to seconds: not for the event loop. Nothing is opened by name or fetched. Transparency shows white
    behind it; of 16 bits a channel the upper 8 are kept; EXIF that cannot be read orients nothing. Raises Invalid, or
    PictureTooLarge, read from the header, for more than `max_pixels`; both name `field`.
    """
    return _read(text, field, max_pixels, _rgb)


def read_mask(text: str, *, field: str, max_pixels: int, clear: bool = False) -> Image.Image:
    """The picture in `text` as a mask, L: 255 is painted over. Otherwise as `read_picture`, and raises the same.

    Luminance tells, and what is transparent is black. A picture that is black wherever it is not transparent is
    somebody's drawing on nothing: there the opaque is painted over. clear: transparency alone tells, as OpenAI's masks
    have it, and one without is refused.
    """

    def transparency(image: Image.Image) -> Image.Image:
        if not image.has_transparency_data:
            raise Invalid(
                f"{field} has no transparency, and what is transparent in it is drawn anew: send a PNG with an alpha "
                "channel.",
                field=field,
            )
        return ImageChops.invert(image.convert("RGBA").getchannel("A")).point(_clear)

    return _read(text, field, max_pixels, transparency if clear else _luminance)


def read_size(text: str, *, field: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the picture in `text`, upright, from its header alone. Raises as `read_picture` does."""
    with _opened(text, field, max_pixels) as (file, _):
        # Without this, Pillow decodes a PNG in search of a chunk behind its pixels.
        sideways = "exif" in file.info and _turn(file) in _SIDEWAYS
        return (file.height, file.width) if sideways else file.size


def _read(text: str, field: str, max_pixels: int, converted: Callable[[Image.Image], Image.Image]) -> Image.Image:
    with _opened(text, field, max_pixels) as (file, data):
        if file.format in ("PNG", "WEBP") and getattr(file, "is_animated", False):
            raise Invalid(f"{field} is animated; send one of its frames.", field=field)
        if file.format == "JPEG" and data.count(b"\xff\xda") > _SCANS:
            raise Invalid(f"{field} is a JPEG of more than {_SCANS} scans; save it again.", field=field)
        file.load()
        return _upright(file, converted(file))


def read_texts(text: str, *, field: str, max_pixels: int) -> dict[str, str]:
    """What stands in the text chunks of a PNG before its pixels, which are not decoded; of another kind nothing.

    Blocking; raises as `read_picture` does.
    """
    with _opened(text, field, max_pixels) as (file, _):
        found = file.info.items() if file.format == "PNG" else ()
        texts = {str(name): str(value) for name, value in found if isinstance(value, str)}
        if sum(map(len, texts.values())) > _LONGEST_TEXTS:
            raise Invalid(f"{field} holds more than {_LONGEST_TEXTS} characters of text.", field=field)
        return texts


@contextmanager
def _opened(text: str, field: str, max_pixels: int) -> Iterator[tuple[Image.Image, bytes]]:
    """The picture in `text`, its header alone read, and its bytes. What is wrong, in the block too, is Invalid."""
    data = _bytes_of(text, field)
    try:
        _check_pixels(_webp_size(data), field, max_pixels)
        with Image.open(io.BytesIO(data), formats=_READ) as file:
            _check_pixels(file.size, field, max_pixels)
            yield file, data
    except UnidentifiedImageError:
        raise Invalid(f"{field} holds no picture that is read here. {_REMEDY}", field=field) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(field, max_pixels) from None
    except (Invalid, PictureTooLarge, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  # decoders raise whatever a broken file leads them to
        raise Invalid(
            f"{field} is a damaged picture ({type(error).__name__} while decoding); save it again.", field=field
        ) from None


def _bytes_of(text: str, field: str) -> bytes:
    head, comma, payload = text.partition(",")
    if head[:5].lower() == "data:":
        kind, *parameters = head[5:].lower().split(";")
        if not comma or "base64" not in parameters or kind not in _DATA_URLS:
            raise Invalid(f"{field} is a data URL of another kind. {_REMEDY}", field=field)
    else:
        payload = text
    try:
        # Line breaks are what `base64` of a shell puts in; any other foreign character is a path, a URL or damage.
        data = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(
            f"{field} is not base64. A path or an address is not read and nothing is fetched. {_REMEDY}", field=field
        ) from None
    if not data:
        raise Invalid(f"{field} is empty. {_REMEDY}", field=field)
    return data


def _webp_size(data: bytes) -> tuple[int, int]:
    """Of the canvas, which Pillow allocates when it opens a WebP file; (0, 0) for other files, which it only looks at.

    RFC 9649, sections 2.5 to 2.7.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case _:
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_pixels(size: tuple[int, int], field: str, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise _too_large(field, max_pixels)


def _too_large(field: str, max_pixels: int) -> PictureTooLarge:
    return PictureTooLarge(
        f"{field} has more than {max_pixels} pixels, the most that this server decodes; send it smaller.", field=field
    )


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value / 256).convert("L")  # a plain conversion would clip
    return image


def _luminance(image: Image.Image) -> Image.Image:
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("L").point(_clear)
    layers = image.convert("RGBA")
    seen = Image.alpha_composite(Image.new("RGBA", layers.size, "black"), layers).convert("L").point(_clear)
    alpha = layers.getchannel("A")
    return seen if seen.getbbox() or alpha.getextrema()[0] == 255 else alpha.point(_clear)


def _clear(level: int) -> int:
    """A level of a mask. What lies so near to black or white is JPEG's noise."""
    return 0 if level < _NOISE else 255 if level > 255 - _NOISE else level


def _rgb(image: Image.Image) -> Image.Image:
    image = _eight_bits(image)
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    return image.convert("RGB")


def _upright(file: Image.Image, picture: Image.Image) -> Image.Image:
    method = _turn(file)
    picture = picture if method is None else picture.transpose(method)
    picture.info.clear()
    return picture


def _turn(file: Image.Image) -> Image.Transpose | None:
    """What makes the file's picture upright."""
    try:
        return _UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  # the EXIF reader raises whatever broken bytes lead it to
        return None
