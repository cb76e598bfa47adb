"""Two small components of our own: a brush for masks, and two pictures with a slider between them.

Their HTML, CSS and JavaScript lie in static/. Pictures travel to them as data URLs.
"""

from __future__ import annotations

import base64
import hashlib
import io
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image

_STATIC = Path(__file__).with_name("static")
_SIDE = 1024  # pixels, the longest of a picture that is painted on


def brush(picture: bytes, key: str) -> bytes | None:
    """What is painted on an encoded picture: a PNG of its size, white where it is painted; None for nothing."""
    with Image.open(io.BytesIO(picture)) as image:
        size = image.size
        shown = image.convert("RGB")
    shown.thumbnail((_SIDE, _SIDE))
    data = {"id": hashlib.sha256(picture).hexdigest()[:16], "picture": jpeg_url(shown)}
    result = _component("brush")(key=key, data=data, default={"mask": ""}, on_mask_change=_nothing)
    painted = str(result.mask or "")
    if not painted.startswith("data:image/png;base64,"):
        return None
    with Image.open(io.BytesIO(base64.b64decode(painted.partition(",")[2])), formats=["PNG"]) as mask:
        if mask.width * mask.height > 4 * _SIDE**2:  # not of this page's making
            return None
        whole = mask.convert("L").resize(size, Image.Resampling.NEAREST)
    out = io.BytesIO()
    whole.save(out, "PNG")
    return out.getvalue()


def pair(first: bytes, second: bytes, names: tuple[str, str], key: str) -> None:
    """Two encoded pictures of one size, the first on the left of a line that is moved."""
    pictures = [Image.open(io.BytesIO(one)).convert("RGB") for one in (first, second)]
    data = {"pictures": [jpeg_url(one) for one in pictures], "names": list(names)}
    _component("pair")(key=key, data=data)


def jpeg_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def _nothing() -> None:
    """A component's state is named by its callback."""


@cache
def _component(name: str) -> Any:
    html, css, js = ((_STATIC / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return st.components.v2.component(f"wavespeed_{name}", html=html, css=css, js=js)
