"""What every test shares."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from app.engine.runner import share_cores

share_cores()
os.environ["XDG_DATA_HOME"] = os.devnull  # what the user of this machine has calibrated changes no picture here

HAS_RAY = find_spec("ray") is not None

# The same examples in every run, and as long for each as a busy machine takes: Hypothesis's own limit is 0.2 seconds.
settings.register_profile("wavespeed", deadline=None, derandomize=True, database=None)
settings.load_profile("wavespeed")


LONGEST = ("e2e", "accelerator", "ui", "embedded", "compatibility")
"""Folders that come first, so that processes which share the files end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = Path(__file__).parent
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(folders).parts[0], len(LONGEST)))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Coroutine tests run on asyncio, the loop that uvicorn uses."""
    return "asyncio"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two worker replicas of fake models on Ray, for the whole session: see tests/cluster.py."""
    if not HAS_RAY:
        pytest.skip("Ray is an extra that is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about what it imports
        from tests.cluster import started

    with started(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
