"""Ray on this machine, small, with two worker replicas of fake models: started once, ended whatever happens.

Nothing here is imported where Ray is not installed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from app.engine.types import Job, JobHandle, StepListener
from app.ray.application import Scale, application
from app.ray.engine import RayEngine
from app.settings import Settings
from benchmarks.soak.hostile import BODY_LIMIT, BODY_SECONDS
from tests.app.fakes import fake_runner

APP = "wavespeed"
REPLICAS = 2
QUEUE_SIZE = 3


@dataclass(frozen=True)
class Cluster:
    """`address` is that of the application's HTTP."""

    address: str

    @property
    def workers(self) -> Any:
        return serve.get_deployment_handle("Worker", APP)


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=REPLICAS,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
        (folder / "loras").mkdir()
        settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            queue_size=QUEUE_SIZE,
            log_folder=folder,
            lora_folder=folder / "loras",
            max_body_bytes=BODY_LIMIT,
            body_seconds=BODY_SECONDS,
        )
        serve.run(application(settings, fake_runner, Scale(replicas=REPLICAS)), name=APP)
        yield Cluster(f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()


@dataclass
class RecordingRayEngine(RayEngine):
    """In the test's own process, handing jobs to the cluster's replicas; `submitted` is what got past validation."""

    cluster: Cluster
    submitted: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.cluster.workers, APP, queue_size=100)

    async def start(self) -> None:
        """Ready when it returns, as tests expect of an engine."""
        await super().start()
        while not self.status().ready:
            await asyncio.sleep(0.01)

    def submit(self, job: Job, on_step: StepListener | None = None, *, promised: bool = False) -> JobHandle:
        handle = super().submit(job, on_step, promised=promised)
        self.submitted.append(job)
        return handle
