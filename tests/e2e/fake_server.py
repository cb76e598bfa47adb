"""`app serve` with the fake models instead of real ones: up in a second, and each model fails in its own way."""

from __future__ import annotations

from app.engine.supervisor import LocalEngine
from app.http.app import create_app
from app.http.server import serve_until_told
from app.log import logging_to
from app.settings import Settings
from tests.app.fakes import fake_runner


def main() -> None:
    settings = Settings(port=0)
    with logging_to(settings.log_folder, settings.log_level, settings.log_format, whole_stderr=True):
        engine = LocalEngine(fake_runner, ["cpu"], queue_size=settings.queue_size, backoff=(0.01, 0.1))
        serve_until_told(create_app(settings, engine), settings, engine)


if __name__ == "__main__":
    main()
