"""An app over an engine, and a client of it that needs no socket."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from app.engine.types import Engine
from app.http.app import create_app
from app.settings import Settings
from tests.app.children import Nursery
from tests.app.fakes import FakeEngine
from tests.conftest import HAS_RAY


@asynccontextmanager
async def client_of(engine: Engine, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """The engine is started and stopped by the app, as in the server."""
    app = create_app(Settings(_env_file=None, **settings), engine)  # type: ignore[arg-type, call-arg]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the settings of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("WAVESPEED_", "LD_SERVER", "LD_MAX", "LD_BATCH")):
            monkeypatch.delenv(name)


@pytest.fixture(params=["fake", "ray"] if HAS_RAY else None)
def engine(request: pytest.FixtureRequest) -> Any:
    """Where Ray is installed, the same tests run on worker replicas too."""
    if getattr(request, "param", "fake") == "fake":
        return FakeEngine()
    cluster = request.getfixturevalue("cluster")
    from tests.cluster import RecordingRayEngine

    return RecordingRayEngine(cluster)


@pytest.fixture
def nursery() -> Nursery:
    return Nursery()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine) as client:
        yield client
