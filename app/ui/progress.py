"""A run while it lasts: how far it is, its steps as they fall, previews, and the way to stop it."""

from __future__ import annotations

import streamlit as st

from app.client import ClientError
from app.ui import strip
from app.ui.run import Progress, Run

EVERY_SECONDS = 0.5


@st.fragment(run_every=EVERY_SECONDS)
def show(run: Run) -> None:
    """Reruns the page when the run has ended."""
    if run.ended.is_set():
        st.rerun()
    progress = run.progress
    what = "The uncached picture" if run.purpose == "compare" else "Drawing"
    share = progress.step / progress.total if progress.total else 0.0
    st.progress(share, text=f"{what}: {_said(run, progress)}, {run.seconds:.0f} s")
    st.html(strip.html(progress.decisions, progress.total))
    if progress.preview is not None:
        st.image(progress.preview, alt=f"Preview after step {progress.step}", width=384)
    st.button("Cancel", key="cancel", on_click=run.cancel, icon=":material/stop_circle:")


def _said(run: Run, progress: Progress) -> str:
    match progress.state:
        case "queued":
            return f"waiting, place {progress.position}" if progress.position else "waiting"
        case "running" if progress.step:
            return f"step {progress.step} of {progress.total}"
        case "running":
            return _loading(run)
        case "fetching":
            return "fetching the picture"
        case _:
            return "sending"


def _loading(run: Run) -> str:
    """A first request loads its model, which may take long: what the worker is at."""
    try:
        stages = [device["loading"] for device in run.server.telemetry()["devices"] if device["loading"]]
    except ClientError:
        stages = []
    return f"loading {', '.join(stages)}" if stages else "starting"
