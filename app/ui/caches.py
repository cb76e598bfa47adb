"""The two caches' expanders. What the model cannot use stays in place, disabled, and says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from app.ui.request import PRESET_NAMES, PRESETS, Model, no_deepcache, no_fbcache, reuse_cost

_BEST = "best measured"
_SCHEDULES = {
    "auto": "auto: where it helps most",
    "uniform": "uniform: every N-th step",
}
_GUIDANCE = {"full": "full: both halves", "reuse": "reuse: the prompt's half alone"}
_GUIDANCE_HELP = "What a reused step runs of a guided batch. reuse forecasts the guidance, at half the cost."
_FORECAST_HELP = "Predict what a reused step skips, and correct it at the next computed one. Off: the published cache."


def _take_preset(name: str) -> None:
    st.session_state["deepcache_enabled"] = True
    for widget, value in PRESETS[name].items():
        st.session_state[widget] = value


def deepcache(model: Model) -> None:
    with st.expander("⚡ DeepCache Acceleration", expanded=True):
        reason = no_deepcache(model)
        if reason is not None:
            st.info(reason, icon=":material/block:")
        st.toggle("Enable DeepCache", key="deepcache_enabled", disabled=reason is not None)
        with st.container(horizontal=True, key="presets"):
            for name, label in PRESET_NAMES.items():
                st.button(label, key=f"preset-{name}", on_click=_take_preset, args=(name,), disabled=reason is not None)
        off = reason is not None or not st.session_state["deepcache_enabled"]
        if off and reason is None:
            st.caption("Off: every step is computed. Enable DeepCache, or take a preset, to set the rest.")
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
            st.caption(_cost(model, st.session_state["deepcache_depth"]))
        st.slider(
            "Start/End Steps",
            0,
            1000,
            key="deepcache_window",
            disabled=off,
            help="Reuse within this part of the noise schedule alone: 0 is pure noise, 1000 the finished picture.",
        )
        schedule, guidance = st.columns(2)
        with schedule:
            _choice("Schedule", _SCHEDULES, "deepcache_schedule", "Where the computed steps lie.", disabled=off)
        with guidance:
            _choice("Guidance in reused steps", _GUIDANCE, "deepcache_guidance", _GUIDANCE_HELP, disabled=off)
        st.toggle("Forecast", key="deepcache_forecast", help=_FORECAST_HELP, disabled=off)


def first_block(model: Model) -> None:
    with st.expander("⚡ First Block Cache (FBCache)", expanded=no_fbcache(model) is None):
        reason = no_fbcache(model)
        if reason is not None:
            st.info(reason, icon=":material/block:")
        st.toggle("Enable FBCache", key="fbcache_enabled", disabled=reason is not None)
        off = reason is not None or not st.session_state["fbcache_enabled"]
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
            "Most reused steps in a row",
            1,
            50,
            key="fbcache_max_consecutive",
            placeholder="no cap",
            disabled=off,
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
