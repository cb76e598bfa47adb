"""The engine and the models as an operator's settings want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from app.engine.local import LocalEngine
from app.engine.runner import RegistryRunner, configured_runner
from app.engine.slot import Patience
from app.engine.worker import RunnerFactory
from app.settings import Settings
from models.base import UnknownModel
from models.models_file import read


def runner_arguments(settings: Settings) -> dict[str, Any]:
    """Of `configured_runner`. Raises ModelError, before anything is started."""
    configuration = read(settings.models_file)
    if settings.model is not None:
        names = [spec.name for spec in configuration.specs]
        if settings.model not in names:
            raise UnknownModel(f"WAVESPEED_MODEL is {settings.model!r}; there is no such model but {', '.join(names)}.")
        configuration = replace(configuration, default=settings.model)
    return {"configuration": configuration, "threads": settings.threads, "memory": settings.model_memory}


def runner_factory(settings: Settings) -> RunnerFactory:
    """Raises ModelError, before anything is started."""
    return partial(configured_runner, **runner_arguments(settings))


def runner_here(settings: Settings) -> RegistryRunner:
    """In this process, on the first of the settings' devices: what the commands draw with. Raises ModelError."""
    return configured_runner(settings.devices[0], **runner_arguments(settings))


def local_engine(settings: Settings, factory: RunnerFactory, devices: Sequence[str] | None = None) -> LocalEngine:
    """`devices` instead of those of the settings, if given."""
    return LocalEngine(
        factory,
        settings.devices if devices is None else devices,
        queue_size=settings.queue_size,
        stop_seconds=settings.stop_seconds,
        patience=Patience(silence=settings.silence_seconds, stall=settings.stall_seconds, load=settings.load_seconds),
        quarantine_seconds=settings.quarantine_seconds,
        max_batch_size=settings.max_batch_size,
        batch_timeout=settings.batch_timeout,
    )
