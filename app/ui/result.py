"""A finished run: its pictures, what the cache did, and on request the uncached picture beside it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import streamlit as st

from app.ui import components, strip
from app.ui.difference import difference, psnr
from app.ui.form import held, put
from app.ui.gallery import Actions, Drawn, buttons


def show(drawn: Drawn, actions: Actions, again: Callable[[], None], upscaler: str | None, *, busy: bool) -> None:
    """`again`: draws with a new seed; `busy` while another run is on its way."""
    number = _pictures(drawn)
    _seed(drawn, number, again, busy=busy)
    _figures(drawn)
    for sentence in drawn.answer["warnings"]:
        st.caption(f":material/info: {sentence}")
    with st.container(horizontal=True, key="actions"):
        buttons(
            lambda action, *more: action(drawn, *more),
            drawn.pictures[number],
            drawn.job.id,
            actions,
            upscaler,
            busy=busy,
            comparable=drawn.comparable,
            number=number,
        )
    if drawn.plain is not None:
        _difference(drawn, drawn.plain, number)
    with st.expander("The server's report"):
        st.json(dict(drawn.answer))


def _pictures(drawn: Drawn) -> int:
    """Shows them; the number of the one that the buttons below are about."""
    number, seeds = 0, drawn.answer["seeds"]
    if len(seeds) > 1:
        columns = st.columns(2)
        for index, picture in enumerate(drawn.pictures):
            columns[index % 2].image(picture, alt=_name(drawn, index), caption=f"seed {seeds[index]}", width="stretch")
        number = st.pills(
            "Picture",
            range(len(seeds)),
            default=0,
            required=True,
            format_func=lambda index: f"seed {seeds[index]}",
            key=f"number-{drawn.job.id}",
        )
    elif drawn.plain is None:
        st.image(drawn.pictures[0], alt=_name(drawn, 0), width="stretch")
    if drawn.plain is not None:
        names = (f"cached, {drawn.denoise_seconds:.2f} s", f"uncached, {drawn.plain.denoise_seconds:.2f} s")
        components.pair(drawn.pictures[number], drawn.plain.pictures[number], names, key="pair")
        st.html(f'<p role="status"><strong>{faster(drawn, drawn.plain)}</strong></p>')
    return int(number)


def _name(drawn: Drawn, number: int) -> str:
    return f"{drawn.prompt}, seed {drawn.answer['seeds'][number]}"


def _seed(drawn: Drawn, number: int, again: Callable[[], None], *, busy: bool) -> None:
    seed = drawn.answer["seeds"][number]
    with st.container(horizontal=True, vertical_alignment="center", key="seeds"):
        st.markdown(f"Seed **{seed}**", width="content")
        kept = held("seed") == seed
        st.button(
            "Kept" if kept else "Keep",
            key="keep",
            icon=":material/lock:" if kept else ":material/lock_open:",
            on_click=put,
            args=({"seed": None if kept else seed},),
            help="The next picture is drawn from this seed.",
        )
        st.button("Again, another seed", key="again", icon=":material/casino:", on_click=again, disabled=busy)


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


def _difference(drawn: Drawn, plain: Drawn, number: int) -> None:
    with st.expander("The difference, amplified"):
        amplify = st.slider("Amplify", 1, 64, 8, key="amplify", help="Equal pixels are black.")
        cached, uncached = drawn.pictures[number], plain.pictures[number]
        ratio = psnr(cached, uncached)
        said = "identical" if math.isinf(ratio) else f"PSNR {ratio:.1f} dB"
        st.image(
            _png(difference(cached, uncached, amplify)),
            alt=f"Difference of the two, {amplify} times amplified: {said}",
            caption=f"difference ×{amplify}: {said}",
            width="stretch",
        )
    if drawn.request.get("enable_preview"):
        st.caption(
            "The cached time holds the previews, which no cache makes faster. Switch them off for a fair measurement."
        )


def faster(drawn: Drawn, plain: Drawn) -> str:
    """How the two compare in seconds, in a sentence."""
    if drawn.answer["reused_run"] or plain.answer["reused_run"]:
        return "One of the two had been drawn before and was not drawn again: there are no times to compare."
    speedup = plain.denoise_seconds / drawn.denoise_seconds if drawn.denoise_seconds else math.inf
    return (
        f"Denoising took {drawn.denoise_seconds:.2f} s with the cache and {plain.denoise_seconds:.2f} s without: "
        f"{speedup:.2f}× as fast."
    )


def _png(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
