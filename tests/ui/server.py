"""The fake server; `fine` is bound in its sizes as the embedded models are. With the argument `page`: its page.

Its worker knows no models before the file STARTS_WITH is there, if the environment names one.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from app.engine.runner import RegistryRunner
from app.engine.supervisor import LocalEngine
from app.http.app import create_app
from app.http.server import serve_until_told
from app.log import logging_to
from app.settings import Settings
from app.ui.application import Page
from tests.app.fakes import FakeRegistry


class ScenicRegistry(FakeRegistry):
    def describe(self) -> list[dict[str, Any]]:
        rows = super().describe()
        return [{**row, "render_sizes": [(96, 64)]} if row["name"] == "fine" else row for row in rows]


def scenic_runner(device: str) -> RegistryRunner:
    awaited = os.environ.get("STARTS_WITH")
    while awaited is not None and not Path(awaited).exists():
        time.sleep(0.05)
    return RegistryRunner(ScenicRegistry(), "fake device")


def main() -> None:
    settings = Settings()
    page = Page(settings.max_body_bytes) if "page" in sys.argv[1:] else None
    with logging_to(settings.log_folder, settings.log_level, settings.log_format, whole_stderr=True):
        engine = LocalEngine(scenic_runner, ["cpu"], queue_size=settings.queue_size, backoff=(0.01, 0.1))
        serve_until_told(create_app(settings, engine, page), settings, engine, page)


if __name__ == "__main__":
    main()
