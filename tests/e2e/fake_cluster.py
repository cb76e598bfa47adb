"""`serve run` with the fake models instead of real ones: what `fake_server` is to the server of one machine."""

from __future__ import annotations

from typing import Any

from ray import serve

from app.ray.application import Scale, application
from app.settings import Settings
from tests.app.fakes import fake_runner


def build(arguments: dict[str, Any]) -> serve.Application:
    return application(Settings(), fake_runner, Scale.model_validate(arguments))
