"""A picture to draw from, dropped or sent from another one, and what it tells of how it was drawn.

The next one begins from it (how much of it is drawn anew, and where), or a ControlNet sees it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st
from PIL import Image

from app.client import Client, ClientError
from app.ui import components
from app.ui.refusal import explained
from app.ui.request import Model
from app.ui.scenes import escaped

BEGIN, CONTROL = "begin", "control"
USES = {BEGIN: "to begin from", CONTROL: "as control"}
KINDS = ("png", "jpg", "jpeg", "webp")
MOST_PIXELS = 2**24  # what the service reads
_SIDES = 32
_LARGEST = 2048  # pixels a side of what is drawn


def picture() -> bytes | None:
    """The encoded picture that was dropped or sent."""
    found: bytes | None = st.session_state.get("source")
    return found


def beginning() -> bytes | None:
    """It, while the next one begins from it."""
    return None if _controls() else picture()


def control() -> bytes | None:
    """It, while a ControlNet sees it."""
    return picture() if _controls() else None


def _controls() -> bool:
    return bool(st.session_state.get("use") == CONTROL)


def mask() -> bytes | None:
    """What is painted on it, while only that is to be drawn anew."""
    found: bytes | None = st.session_state.get("mask") if paints() else None
    return found


def paints() -> bool:
    """Whether only what is painted is to be drawn anew."""
    return beginning() is not None and bool(st.session_state.get("paints"))


def take(data: bytes, model: Model, told: Mapping[str, Any] | None = None) -> None:
    """Begin from this picture from now on, at its aspect. `told`: the fields that it says it was drawn with."""
    state = st.session_state
    state["source"], state["source-told"], state["mask"] = data, told or {}, None
    state["paints"], state["use"] = False, BEGIN
    with Image.open(io.BytesIO(data)) as image:
        state["width"], state["height"] = fitting(image.width, image.height, model)


def fitting(width: int, height: int, model: Model) -> tuple[int, int]:
    """The size to draw at, in the model's multiples: the picture's own, scaled where it is too large or too small."""
    native_width, native_height = model["native_size"]
    least = native_width * native_height
    scale = min(1.0, _LARGEST / max(width, height), (4 * max(least, 512 * 512) / (width * height)) ** 0.5)
    scale = max(scale, (least / (width * height)) ** 0.5) if width * height * scale**2 < least else scale
    sides = (min(_LARGEST, max(64, round(side * scale / _SIDES) * _SIDES)) for side in (width, height))
    return next(sides), next(sides)


def show(server: Client, model: Model, restore: Any, controlnets: Sequence[str]) -> None:
    """`restore`: called with the fields that a dropped picture tells, to put them into the widgets.

    `controlnets`: the names of those that can see it; without one it is there to begin from alone.
    """
    state = st.session_state
    data = picture()
    if data is None:
        _drop(server, model)
        return
    with st.container(border=True, key="source-box"):
        if controlnets:
            st.segmented_control("Use this picture", USES, key="use", required=True, format_func=USES.__getitem__)
        else:
            state["use"] = BEGIN
            st.markdown("**Begins from this picture**")
        if paints():
            state["mask"] = components.brush(data, key="brush")
            st.caption("What you paint is drawn anew." if state["mask"] else "Paint what is to be drawn anew.")
        else:
            st.image(data, alt="The picture to draw from", width=320)
        if _controls():
            _steering(controlnets)
        else:
            _drawing_over()
        with st.container(horizontal=True):
            if told := state.get("source-told"):
                st.button("Restore its settings", key="restore", on_click=restore, args=(told,), type="primary")
            st.button("Remove", key="remove-source", on_click=remove, icon=":material/close:")
        if told:
            st.caption(f"It tells how it was drawn: {escaped(str(told.get('prompt', 'no prompt')))}")


def _drawing_over() -> None:
    st.slider(
        "Strength",
        0.05,
        1.0,
        step=0.05,
        key="img2img_denoise",
        help="How much of it is drawn anew: little keeps most of the picture, 1 keeps nothing.",
    )
    st.toggle("Draw a painted part alone", key="paints")
    if paints():
        st.segmented_control(
            "Drawn at full size",
            ("whole", "masked"),
            key="inpaint_area",
            required=True,
            format_func={"whole": "the picture", "masked": "the painted part"}.__getitem__,
        )


def _steering(controlnets: Sequence[str]) -> None:
    st.selectbox("ControlNet", controlnets, key="control_model", help="Made for one family of models.")
    st.segmented_control(
        "Map",
        (True, False),
        key="control_edges",
        required=True,
        format_func={True: "its edges", False: "the picture itself"}.__getitem__,
        help="What the ControlNet sees: edges, if it was made for them. For another, drop the map that it reads.",
    )
    st.slider("Weight", 0.0, 2.0, step=0.05, key="control_weight", help="The strength of what it adds; 0 adds nothing.")
    st.slider(
        "Start and end", 0.0, 1.0, step=0.05, key="control_span", help="It acts between these shares of the steps."
    )


def remove() -> None:
    st.session_state["source"] = st.session_state["mask"] = None


def _drop(server: Client, model: Model) -> None:
    """The place to drop a file. Its key counts, so that a file that was taken is let go of."""
    state = st.session_state
    key = f"drop-{state.setdefault('drops', 0)}"
    st.file_uploader(
        "Begin from a picture, or restore one's settings",
        type=KINDS,
        key=key,
        on_change=_dropped,
        args=(key, server, model),
        help="Drop a PNG, JPEG or WebP here. A PNG of this server's or of AUTOMATIC1111's tells how it was drawn.",
    )
    if failure := state.get("drop-failure"):
        st.error(failure)


def _dropped(key: str, server: Client, model: Model) -> None:
    state = st.session_state
    file = state.get(key)
    if file is None:
        return
    data = file.getvalue()
    state["drops"] += 1
    state["drop-failure"] = wrong_with(data)
    if state["drop-failure"] is not None:
        return
    try:
        told = server.settings_of(data)
    except ClientError as error:
        state["drop-failure"] = explained(error)
        return
    take(data, model, told)


def wrong_with(data: bytes) -> str | None:
    """In a sentence; None for a picture that can be drawn over."""
    remedy = "Drop a PNG, JPEG or WebP file."
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                most = MOST_PIXELS // 10**6
                return f"The picture has {width}×{height} pixels, and at most {most} million are read. Scale it down."
            image.load()
    except Exception as error:  # noqa: BLE001  # decoders raise whatever a broken file leads them to
        return f"That file is no picture that can be read ({type(error).__name__}). {remedy}"
    return None
