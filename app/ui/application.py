"""The page as an ASGI application, which the server shows at /. Streamlit is imported when it starts."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send
    from streamlit import App

SCRIPT = Path(__file__).with_name("page.py")
_MB = 2**20


def options(largest_upload: int) -> dict[str, object]:
    """Streamlit's: no usage statistics, no stack traces, no watching of files, no origin check of its own.

    The service checks origins before Streamlit sees a request; Streamlit's check would ask the internet for the
    machine's address. `largest_upload`: bytes.
    """
    return {
        "browser.gatherUsageStats": False,
        "client.showErrorDetails": "none",
        "client.toolbarMode": "minimal",
        "logger.level": "warning",
        "server.disconnectedSessionTTL": 120,
        "server.enableAgentApi": False,
        "server.enableCORS": False,
        "server.enableXsrfProtection": False,
        "server.fileWatcherType": "none",
        "server.headless": True,
        "server.maxUploadSize": max(1, largest_upload * 3 // 4 // _MB),  # base64 of it is what the service reads
    }


class Page:
    """`address`: of the service that it asks. `token`: by which the service knows its requests.

    Streamlit's settings are the process's: one page a process.
    """

    def __init__(self, largest_upload: int) -> None:
        self.address = ""
        self.token = secrets.token_urlsafe()
        self._largest_upload = largest_upload
        self._app: App | None = None

    def lifespan(self) -> Callable[[Any], AbstractAsyncContextManager[None]]:
        from streamlit import App, config

        for name, value in options(self._largest_upload).items():
            config.set_option(name, value)
        _give_back_loggers()
        self._app = App(SCRIPT, secrets={"address": self.address, "token": self.token})
        return self._app.lifespan()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            raise RuntimeError("the page is asked for before its lifespan")
        await self._app(scope, receive, send)


def _give_back_loggers() -> None:
    """Streamlit takes the HTTP server's loggers for its own when it is imported: lines of its form, on stderr alone."""
    for name in ("uvicorn", "uvicorn.access", "uvicorn.asgi", "uvicorn.error", "websockets"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
