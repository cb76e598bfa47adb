"""Which server a session talks to, what it last said of its models, and what the page says when it does not answer."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from app.client import Client, ClientError
from app.ui.application import KEY_COOKIE, VISITOR
from app.ui.refusal import explained

FRESH_SECONDS = 10.0  # for which the list of models is not asked for again
RETRY_SECONDS = 2.0
AGAIN = f"The page tries again every {RETRY_SECONDS:g} seconds."
IDLE_SECONDS = 3600.0
ANSWER_SECONDS = 120.0


@dataclass
class Connection:
    """Of one session. `models` stay as last heard while the server is away, so that nothing typed is lost.

    `owner`: whose pictures the server shows here; `adapters`: the names of GET /api/adapters.
    """

    server: Client
    owner: str
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    adapters: dict[str, list[str]] = field(default_factory=dict)
    default: str = ""
    error: ClientError | None = None
    _heard: float = -FRESH_SECONDS

    def refresh(self) -> None:
        if self.error is None and time.monotonic() - self._heard < FRESH_SECONDS:
            return
        try:
            catalogue, self.adapters = self.server.catalogue(), self.server.adapters()
            self.models = {row["name"]: row for row in catalogue["models"] if "family" in row}
            self.default = catalogue["default"]
        except ClientError as error:
            self.error = error
        else:
            self.error, self._heard = None, time.monotonic()


def of_session() -> Connection:
    """The session's connection: to the service that shows this page, with the visitor's key and for their address."""
    known: Connection | None = st.session_state.get("connection")
    if known is None:
        key, address = visitor()
        headers = {VISITOR: f"{st.secrets['token']} {address}"}
        client = Client(str(st.secrets["address"]), key=key, headers=headers, timeout=ANSWER_SECONDS)
        known = st.session_state["connection"] = Connection(client, key or address)
    known.refresh()
    return known


def visitor() -> tuple[str | None, str]:
    """The key that whoever looks at the page gave at the door, where one was asked for, and their address."""
    value = st.context.cookies.get(KEY_COOKIE)
    key = base64.urlsafe_b64decode(value).decode() if value else None
    return key, st.context.headers.get(VISITOR, "")


def show(connection: Connection) -> None:
    """What is wrong, if something is, and the way to try again.

    Does not return before it heard of the models once. A run that ended without widgets would have the browser forget
    what it holds of them, which after a restart of the server is all that is left.
    """
    if connection.error is None:
        _comes_back()
        return
    st.error(explained(connection.error), icon=":material/cloud_off:")
    if connection.models:
        _retry(connection)
        return
    st.caption(AGAIN)
    time.sleep(RETRY_SECONDS)
    st.rerun()


@st.fragment(run_every=IDLE_SECONDS)
def _comes_back() -> None:
    """Nothing: where some fragment repeats, Streamlit runs the script when a browser that was cut off is back.

    Without one it does not, and what was clicked meanwhile is lost: a tab that was opened stays empty.
    """


@st.fragment(run_every=RETRY_SECONDS)
def _retry(connection: Connection) -> None:
    st.caption(AGAIN)
    st.button("Try again now", key="retry")
    try:
        connection.server.catalogue()
    except ClientError as error:
        if str(error) == str(connection.error):
            return
        connection.error = error
    st.rerun()
