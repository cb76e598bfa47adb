"""A mask and a border beside an upload: what they become, and what is refused before anything is queued."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from app.images import read_mask
from models.base import GenerationParams, Inpaint
from models.masks import hard
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_passes import bomb, upload

BASE = {"prompt": "a", "steps": 10, "width": 96, "height": 64, "img2img_enabled": True, "img2img_image": upload()}
WHITE, BLACK, CLEAR = (255, 255, 255, 255), (0, 0, 0, 255), (0, 0, 0, 0)


def sent(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def drawn_on(back: Any, front: Any, mode: str = "L", size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A square of the left half."""
    mask = Image.new(mode, size, back)
    ImageDraw.Draw(mask).rectangle((size[0] // 8, size[1] // 4, size[0] // 4 - 1, size[1] // 2 - 1), fill=front)
    return mask


MASK = drawn_on(0, 255)


async def params_of(client: httpx.AsyncClient, engine: FakeEngine, **fields: Any) -> tuple[GenerationParams, list[str]]:
    response = await client.post("/api/generate", json={**BASE, **fields})
    assert response.status_code == 200, response.text
    return engine.submitted[-1].params, response.json()["warnings"]


async def test_fields_become_what_is_drawn_within(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {
        "mask_blur": 0,
        "mask_fill": "noise",
        "inpaint_area": "masked",
        "inpaint_padding": 7,
        "img2img_denoise": 1.0,
    }
    params, warnings = await params_of(client, engine, mask=sent(MASK), **fields)
    assert params.img2img is not None
    assert params.img2img.inpaint is not None
    inpaint = params.img2img.inpaint
    assert (inpaint.blur, inpaint.fill, inpaint.padding, params.img2img.denoise) == (0, "noise", 7, 1.0)
    assert np.array_equal(np.asarray(inpaint.mask), np.asarray(MASK))
    assert warnings == ["The fake says so."]
    params, _ = await params_of(client, engine, mask=sent(MASK))
    assert params.img2img is not None
    assert params.img2img.inpaint == Inpaint(mask=params.img2img.inpaint.mask)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "mask",
    [
        drawn_on(0, 255, size=(192, 128)),
        drawn_on(0, 1, "1"),
        drawn_on(0, 65535, "I;16"),
        drawn_on((0, 0, 0), (255, 255, 255), "RGB"),
        drawn_on(BLACK, WHITE, "RGBA"),
        drawn_on(CLEAR, WHITE, "RGBA"),
        drawn_on((255, 255, 255, 0), WHITE, "RGBA"),  # what is transparent has no colour
        drawn_on(CLEAR, BLACK, "RGBA"),  # a drawing without luminance: its alpha counts
        drawn_on((0, 0), (0, 255), "LA"),
    ],
    ids=[
        "twice as large",
        "1 bit",
        "16 bit",
        "RGB",
        "opaque",
        "on nothing",
        "on clear white",
        "black",
        "grey and alpha",
    ],
)
async def test_each_kind_of_mask_says_the_same(
    client: httpx.AsyncClient, engine: FakeEngine, mask: Image.Image
) -> None:
    params, _ = await params_of(client, engine, mask=sent(mask))
    assert np.array_equal(hard(params.img2img.inpaint.mask), MASK)  # type: ignore[union-attr]


def test_greys_are_kept_and_noise_of_a_jpeg_is_not() -> None:
    levels = Image.fromarray(np.array([[0, 7, 8, 100, 200, 247, 248, 255]], np.uint8))
    read = read_mask(sent(levels), field="mask", max_pixels=64)
    assert list(read.tobytes()) == [0, 0, 8, 100, 200, 247, 255, 255]
    jpeg = np.asarray(read_mask(sent(MASK, "JPEG"), field="mask", max_pixels=2**14))
    assert not jpeg[:, 48:].any()


async def test_a_mask_is_cut_as_its_picture_is(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """96×64 to 64×64: 16 pixels are lost on each side; a pixel more or less of a mask's side is rounding."""
    for size in ((96, 64), (48, 32), (47, 32), (95, 64)):
        params, _ = await params_of(client, engine, width=64, mask=sent(drawn_on(0, 255, size=size)))
        mask = params.img2img.inpaint.mask  # type: ignore[union-attr]
        assert mask.size == params.img2img.picture.size == (64, 64)  # type: ignore[union-attr]
        assert abs(int((np.asarray(mask) >= 128).sum()) - 8 * 16) <= 16


async def test_a_border_is_drawn_around_the_picture(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The answer has the request's size; the picture takes what the border leaves, and goes on into it."""
    params, _ = await params_of(client, engine, width=128, height=96, outpaint_left=32, outpaint_bottom=32)
    over = params.img2img
    assert over is not None
    assert over.inpaint is not None
    assert over.picture.size == over.inpaint.mask.size == (128, 96)
    expected = np.full((96, 128), 255, np.uint8)
    expected[:64, 32:] = 0
    assert np.array_equal(np.asarray(over.inpaint.mask), expected)
    assert over.picture.getextrema() == ((10, 10), (20, 20), (30, 30))
    both, _ = await params_of(
        client, engine, width=128, height=96, outpaint_left=32, outpaint_bottom=32, mask=sent(MASK)
    )
    expected[:64, 32:] = np.asarray(MASK)
    assert np.array_equal(np.asarray(both.img2img.inpaint.mask), expected)  # type: ignore[union-attr]


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "another aspect": ({"mask": sent(drawn_on(0, 255, size=(64, 64)))}, 422, "mask", "another aspect"),
    "on its side": ({"mask": sent(drawn_on(0, 255, size=(64, 96)))}, 422, "mask", "the picture's size"),
    "empty": ({"mask": sent(Image.new("L", (96, 64)))}, 422, "mask", "nothing to draw"),
    "black and opaque": ({"mask": sent(Image.new("RGBA", (96, 64), BLACK))}, 422, "mask", "nothing to draw"),
    "clear": ({"mask": sent(Image.new("RGBA", (96, 64), CLEAR))}, 422, "mask", "nothing to draw"),
    "too soft": ({"mask": sent(Image.new("L", (96, 64), 127))}, 422, "mask", "128 of 255"),
    "cut off": ({"mask": sent(drawn_on(0, 255)), "width": 64, "height": 96}, 422, "mask", "as it is cut to 64×96"),
    "no picture": ({"mask": base64.b64encode(b"hello").decode()}, 422, "mask", "no picture"),
    "a path": ({"mask": "/etc/passwd"}, 422, "mask", "not base64"),
    "a bomb": ({"mask": bomb()}, 413, "mask", "pixels"),
    "no number": ({"mask": 1}, 422, "mask", "string"),
    "without a picture": ({"mask": sent(MASK), "img2img_image": None}, 422, "img2img_image", "needs a picture"),
    "without its switch": ({"mask": sent(MASK), "img2img_enabled": False}, 422, "mask", "set img2img_enabled"),
    "a border alone": ({"outpaint_top": 8, "img2img_enabled": False}, 422, "outpaint_top", "set img2img_enabled"),
    "too wide a border": ({"outpaint_left": 33, "outpaint_right": 32}, 422, "outpaint_left", "31 pixels of the width"),
    "a border beyond": ({"outpaint_bottom": 2048}, 422, "outpaint_bottom", "leaves 0 pixels of the height"),
    "an inward border": ({"outpaint_top": -1}, 422, "outpaint_top", "greater than or equal to 0"),
    "a far blur": ({"mask": sent(MASK), "mask_blur": 65}, 422, "mask_blur", "64"),
    "another fill": ({"mask": sent(MASK), "mask_fill": "latent"}, 422, "mask_fill", "original"),
    "another area": ({"mask": sent(MASK), "inpaint_area": "only"}, 422, "inpaint_area", "whole"),
    "DeepCache": ({"mask": sent(MASK), "deepcache_enabled": True}, 422, "deepcache_enabled", "img2img"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_drawn_within_is_refused_and_the_next_request_is_not(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    fields, status, field, words = REFUSED[name]
    response = await client.post("/api/generate", json={**BASE, **fields})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["field"] == field
    assert words in error["message"]
    assert engine.submitted == []
    params, _ = await params_of(client, engine, mask=sent(MASK))
    assert params.img2img is not None
    assert params.img2img.inpaint is not None


async def test_a_setting_without_a_mask_is_said(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    _, warnings = await params_of(client, engine, mask_blur=8)
    assert warnings[0] == "mask_blur had no effect: there is no mask."
    _, warnings = await params_of(client, engine, mask=sent(MASK), inpaint_padding=8)
    assert warnings[0] == "inpaint_padding had no effect: inpaint_area is not masked."


@pytest.mark.parametrize("field", ["deepcache_enabled", "multiscale_enabled"])
async def test_a_checkpoint_for_inpainting_refuses_what_does_not_go_with_it(field: str) -> None:
    engine = FakeEngine()
    models = {name: replace(info, inpaints=True) for name, info in engine.models.models.items()}
    async with client_of(replace(engine, models=replace(engine.models, models=models))) as client:
        refused = await client.post("/api/generate", json={"prompt": "a", field: True})
        assert (refused.status_code, refused.json()["error"]["type"]) == (422, "incompatible")
        assert refused.json()["error"]["field"] == field
        assert (await client.post("/api/generate", json={"prompt": "a"})).status_code == 200
