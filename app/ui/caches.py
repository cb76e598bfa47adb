"""How fast: one slider, or by hand each cache's own knobs, of which only what the model can use is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from app.ui.form import held
from app.ui.request import PRESET_NAMES, PRESETS, SPEEDS, Model, no_cache, no_deepcache, reuse_cost

_BEST = "best measured"
_SCHEDULES = {
    "auto": "auto: where it helps most",
    "uniform": "uniform: every N-th step",
}
_GUIDANCE = {"full": "full: both halves", "reuse": "reuse: the prompt's half alone"}
_GUIDANCE_HELP = "What a reused step runs of a guided batch. reuse forecasts the guidance, at half the cost."
_FORECAST_HELP = "Predict what a reused step skips, and correct it at the next computed one. Off: the published cache."
_SPEED_HELP = (
    "How much faster than without a cache, as near to the uncached picture as the model allows. What was measured of "
    "the model chooses the settings; Balanced is a preset."
)


def show(model: Model, *, from_picture: bool) -> None:
    reason = no_cache(model, from_picture=from_picture)
    by_hand = bool(held("by_hand"))
    st.select_slider(
        "Speed",
        SPEEDS,
        key="speed",
        format_func=_speed,
        disabled=by_hand or reason is not None,
        help=_SPEED_HELP,
    )
    if reason is not None:
        st.caption(reason)
        return
    with st.expander("Cache by hand" + (", instead of the slider" if by_hand else ""), expanded=by_hand):
        st.toggle("Set the cache by hand", key="by_hand", help="The slider rests meanwhile.")
        if by_hand and no_deepcache(model) is None:
            _deepcache(model)
        elif by_hand:
            _first_block()


def _speed(place: float | str) -> str:
    match place:
        case "off":
            return "no cache"
        case "balanced":
            return "Balanced"
    return f"{place:g}×"


def _take_preset(name: str) -> None:
    st.session_state["deepcache_enabled"] = True
    for widget, value in PRESETS[name].items():
        st.session_state[widget] = value


def _deepcache(model: Model) -> None:
    st.toggle("DeepCache", key="deepcache_enabled")
    with st.container(horizontal=True, key="presets"):
        for name, label in PRESET_NAMES.items():
            st.button(label, key=f"preset-{name}", on_click=_take_preset, args=(name,))
    off = not held("deepcache_enabled")
    st.slider(
        "Cache Interval",
        1,
        10,
        key="deepcache_interval",
        disabled=off,
        help="One step in so many is computed in full. 1 caches nothing; higher is faster and coarser.",
    )
    st.slider(
        "Cache Depth",
        0,
        12,
        key="deepcache_depth",
        disabled=off,
        help="At depth d a reused step costs at most 1/(d + 2) of a computed one; higher is faster and coarser.",
    )
    if not off:
        st.caption(_cost(model, held("deepcache_depth")))
    st.slider(
        "Start/End Steps",
        0,
        1000,
        key="deepcache_window",
        disabled=off,
        help="Reuse within this part of the noise schedule alone: 0 is pure noise, 1000 the finished picture.",
    )
    _choice("Schedule", _SCHEDULES, "deepcache_schedule", "Where the computed steps lie.", disabled=off)
    _choice("Guidance in reused steps", _GUIDANCE, "deepcache_guidance", _GUIDANCE_HELP, disabled=off)
    st.toggle("Forecast", key="deepcache_forecast", help=_FORECAST_HELP, disabled=off)


def _first_block() -> None:
    st.toggle("First Block Cache", key="fbcache_enabled")
    off = not held("fbcache_enabled")
    st.slider(
        "Residual Difference Threshold",
        0.0,
        1.0,
        step=0.01,
        key="fbcache_threshold",
        disabled=off,
        help="A step is reused while the first block changes by less. 0 never reuses; higher is faster.",
    )
    st.number_input(
        "Most reused steps in a row", 1, 50, key="fbcache_max_consecutive", placeholder="no cap", disabled=off
    )
    st.toggle("Forecast", key="fbcache_forecast", help=_FORECAST_HELP, disabled=off)


def _choice(label: str, choices: Mapping[Any, str], key: str, hint: str, *, disabled: bool) -> None:
    """One of `choices`, which are shown by their descriptions; none of them is the best measured one."""
    st.selectbox(
        label,
        list(choices),
        format_func=choices.__getitem__,
        key=key,
        placeholder=_BEST,
        disabled=disabled,
        help=hint,
    )


def _cost(model: Model, depth: int) -> str:
    branch, cost = reuse_cost(model, depth)
    if branch is None:
        return f"At depth {depth} a reused step of {model['name']} runs no layer at all: its prediction is forecast."
    return f"At depth {depth} a reused step of {model['name']} costs {cost:.0%} of a computed one (branch {branch})."
