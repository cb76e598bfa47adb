"""POST /v1/images/edits without a socket: what a form becomes, and which are refused before anything is queued."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.http.request import LONGEST_BOUNDARY, MOST_PARTS, SMALL
from app.images import read_size
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_bad_input import assert_refused
from tests.app.test_masks import drawn_on
from tests.app.test_passes import bomb
from tests.app.test_pictures import encoded

EDITS = "/v1/images/edits"
OPAQUE, CLEAR = (0, 0, 0, 255), (255, 255, 255, 0)


def png(image: Image.Image | None = None, kind: str = "PNG") -> bytes:
    return encoded(image or Image.new("RGB", (96, 64), (10, 20, 30)), kind)


PICTURE, NOISE = png(), png(Image.effect_noise((300, 300), 90))
BOMB = base64.b64decode(bomb())
MASK = png(drawn_on(OPAQUE, CLEAR, "RGBA"))
Files = dict[str, Any]


async def edited(
    client: httpx.AsyncClient, data: dict[str, Any] | None = None, files: Files | None = None
) -> httpx.Response:
    files = {"image": ("a.png", PICTURE, "image/png")} if files is None else files
    return await client.post(EDITS, data={"prompt": "a", "size": "96x64", **(data or {})}, files=files)


async def test_a_form_becomes_a_job_that_draws_within_the_mask(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await edited(
        client,
        {
            "n": "2",
            "model": "fine",
            "quality": "high",
            "background": "auto",
            "input_fidelity": "high",
            "user": "123",
            "output_format": "webp",
            "seed": "7",
            "steps": "10",
            "hires_fix": "false",
            "loras": "[]",
            "mask_blur": "0",
        },
        {"image": ("a.png", PICTURE), "mask": ("mask.png", MASK)},
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).format for one in body["data"]] == ["WEBP"] * 2
    assert (body["seeds"], body["size"]) == ([7, 8], "96x64")
    assert [said.partition(" ")[0] for said in body["warnings"][:2]] == ["quality", "input_fidelity"]
    params = engine.submitted[0].params
    over = params.img2img
    assert over is not None
    assert over.inpaint is not None
    assert (params.steps, over.denoise, over.inpaint.blur, over.inpaint.fill) == (10, 1.0, 0, "original")
    assert over.picture.getextrema() == ((10, 10), (20, 20), (30, 30))
    assert np.array_equal(np.asarray(over.inpaint.mask), np.asarray(drawn_on(0, 255)))


async def test_without_a_mask_all_of_it_is_drawn_over(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for name in ("image", "image[]"):
        answer = await edited(client, {"img2img_denoise": "0.5"}, {name: ("a.jpg", png(kind="JPEG"), "text/plain")})
        assert answer.status_code == 200, answer.text
        over = engine.submitted[-1].params.img2img
        assert over is not None
        assert (over.denoise, over.inpaint) == (0.5, None)


async def test_a_soft_mask_stays_soft(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    mask = Image.new("RGBA", (96, 64))
    mask.putalpha(Image.linear_gradient("L").resize((96, 64)))
    assert (await edited(client, files={"image": ("a", PICTURE), "mask": ("m", png(mask))})).status_code == 200
    drawn = np.asarray(engine.submitted[0].params.img2img.inpaint.mask, int)  # type: ignore[union-attr]
    expected = 255 - np.asarray(mask.getchannel("A"), int)
    assert np.abs(drawn - expected).max() < 8  # levels beside black and white become those
    assert len(np.unique(drawn)) > 50


@pytest.mark.parametrize(
    ("picture", "fields", "size"),
    [
        ((96, 64), {"size": "auto"}, (624, 416)),
        ((100, 100), {}, (512, 512)),
        ((64, 2000), {}, (88, 2048)),
        ((96, 64), {"size": "auto", "model": "flux"}, (624, 416)),
        ((96, 64), {"width": "128"}, (128, 512)),
    ],
    ids=["wide", "square", "tall", "flux", "told"],
)
async def test_auto_is_the_models_own_size_in_the_pictures_aspect(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    picture: tuple[int, int],
    fields: dict[str, str],
    size: tuple[int, int],
) -> None:
    """Of 512² pixels, in multiples of 8 or 16."""
    files = {"image": ("a.png", png(Image.new("RGB", picture)))}
    answer = await client.post(EDITS, data={"prompt": "a", **fields}, files=files)
    assert answer.status_code == 200, answer.text
    params = engine.submitted[0].params
    assert (params.width, params.height) == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_picture_is_that_of_the_upright_one(orientation: int) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (96, 64)).save(file, "JPEG", exif=exif)
    text = base64.b64encode(file.getvalue()).decode()
    expected = (64, 96) if orientation > 4 else (96, 64)
    assert read_size(text, field="image", max_pixels=2**14) == expected


async def test_a_stream_names_its_events_after_edits(client: httpx.AsyncClient) -> None:
    answer = await edited(client, {"stream": "true", "partial_images": "0"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "event: image_edit.completed" in answer.text


REFUSED: dict[str, tuple[dict[str, str], Files | None, int, str, str, str]] = {
    "no picture": ({}, {"mask": ("m", MASK)}, 422, "invalid", "image", "one picture"),
    "two pictures": ({}, {"image": ("a", PICTURE), "image[]": ("b", PICTURE)}, 422, "invalid", "image", "one picture"),
    "a text": ({"image": base64.b64encode(PICTURE).decode()}, {"x": ("x", b"")}, 422, "invalid", "image", "a file"),
    "a text as mask": ({"mask": "x"}, None, 422, "invalid", "mask", "a file"),
    "a word in a file": ({}, {"image": ("a", PICTURE), "sampler": ("s", b"a")}, 422, "invalid", "sampler", "string"),
    "an unknown file": ({}, {"image": ("a", PICTURE), "maks": ("m", MASK)}, 422, "invalid", "maks", "'mask'"),
    "markup": ({}, {"image": ("a", PICTURE), "markup": ("m", MASK)}, 422, "unsupported", "markup", "mask"),
    "an empty file": ({}, {"image": ("a", b"")}, 422, "invalid", "image", "empty"),
    "a GIF": ({}, {"image": ("a.gif", png(kind="GIF"))}, 422, "invalid", "image", "no picture that is read"),
    "no PNG": ({}, {"image": ("a.png", b"<svg/>", "image/png")}, 422, "invalid", "image", "no picture that is read"),
    "a cut file": ({}, {"image": ("a", NOISE[:400])}, 422, "invalid", "image", "damaged"),
    "a bomb": ({}, {"image": ("a", BOMB)}, 413, "picture_too_large", "image", "pixels"),
    "a bomb, auto": (
        {"size": "auto"}, {"image": ("a", BOMB)}, 413, "picture_too_large", "image", "pixels"
    ),
    "a small one": ({}, {"image": ("a", png(Image.new("L", (31, 64))))}, 422, "invalid", "image", "less than 32"),
    "a mask of another picture": (
        {}, {"image": ("a", PICTURE), "mask": ("m", png(drawn_on(OPAQUE, CLEAR, "RGBA", (64, 64))))},
        422, "invalid", "mask", "another aspect than image",
    ),
    "a mask without alpha": (
        {}, {"image": ("a", PICTURE), "mask": ("m", png(drawn_on(0, 255)))}, 422, "invalid", "mask", "no transparency"
    ),
    "an opaque mask": (
        {}, {"image": ("a", PICTURE), "mask": ("m", png(Image.new("RGBA", (96, 64), OPAQUE)))},
        422, "invalid", "mask", "What is transparent is drawn anew",
    ),
    "a bomb as mask": (
        {}, {"image": ("a", PICTURE), "mask": ("m", BOMB)}, 413, "picture_too_large", "mask", "pixels"
    ),
    "n in words": ({"n": "two"}, None, 422, "invalid", "n", "integer"),
    "n of eleven": ({"n": "11"}, None, 422, "invalid", "n", "10"),
    "Python's true": ({"stream": "True"}, None, 422, "invalid", "stream", "boolean"),
    "no number": ({"guidance_scale": "NaN"}, None, 422, "invalid", "guidance_scale", "finite"),
    "a long number": ({"steps": "9" * 5000}, None, 422, "invalid", "steps", "integer"),
    "deep nesting": ({"loras": "[" * 60_000}, None, 422, "invalid", "loras", "list"),
    "brackets": ({"loras[][name]": "a"}, None, 422, "invalid", "loras[][name]", "'loras'"),
    "a slip": ({"qualty": "low"}, None, 422, "invalid", "qualty", "'quality'"),
    "a clear background": ({"background": "transparent"}, None, 422, "unsupported", "background", "opaque"),
    "fidelity": ({"input_fidelity": "higher"}, None, 422, "unsupported", "input_fidelity", "img2img_denoise"),
    "switched off": ({"img2img_enabled": "false"}, None, 422, "invalid", "img2img_enabled", "leave it out"),
    "a second picture": ({"img2img_image": "aGk="}, None, 422, "invalid", "img2img_image", "leave it out"),
    "DeepCache": ({"deepcache_enabled": "true"}, None, 422, "incompatible", "deepcache_enabled", "img2img"),
    "an unknown model": ({"model": "gpt-image-1"}, None, 404, "unknown_model", "model", "fine"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_drawn_is_refused_and_the_next_form_is_not(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    data, files, status, kind, field, words = REFUSED[name]
    assert_refused(await edited(client, data, files), status, kind, field, words)
    assert engine.submitted == []
    assert (await edited(client)).status_code == 200
    assert len(engine.submitted) == 1


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


IMAGE = part("image", PICTURE, '; filename="a.png"')
WHOLE = part("prompt", b"a") + IMAGE + b"--b--\r\n"
FORM = "multipart/form-data; boundary=b"
MALFORMED: dict[str, tuple[str, bytes, str | None, str]] = {
    "empty": (FORM, b"", None, "closing boundary"),
    "no form": (FORM, b'{"prompt": "a"}', None, "no form"),
    "cut in a file": (FORM, WHOLE[:-40], None, "closing boundary"),
    "cut in a header": (FORM, WHOLE[:20], None, "closing boundary"),
    "without its end": (FORM, WHOLE.removesuffix(b"--b--\r\n"), None, "closing boundary"),
    "another boundary": ("multipart/form-data; boundary=c", WHOLE, None, "no form with the boundary"),
    "no boundary": ("multipart/form-data", WHOLE, None, "needs a boundary"),
    "an empty boundary": ('multipart/form-data; boundary=""', WHOLE, None, "needs a boundary"),
    "a boundary of 1 kB": (f"multipart/form-data; boundary={'b' * 1024}", WHOLE, None, f"1 to {LONGEST_BOUNDARY}"),
    "JSON": ("application/json", b'{"prompt": "a"}', None, "multipart/form-data, not application/json"),
    "a plain form": ("application/x-www-form-urlencoded", b"prompt=a", None, "must be a form"),
    "no type": ("", WHOLE, None, "not none"),
    "two of one name": (FORM, IMAGE + WHOLE, "image", "more than once"),
    "two texts of one name": (FORM, part("prompt", b"b") + WHOLE, "prompt", "more than once"),
    "several pictures": (FORM, (IMAGE * 2 + b"--b--").replace(b"image", b"image[]"), "image[]", "more than once"),
    "no name": (FORM, WHOLE.replace(b'; name="prompt"', b""), None, "Content-Disposition"),
    "no disposition": (FORM, WHOLE.replace(b"Content-D", b"D", 1), None, "Content-Disposition"),
    "another disposition": (FORM, WHOLE.replace(b"form-data", b"attachment", 1), None, "Content-Disposition"),
    "a name in Latin-1": (FORM, part("prompt", b"a").replace(b"prompt", b"\xe9") + b"--b--", None, "not UTF-8"),
    "a text in Latin-1": (FORM, part("prompt", b"\xe9") + b"--b--", "prompt", "not UTF-8"),
    "an encoded part": (
        FORM, WHOLE.replace(b"\r\n\r\na", b"\r\nContent-Transfer-Encoding: base64\r\n\r\nYQ=="), "prompt", "is encoded"
    ),
    "a long header": (FORM, part("prompt", b"a", "; x=" + "x" * 5000) + b"--b--", None, "header size"),
    "many headers": (FORM, part("prompt", b"a", "\r\nX: y" * 9) + b"--b--", None, "header count"),
    "many parts": (
        FORM, b"".join(part(f"x{n}", b"") for n in range(MOST_PARTS + 1)) + b"--b--", None, f"{MOST_PARTS} parts"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_no_form_is_refused(client: httpx.AsyncClient, engine: FakeEngine, name: str) -> None:
    kind, body, field, words = MALFORMED[name]
    headers = {"Content-Type": kind} if kind else {}
    assert_refused(await client.post(EDITS, content=body, headers=headers), 422, "invalid", field, words)
    assert engine.submitted == []
    answer = await client.post(EDITS, content=WHOLE + b"an epilogue", headers={"Content-Type": FORM})
    assert answer.status_code == 200, answer.text


async def test_a_form_keeps_to_the_bounds_of_any_body() -> None:
    """Its length, announced or not; a large one is taken apart beside the event loop, within the room for uploads."""
    engine, headers = FakeEngine(), {"Content-Type": FORM}
    async with client_of(engine, max_body_bytes=2**17) as client:

        async def chunks(body: bytes) -> Any:
            yield body

        long = part("prompt", b"a" * 2**17) + WHOLE
        for content in (long, chunks(long)):
            assert_refused(await client.post(EDITS, content=content, headers=headers), 413, "body_too_large", None)
        compressed = {**headers, "Content-Encoding": "gzip"}
        assert_refused(await client.post(EDITS, content=WHOLE, headers=compressed), 422, "invalid", None, "compressed")
        assert len(NOISE) > SMALL
        assert (await edited(client, {"size": "304x304"}, {"image": ("a.png", NOISE)})).status_code == 200
    assert len(engine.submitted) == 1


async def test_a_full_queue_decodes_nothing() -> None:
    async with client_of(FakeEngine(capacity=0)) as client:
        assert_refused(await edited(client), 429, "queue_full", None)
    async with client_of(FakeEngine(), api_keys="a-key") as client:
        assert_refused(await edited(client), 401, "unauthorized", None)
