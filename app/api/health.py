"""Is the process alive, can it take a job: two questions, two answers."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.api.answers import errors
from app.api.service import service_of
from app.engine.base import EngineStatus
from app.errors import NotReady

router = APIRouter(tags=["health"])


@router.get("/health", summary="The process answers")
@router.get("/livez", summary="The process answers")
async def alive() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="A worker can take a job", responses=errors(503))
async def ready(request: Request) -> dict[str, object]:
    """`quarantined`: models that no worker is given at present, each with the reason."""
    status = service_of(request).engine.status()
    if not status.ready:
        raise NotReady(_why_not(status), retry_after=5)
    return {
        "status": "ok",
        "workers": {device.device: device.state.value for device in status.devices},
        "quarantined": dict(status.quarantined),
    }


def _why_not(status: EngineStatus) -> str:
    if status.draining:
        return "The server is shutting down: it finishes what it has accepted and takes nothing more."
    workers = [
        f"{device.device} is {device.state.value}"
        + (f" {device.loading}" if device.loading else "")
        + (f" (the last worker was lost: {device.reason})" if device.reason else "")
        for device in status.devices
    ]
    held = [f"{model} is quarantined: {reason}" for model, reason in status.quarantined.items()]
    return " ".join(["No worker can take a job now:", f"{'; '.join(workers) or 'there is none'}.", *held])
