"""Is the process alive, can it take a job: two questions, two answers."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.api.answers import errors
from app.api.service import service_of
from app.errors import NotReady

router = APIRouter(tags=["health"])


@router.get("/health", summary="The process answers")
@router.get("/livez", summary="The process answers")
async def alive() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="A worker can take a job", responses=errors(503))
async def ready(request: Request) -> dict[str, str]:
    if not service_of(request).engine.status().ready:
        raise NotReady("No worker can take a job now.", retry_after=5)
    return {"status": "ok"}
