"""A server on a socket, with the fake models, for the client packages to talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.server import Server, running

NAMED = ("-m", "tests.clients.named_server")
KEY = "a-key"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with running(NAMED, WAVESPEED_DEVICE="cpu") as server:
        yield server


@pytest.fixture(scope="session")
def locked() -> Iterator[Server]:
    """Asks for a key, and has room for one waiting job."""
    with running(NAMED, WAVESPEED_DEVICE="cpu", WAVESPEED_API_KEYS=KEY, WAVESPEED_QUEUE_SIZE="1") as server:
        yield server
