"""What every endpoint works with."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import Request

from app.api.desk import Desk
from app.engine.base import Catalogue, Engine
from app.errors import NotReady
from app.jobs.board import JobBoard
from app.metrics import Metrics
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Service:
    settings: Settings
    engine: Engine
    metrics: Metrics
    jobs: JobBoard
    desk: Desk = field(default_factory=Desk)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def request_id_of(request: Request) -> str:
    """Made by the outermost middleware for each request; the job has the same id."""
    return str(request.state.request_id)


def catalogue_or_none(engine: Engine) -> Catalogue | None:
    try:
        return engine.catalogue()
    except NotReady:
        return None
