"""`python -m app serve`, and `models`, what it would serve."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import bar
from app.errors import CannotStart
from app.settings import Settings, read_settings

if TYPE_CHECKING:
    from app.ui.application import Page

_log = logging.getLogger("app")

JOBS_FOLDER = Path("jobs")


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; overrides WAVESPEED_HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; overrides WAVESPEED_PORT.")] = None,
) -> None:
    """Serve the HTTP API and the page until interrupted. Settings come from WAVESPEED_* variables and .env."""
    from app.engine.runner import runner_factory
    from app.engine.supervisor import local_engine
    from app.http.app import create_app
    from app.http.server import serve_until_told
    from app.log import logging_to

    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = read_settings(**given)
    settings = settings.model_copy(update={"jobs_folder": kept_in(settings)})
    check_devices(settings.devices)
    factory = runner_factory(settings)
    with logging_to(settings.log_folder, settings.log_level, settings.log_format, whole_stderr=True) as path:
        _log.info("log file %s, settings changed: %s", path, ", ".join(sorted(settings.model_fields_set)) or "none")
        engine, page = local_engine(settings, factory), page_if_installed(settings)
        serve_until_told(create_app(settings, engine, page), settings, engine, page)


def kept_in(settings: Settings) -> Path | None:
    """The folder of jobs and pictures: JOBS_FOLDER unless a setting names one, or, being empty, none."""
    return settings.jobs_folder if "jobs_folder" in settings.model_fields_set else JOBS_FOLDER


def page_if_installed(settings: Settings) -> Page | None:
    """The page that is shown at /; None without the extra `ui`, or where none is wanted."""
    from app.ui.application import Page

    if not settings.page:
        return None
    if find_spec("streamlit") is None:
        _log.info("Streamlit is not installed: there is no page at /")
        return None
    return Page(settings.max_body_bytes)


def models() -> None:
    """List the models as GET /api/models does, as JSON."""
    from app.engine.runner import runner_factory

    with bar("reading the models"):
        catalogue = runner_factory(read_settings())("cpu").catalogue()
    rows = [asdict(info) for info in catalogue.models.values()]
    print(json.dumps([{name: value for name, value in row.items() if name != "profile"} for row in rows], indent=2))


def check_devices(devices: Sequence[str]) -> None:
    """Raises CannotStart for a CUDA device that there is not, as the driver counts them: torch takes seconds to import.

    Where the driver cannot be asked (AMD's, another system) the worker finds out.
    """
    if sys.platform != "linux" or Path("/dev/kfd").exists():
        return
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            count.value = 0
    except OSError:
        pass  # without a driver there is none
    for device in devices:
        kind, _, number = device.partition(":")
        if kind == "cuda" and int(number or 0) >= count.value:
            raise CannotStart(
                f"WAVESPEED_DEVICES: there is no {device!r}; this machine has {count.value} CUDA devices."
            )
