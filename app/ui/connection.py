"""Which server a session talks to, what it last said of its models, and what the page says when it does not answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from app.client import ApiError, Client, ClientError
from app.ui.refusal import explained
from app.ui.settings import PageSettings

FRESH_SECONDS = 10.0  # for which the list of models is not asked for again
RETRY_SECONDS = 2.0
ANSWER_SECONDS = 30.0


@dataclass
class Connection:
    """Of one session. `models` stay as last heard while the server is away, so that nothing typed is lost."""

    server: Client
    address: str
    key: str
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    default: str = ""
    error: ClientError | None = None
    _heard: float = -FRESH_SECONDS

    def refresh(self) -> None:
        if self.error is None and time.monotonic() - self._heard < FRESH_SECONDS:
            return
        try:
            catalogue = self.server.catalogue()
            self.models = {row["name"]: row for row in catalogue["models"] if "family" in row}
            self.default = catalogue["default"]
        except ClientError as error:
            self.error = error
        except (KeyError, TypeError):
            self.error = ClientError(f"What answers at {self.address} is no WaveSpeed server. Set WAVESPEED_UI_SERVER.")
        else:
            self.error, self._heard = None, time.monotonic()


def of_session(settings: PageSettings) -> Connection:
    """The session's connection, with the key that was typed into the page, else the operator's."""
    key = str(st.session_state.get("api_key", "")).strip() or settings.api_key
    known: Connection | None = st.session_state.get("connection")
    if known is None or (known.address, known.key) != (settings.server, key):
        client = Client(settings.server, key=key or None, timeout=ANSWER_SECONDS)
        if known is not None and st.session_state.get("run") is None:  # a run goes on with the client that it has
            known.server.close()
        kept = (known.models, known.default) if known is not None else ({}, "")
        known = st.session_state["connection"] = Connection(client, settings.server, key, *kept)
    known.refresh()
    return known


def show(connection: Connection) -> None:
    """Where the server is and the key for it; open where a key is what is missing."""
    wants_key = isinstance(connection.error, ApiError) and connection.error.status == 401
    with st.expander(f"Server `{connection.address}`", expanded=wants_key):
        st.text_input(
            "API key",
            type="password",
            key="api_key",
            help="Only where the server's operator has set keys. It is kept for as long as this page is open.",
        )
    if connection.error is not None:
        st.error(explained(connection.error), icon=":material/cloud_off:")
        if not wants_key:
            _retry(connection)


@st.fragment(run_every=RETRY_SECONDS)
def _retry(connection: Connection) -> None:
    st.caption(f"The page tries again every {RETRY_SECONDS:g} seconds.")
    st.button("Try again now", key="retry")
    try:
        connection.server.catalogue()
    except ClientError as error:
        if str(error) == str(connection.error):
            return
        connection.error = error
    st.rerun()
