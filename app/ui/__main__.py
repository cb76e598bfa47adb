"""The page's process: Streamlit behind a Unix socket. The service starts it, and writes it its settings."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import uvicorn
from streamlit import App, config

SCRIPT = Path(__file__).with_name("page.py")
_MB = 2**20


def options(largest_upload: int) -> dict[str, object]:
    """Streamlit's: no usage statistics, no stack traces, no watching of files, no origin check of its own.

    The service has checked the origin of whatever arrives here; Streamlit's check would ask the internet for the
    machine's address. `largest_upload`: bytes.
    """
    return {
        "browser.gatherUsageStats": False,
        "client.showErrorDetails": "none",
        "client.toolbarMode": "minimal",
        "logger.level": "warning",
        "runner.postScriptGC": False,  # a collection of everything after each run of a script
        "server.enableAgentApi": False,
        "server.enableCORS": False,
        "server.enableXsrfProtection": False,
        "server.fileWatcherType": "none",
        "server.headless": True,
        "server.maxUploadSize": max(1, largest_upload * 3 // 4 // _MB),  # base64 of it is what the service reads
        "theme.primaryColor": "#2f6fed",
        "theme.dark.primaryColor": "#3d7bf0",
    }


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_service, daemon=True).start()
    for name, value in options(settings["largest_upload"]).items():
        config.set_option(name, value)
    page = App(SCRIPT, secrets={"address": settings["address"], "token": settings["token"]})
    uvicorn.run(
        page,
        uds=settings["socket"],
        http="h11",
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        ws_max_size=64 * _MB,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=60,  # longer than the service keeps a connection: no request meets one that is being closed
    )


def _end_with_the_service() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
