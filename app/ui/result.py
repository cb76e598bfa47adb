"""A finished run: the picture, what the cache did, and on request the uncached picture beside it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import streamlit as st

from app.ui import strip
from app.ui.difference import difference, psnr
from app.ui.history import Drawn

Compare = Callable[[Drawn], None]


def show(drawn: Drawn, compare: Compare, *, busy: bool) -> None:
    """`compare` starts the drawing of the uncached picture; `busy` while another run is on its way."""
    if drawn.plain is None:
        for seed, picture in zip(drawn.answer["seeds"], drawn.pictures, strict=True):
            st.image(picture, alt=f"{drawn.prompt}, seed {seed}", caption=f"seed {seed}")
    else:
        _beside(drawn, drawn.plain)
    _figures(drawn)
    for sentence in drawn.answer["warnings"]:
        st.caption(f":material/info: {sentence}")
    with st.container(horizontal=True):
        st.button(
            "Compare with uncached",
            key="compare",
            on_click=compare,
            args=(drawn,),
            disabled=busy or not drawn.cached or drawn.plain is not None,
            help=None if drawn.cached else "This picture was drawn without a cache: there is nothing to compare.",
        )
        for seed, picture in zip(drawn.answer["seeds"], drawn.pictures, strict=True):
            label = "Download" if len(drawn.pictures) == 1 else f"Download {seed}"
            st.download_button(
                label, picture, f"{drawn.answer['model']}-{seed}.png", "image/png", key=f"png-{seed}", on_click="ignore"
            )
    with st.expander("The server's report"):
        st.json(dict(drawn.answer))


def _figures(drawn: Drawn) -> None:
    cache = drawn.answer["cache"]
    with st.container(horizontal=True, key="figures"):
        st.metric("Denoising", f"{drawn.denoise_seconds:.2f} s", width="content")
        st.metric("In all", f"{drawn.answer['timings']['total_seconds']:.2f} s", width="content")
        st.metric("Hit rate", f"{drawn.hit_rate:.0%}", width="content")
        if cache.get("predicted_speedup") is not None:
            st.metric(
                "Predicted",
                f"{cache['predicted_speedup']:.2f}×",
                width="content",
                help="Denoising speed-up by counted operations; the seconds beside it are what it took.",
            )
    if drawn.answer["reused_run"]:
        st.caption("The run had been drawn before, and was gone on from: the seconds are what came after it.")
    st.html(strip.html(cache["decisions"]))
    st.caption(f"{strip.described(cache['decisions'])} (C computed, R reused). {drawn.settings()}")


def _beside(drawn: Drawn, plain: Drawn) -> None:
    amplify = st.slider("Amplify the difference", 1, 64, 8, key="amplify", help="Equal pixels are black.")
    for seed, cached, uncached in zip(drawn.answer["seeds"], drawn.pictures, plain.pictures, strict=True):
        left, middle, right = st.columns(3)
        name = f"{drawn.prompt}, seed {seed}"
        left.image(cached, alt=f"{name}, cached", caption=f"cached: {drawn.denoise_seconds:.2f} s")
        middle.image(uncached, alt=f"{name}, uncached", caption=f"uncached: {plain.denoise_seconds:.2f} s")
        ratio = psnr(cached, uncached)
        said = "identical" if math.isinf(ratio) else f"PSNR {ratio:.1f} dB"
        right.image(
            _png(difference(cached, uncached, amplify)),
            alt=f"Difference of the two, {amplify} times amplified: {said}",
            caption=f"difference ×{amplify}: {said}",
        )
    st.html(f'<p role="status"><strong>{faster(drawn, plain)}</strong></p>')
    if drawn.body.get("enable_preview"):
        st.caption("Both times hold the previews, which no cache makes faster. Switch them off for a fair measurement.")


def faster(drawn: Drawn, plain: Drawn) -> str:
    """How the two compare in seconds, in a sentence."""
    if drawn.answer["reused_run"] or plain.answer["reused_run"]:
        return "One of the two had been drawn before and was not drawn again: there are no times to compare."
    speedup = plain.denoise_seconds / drawn.denoise_seconds if drawn.denoise_seconds else math.inf
    return (
        f"Denoising took {drawn.denoise_seconds:.2f} s with the cache and {plain.denoise_seconds:.2f} s without: "
        f"{speedup:.2f}× as fast."
    )


def _png(image: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")  # type: ignore[attr-defined]
    return out.getvalue()
