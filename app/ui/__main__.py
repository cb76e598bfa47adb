"""`python -m app.ui`: serves the page."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from app.ui.settings import PageSettings

PAGE = Path(__file__).with_name("page.py")


def options(settings: PageSettings) -> list[str]:
    """Streamlit's: no usage statistics, no stack traces, no watching of files."""
    listening = {"server.address": settings.host, "server.port": settings.port}
    fixed = {
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "none",
        "client.toolbarMode": "minimal",
    }
    return [f"--{name}={value}" for name, value in {**listening, **fixed}.items()]


def main(
    server: Annotated[str | None, typer.Option(help="The server's address; overrides WAVESPEED_UI_SERVER.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; overrides WAVESPEED_UI_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; overrides WAVESPEED_UI_PORT.")] = None,
) -> None:
    """Serve the page until interrupted."""
    given = {name: value for name, value in (("server", server), ("host", host), ("port", port)) if value is not None}
    try:
        settings = PageSettings(**given)  # type: ignore[arg-type]  # checked by pydantic
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            where = "".join(f"WAVESPEED_UI_{str(name).upper()}: " for name in fault["loc"])
            print(f"{where}{fault['msg'].removeprefix('Value error, ')}.", file=sys.stderr)
        raise typer.Exit(2) from None
    os.environ["WAVESPEED_UI_SERVER"] = settings.server
    command = [sys.executable, "-m", "streamlit", "run", str(PAGE), *options(settings)]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    typer.run(main)
