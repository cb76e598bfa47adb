"""The script that Streamlit runs, anew whenever a widget changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from app.client import Client
from app.ui import caches, connection, form, gallery, progress, result, scenes, source, telemetry
from app.ui.connection import Connection
from app.ui.gallery import LEFT_OUT, Actions, Drawn
from app.ui.request import Model, body, widgets
from app.ui.run import Run

TABS = ("Draw", "Gallery", "Telemetry")
STYLE = """<style>
  .stMainBlockContainer { padding-top: 2.5rem; padding-bottom: 3rem; }
  .stMainBlockContainer h1 { font-size: 1.75rem; padding: 0; }
  :focus-visible { outline: 3px solid #2f6fed; outline-offset: 2px; }
  /* Streamlit's grey of small print is too faint to read. */
  [data-testid="stCaptionContainer"] { opacity: 0.85; }
  [data-testid="stImageCaption"] { color: inherit; }
  .st-key-scene { gap: 0.25rem; }
  .st-key-begun-box { display: none; }
  /* While the browser is cut off no script runs; Streamlit's own dialog can be closed. */
  .stApp:not([data-test-connection-state=CONNECTED]) .stMainBlockContainer::before {
    content: "The server is away. The page goes on when it is back."; display: block; position: sticky; top: 0.5rem;
    z-index: 1; margin-bottom: 1rem; padding: 0.75rem 1rem; border-radius: 0.5rem; background: #a3211b; color: white; }
  @media (max-width: 640px) { .stMainBlockContainer { padding-left: 1rem; padding-right: 1rem; } }
</style>"""


def main() -> None:
    st.set_page_config(page_title="WaveSpeed", page_icon="⚡", layout="wide")
    st.html(STYLE)
    st.title("WaveSpeed", anchor=False)
    connected = connection.of_session()
    connection.show(connected)
    if not connected.models:
        return
    _collect(connected.server)
    taken_over = form.brought()
    model = form.begin(connected.default, connected.models, connected.adapters, as_brought=taken_over)
    if not taken_over:
        scenes.begin()
    draw, past, watch = st.tabs(TABS, key="tab", on_change="rerun")
    with draw:
        _draw_tab(connected, model)
    with past:
        if past.open:
            gallery.show(connected.server, connected.owner, _actions(), _upscaler(), busy=_running() is not None)
    with watch:
        if watch.open:
            telemetry.show(connected.server)
    if taken_over:
        st.rerun()


def _draw_tab(connected: Connection, model: Model) -> None:
    # On a phone the columns stack: the picture comes between the button and the settings.
    picture, settings = st.columns([3, 2], gap="large")
    with picture:
        form.prompt()
        scenes.show(connected.server, model)
        _button(model)
        _outcome(model)
    with settings:
        caches.show(model, from_picture=source.beginning() is not None)
        form.size(model)
        form.seed()
        source.show(connected.server, model, _restore, connected.adapters["controlnets"])
        form.finer(model, connected.models)
        form.passes(connected.adapters)
        form.styles(connected.adapters)


def _running() -> Run | None:
    run: Run | None = st.session_state.get("run")
    return run


def _connected() -> Connection:
    connected: Connection = st.session_state["connection"]
    return connected


def _upscaler() -> str | None:
    """The chosen one, or the first that there is."""
    chosen: str | None = form.held("upscale")
    return chosen or next(iter(_connected().adapters["upscalers"]), None)


def _button(model: Model) -> None:
    empty = not form.held("prompt").strip()
    st.button(
        "Generate",
        key="generate",
        type="primary",
        width="stretch",
        shortcut="Ctrl+Enter",
        on_click=_draw,
        args=(model,),
        disabled=_running() is not None or not model["available"] or empty,
    )
    if empty:
        st.caption("Write a prompt first.")


def _start(body: Mapping[str, Any], purpose: str = "draw") -> None:
    st.session_state["failure"] = None
    st.session_state["run"] = Run(_connected().server, body, purpose).start()


def _draw(model: Model) -> None:
    if source.paints() and source.mask() is None:
        st.session_state["failure"] = "Paint what is to be drawn anew first, or switch the painting off."
        return
    _start(body(form.values(), model, source.beginning(), source.mask(), source.control()))


def _again(model: Model) -> None:
    form.put({"seed": None})
    _draw(model)


def _open(drawn: Drawn) -> None:
    st.session_state["shown"], st.session_state["failure"] = drawn, None
    st.session_state["tab"] = TABS[0]


def _restore(fields: Mapping[str, Any]) -> None:
    """A model that is not here any more leaves the chosen one."""
    models = _connected().models
    name = str(fields["model"] if fields.get("model") in models else st.session_state["model"])
    form.put(widgets({**fields, "model": name}, models[name]))
    source.remove()


def _reuse(drawn: Drawn) -> None:
    _restore({**drawn.request, "seed": drawn.answer["seeds"][0], "model": drawn.answer["model"]})
    _open(drawn)


def _begin_from(drawn: Drawn, number: int) -> None:
    models = _connected().models
    source.take(drawn.pictures[number], models[st.session_state["model"]])
    st.session_state["tab"] = TABS[0]


def _uncached(drawn: Drawn) -> None:
    _open(drawn)
    st.session_state["compared"] = drawn
    _start({"rerender": drawn.job.id}, "compare")


def _upscale(drawn: Drawn) -> None:
    """The same request once more: the server goes on from the run that it has kept."""
    _open(drawn)
    if LEFT_OUT in drawn.request:
        st.session_state["failure"] = (
            "That picture was drawn from another one, which is not kept: it cannot be drawn once more."
        )
        return
    _start({**drawn.request, "upscale": _upscaler(), "enable_preview": False})


def _delete(drawn: Drawn) -> None:
    drawn.job.forget()
    if st.session_state.get("shown") is not None and st.session_state["shown"].job.id == drawn.job.id:
        st.session_state["shown"] = None


def _actions() -> Actions:
    return Actions(_open, _reuse, _begin_from, _uncached, _upscale, _delete)


def _collect(server: Client) -> None:
    """Take over what a run that has ended brought; after the page was loaded anew, the run that is under way."""
    state = st.session_state
    if "run" not in state:
        job = gallery.under_way(server)
        state["run"] = None if job is None else Run(server, {}, joined=job).start()
    run = _running()
    if run is None or not run.ended.is_set():
        return
    state["run"] = None
    ended = run.progress
    if ended.drawn is None:
        state["failure"] = ended.error or "Cancelled."
        return
    drawn = Drawn.of(ended.drawn)
    if run.purpose == "compare":
        state["compared"].plain = drawn
    else:
        state["shown"] = drawn


def _outcome(model: Model) -> None:
    run = _running()
    if run is not None:
        progress.show(run)
    if failure := st.session_state.get("failure"):
        (st.info if failure == "Cancelled." else st.error)(failure)
    shown: Drawn | None = st.session_state.get("shown")
    if shown is not None and (run is None or run.purpose == "compare"):
        result.show(shown, _actions(), lambda: _again(model), _upscaler(), busy=run is not None)
    elif run is None:
        st.info("The picture will be here. Press Generate, or Ctrl+Enter.")


if __name__ == "__main__":
    main()
