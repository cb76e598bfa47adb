"""The script that Streamlit runs, anew whenever a widget changes."""

from __future__ import annotations

import streamlit as st

from app.client import Client
from app.ui import caches, connection, form, history, progress, result, telemetry
from app.ui.history import Drawn
from app.ui.request import DEFAULTS, Model, body, uncached
from app.ui.run import Run

TABS = ("Draw", "History", "Telemetry")
STYLE = """<style>
  .stMainBlockContainer { padding-top: 3rem; }
  :focus-visible { outline: 3px solid #0b57d0; outline-offset: 2px; }
  /* Streamlit's grey of small print is too faint to read. */
  [data-testid="stCaptionContainer"], [data-testid="stCaptionContainer"] * { color: inherit; }
  [data-testid="stImageCaption"] { color: inherit; }
</style>"""


def main() -> None:
    st.set_page_config(page_title="WaveSpeed", page_icon="⚡", layout="wide")
    st.html(STYLE)
    st.title("WaveSpeed")
    connected = connection.of_session()
    connection.show(connected)
    if not connected.models:
        return
    _collect()
    model = form.begin(connected.default, connected.models)
    draw, past, watch = st.tabs(TABS, key="tab", on_change="rerun")
    with draw:
        # On a phone the columns stack: the picture comes between the button and the settings.
        picture, settings = st.columns([3, 2], gap="large")
        with picture:
            form.prompt()
            _button(connected.server, model)
            _outcome()
        with settings:
            form.show(model, connected.models)
            caches.deepcache(model)
            caches.first_block(model)
    with past:
        if past.open:
            history.show()
    with watch:
        telemetry.show(connected.server, visible=bool(watch.open))


def _running() -> Run | None:
    run: Run | None = st.session_state.get("run")
    return run


def _button(server: Client, model: Model) -> None:
    empty = not st.session_state["prompt"].strip()
    st.button(
        "Generate",
        key="generate",
        type="primary",
        width="stretch",
        shortcut="Ctrl+Enter",
        on_click=_draw,
        args=(server, model),
        disabled=_running() is not None or not model["available"] or empty,
    )
    if empty:
        st.caption("Write a prompt first.")


def _draw(server: Client, model: Model) -> None:
    values = {name: st.session_state[name] for name in DEFAULTS}
    st.session_state["failure"] = None
    st.session_state["run"] = Run(server, body(values, model), "draw", values).start()


def _compare(drawn: Drawn) -> None:
    server: Client = st.session_state["connection"].server
    st.session_state["failure"] = None
    st.session_state["compared"] = drawn
    st.session_state["run"] = Run(server, uncached(drawn.body, drawn.answer), "compare", drawn.values).start()


def _collect() -> None:
    """Take over what a run that has ended brought."""
    run = _running()
    if run is None or not run.ended.is_set():
        return
    st.session_state["run"] = None
    ended = run.progress
    if ended.drawn is None:
        st.session_state["failure"] = ended.error or "Cancelled."
        return
    drawn = Drawn.of(run.values, run.body, ended.drawn)
    if run.purpose == "compare":
        st.session_state["compared"].plain = drawn
    else:
        history.add(drawn)
        st.session_state["shown"] = drawn


def _outcome() -> None:
    run = _running()
    if run is not None:
        progress.show(run)
    if failure := st.session_state.get("failure"):
        (st.info if failure == "Cancelled." else st.error)(failure)
    shown: Drawn | None = st.session_state.get("shown")
    if shown is not None and (run is None or run.purpose == "compare"):
        result.show(shown, _compare, busy=run is not None)
    elif run is None:
        st.info("The picture will be here. Press Generate, or Ctrl+Enter.")


if __name__ == "__main__":
    main()
