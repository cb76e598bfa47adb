"""The service as an application of Ray Serve: one ingress that answers HTTP, worker replicas that draw."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from app.engine.runner import runner_factory
from app.engine.worker import RunnerFactory
from app.http.app import create_app
from app.log import logging_to
from app.ray.engine import RayEngine
from app.ray.replica import Replica
from app.settings import Settings

_CONNECTIONS = 10_000  # answered at a time by the ingress: what it takes is bounded by queue_size, not by Serve
_ANSWERING = 10.0  # seconds to write the last answers once every job is settled
# Seconds between two tries to hand out a job while all are busy. Serve's own half a second is idle time of a device.
_ROUTER = RequestRouterConfig(initial_backoff_s=0.005, max_backoff_s=0.05)


class Scale(BaseModel):
    """The arguments of `build`: how many replicas there are and what each is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(1, ge=1, description="Worker replicas; with max_replicas, the fewest.")
    max_replicas: int | None = Field(None, ge=1, description="Most replicas, as demand wants; unset: always as many.")
    waiting: float = Field(1.0, ge=0, description="Jobs that may wait for each replica before another one is started.")
    gpus: float = Field(0.0, ge=0, description="GPUs of a replica, as Ray counts them. 0: it draws on the CPU.")
    cpus: float = Field(1.0, ge=0, description="CPU cores of a replica, as Ray counts them.")
    jobs: int = Field(1, ge=1, description="Jobs that a replica is handed at a time; its worker draws one, or a group.")
    models: int = Field(4, ge=1, description="Models that requests are sent to a replica for, the last ones it drew.")

    @model_validator(mode="after")
    def _in_order(self) -> Scale:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("max_replicas is less than replicas")
        return self


class Ingress:
    """One replica only: the jobs of /api/jobs, their events and the counters live in its memory."""

    def __init__(self, workers: DeploymentHandle[Any], settings: Settings, *, at_once: bool) -> None:
        self._workers = workers
        self._at_once = at_once
        self._settings = settings
        self._stack = ExitStack()
        self._stack.enter_context(logging_to(settings.log_folder, settings.log_level, settings.log_format))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's name for it: called where the replica runs, since an app with an engine cannot be sent there."""
        engine = RayEngine(
            self._workers,
            serve.get_replica_context().app_name,
            queue_size=self._settings.queue_size,
            at_once=self._at_once,
            drain_seconds=self._settings.drain_seconds,
        )
        return create_app(self._settings, engine)

    def __del__(self) -> None:
        self._stack.close()


def application(settings: Settings, factory: RunnerFactory, scale: Scale) -> serve.Application:
    """Raises ValueError for settings that Ray does not leave to us."""
    device = "cuda" if scale.gpus else "cpu"
    if settings.devices not in (("auto",), (device,)):
        raise ValueError("On Ray a replica has the device that `gpus` says: leave WAVESPEED_DEVICES unset.")
    on_device = settings.model_copy(update={"devices": (device,)})
    workers = serve.deployment(Replica).options(
        name="Worker",
        **_replicas(scale),
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        max_ongoing_requests=scale.jobs,
        request_router_config=_ROUTER,
        graceful_shutdown_timeout_s=settings.drain_seconds + settings.stop_seconds,
        health_check_period_s=5.0,
        health_check_timeout_s=settings.silence_seconds,
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_CONNECTIONS,
        graceful_shutdown_timeout_s=settings.drain_seconds + _ANSWERING,
        health_check_period_s=5.0,
    )
    drawing = workers.bind(on_device, factory, jobs=scale.jobs, models=scale.models)
    return ingress.bind(drawing, settings, at_once=scale.max_replicas is not None)


def build(arguments: dict[str, Any]) -> serve.Application:
    """What `serve run app.ray.application:build` and a Serve configuration name; it takes the fields of `Scale`.

    Settings come from WAVESPEED_* and .env. Raises ValueError for what neither knows.
    """
    scale = Scale.model_validate(arguments)
    settings = Settings()
    if settings.threads == 0 and scale.gpus == 0:  # the cores available are the machine's, and other replicas' too
        settings = settings.model_copy(update={"threads": max(1, int(scale.cpus))})
    return application(settings, runner_factory(settings), scale)


def _replicas(scale: Scale) -> dict[str, Any]:
    if scale.max_replicas is None:
        return {"num_replicas": scale.replicas}
    scaling = AutoscalingConfig(
        min_replicas=scale.replicas, max_replicas=scale.max_replicas, target_ongoing_requests=scale.jobs + scale.waiting
    )
    return {"autoscaling_config": scaling, "num_replicas": None}
