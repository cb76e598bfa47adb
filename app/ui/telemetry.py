"""The server's telemetry, now and while it is looked at."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Mapping
from typing import Any

import streamlit as st

from app.client import Client, ClientError
from app.ui.refusal import explained

EVERY_SECONDS = 2.0
KEPT = 1800  # samples: an hour
CACHES = {"deepcache": "DeepCache", "fbcache": "FBCache", "fitted": "Fitted forecast"}


def sample(telemetry: Mapping[str, Any], at: datetime.datetime) -> dict[str, Any]:
    """A row of the curves. Rates of a cache that has not been used yet are None: no point is drawn."""
    memory, caches = telemetry["memory_info"], telemetry["cache"]
    row = {"time": at, "VRAM used, GB": memory["used_vram"], "Memory of the server, MB": memory["system_ram_mb"]}
    for name, label in CACHES.items():
        used = caches[name]["requests"] > 0
        row[f"{label}, last 100 requests"] = caches[name]["recent_hit_rate"] if used else None
        row[f"{label}, since the start"] = caches[name]["hit_rate"] if used else None
    return row


@st.fragment(run_every=EVERY_SECONDS)
def show(server: Client) -> None:
    """Samples while it is looked at."""
    samples: deque[dict[str, Any]] = st.session_state.setdefault("samples", deque(maxlen=KEPT))
    try:
        telemetry = server.telemetry()
    except ClientError as error:
        st.error(explained(error))
        return
    samples.append(sample(telemetry, datetime.datetime.now()))
    _numbers(telemetry)
    _curves(telemetry, list(samples))


def _numbers(telemetry: Mapping[str, Any]) -> None:
    memory = telemetry["memory_info"]
    with st.container(horizontal=True):
        st.metric("Waiting", telemetry["pending_count"], width="content")
        st.metric("Drawing", telemetry["running_count"], width="content")
        st.metric("Requests done", telemetry["requests_processed"], width="content")
        st.metric("Pictures", telemetry["images_produced"], width="content")
        st.metric("VRAM", f"{memory['used_vram']:.1f} of {memory['total_vram']:.1f} GB", width="content")
        for name, label in CACHES.items():
            cache = telemetry["cache"][name]
            rate = f"{cache['hit_rate']:.0%}" if cache["requests"] else "not used yet"
            st.metric(f"{label} hit rate", rate, width="content")
    for device in telemetry["devices"]:
        doing = f"loading {device['loading']}" if device["loading"] else device["state"]
        holds = ", ".join(device["loaded_models"]) or "no model"
        st.caption(f"{device['device']} ({device['name']}): {doing}, holds {holds}")


def _curves(telemetry: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
    rates = [name for name in samples[-1] if "requests" in name or "start" in name]
    st.subheader("Hit rate")
    if any(samples[-1][name] is not None for name in rates):
        st.line_chart(samples, x="time", y=rates, x_label="", y_label="reused share of the calls", height=260)
    else:
        st.info("No cached request yet. Enable DeepCache on the Draw tab and generate.")
    if telemetry["memory_info"]["total_vram"]:
        st.subheader("VRAM")
        st.line_chart(samples, x="time", y="VRAM used, GB", x_label="", height=220)
    else:
        st.subheader("Memory")
        st.caption("The server has no GPU: its VRAM figures are 0. This is its processes' memory.")
        st.line_chart(samples, x="time", y="Memory of the server, MB", x_label="", height=220)
