"""GET /api/models: what can be asked for."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request

from app.api.answers import errors
from app.api.service import service_of
from app.engine.base import EngineStatus, ModelInfo

router = APIRouter(tags=["models"])


@router.get("/api/models", summary="The models, their caches and their samplers", responses=errors(401, 503))
async def models(request: Request) -> dict[str, object]:
    """`branches` are the places where DeepCache can cut, with a reuse step's share of a full one at each."""
    engine = service_of(request).engine
    catalogue, status = engine.catalogue(), engine.status()
    return {
        "default": catalogue.default,
        "default_flux": catalogue.default_flux,
        "models": [_row(model, status) for model in catalogue.models.values()],
    }


def _row(model: ModelInfo, status: EngineStatus) -> dict[str, object]:
    """`reason` says why a model is not available."""
    row = asdict(model)
    # What is wrong with its files names folders of this machine: that is for the log.
    reason = "Its files do not load; the server's log says why." if row.pop("error") else None
    reason = status.quarantined.get(model.name, reason)
    return {**row, "available": reason is None, "reason": reason, "loaded": model.name in status.loaded}
