"""GET /api/models: what can be asked for."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request

from app.api.answers import errors
from app.api.service import service_of
from app.engine.base import ModelInfo

router = APIRouter(tags=["models"])


@router.get("/api/models", summary="The models, their caches and their samplers", responses=errors(401, 503))
async def models(request: Request) -> dict[str, object]:
    """`branches` are the places where DeepCache can cut, with a reuse step's share of a full one at each."""
    engine = service_of(request).engine
    catalogue, loaded = engine.catalogue(), engine.status().loaded
    return {
        "default": catalogue.default,
        "default_flux": catalogue.default_flux,
        "models": [_row(model, model.name in loaded) for model in catalogue.models.values()],
    }


def _row(model: ModelInfo, loaded: bool) -> dict[str, object]:
    row = asdict(model)
    row["available"] = row.pop("error") is None  # the reason names folders of this machine: it is for the log
    return {**row, "loaded": loaded}
