"""POST /v1/images/generations, GET /v1/models. Every field of our own is taken beside theirs."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from app.api.answers import ImagesAnswer, ModelCard, ModelCards, errors
from app.api.attempt import Attempt
from app.api.openai.answer import answer, streamed
from app.api.openai.payload import EXAMPLE, read_images
from app.api.schemas import shown
from app.api.service import service_of
from app.errors import ModelNotFound

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post(
    "/images/generations",
    summary="Draw pictures, as the OpenAI images API does",
    response_model=ImagesAnswer,
    responses={
        200: {
            "description": "The pictures and the report; with `stream`, events `image_generation.partial_image` and "
            "`image_generation.completed`, one a picture, whose last one carries the report; or one `error`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **errors(401, 404, 413, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/ImagesRequest"},
                    "examples": {"cached": {"summary": "A misty forest, DeepCache", "value": EXAMPLE}},
                }
            },
        }
    },
)
async def generations(request: Request) -> Response:
    """All fields of POST /api/generate can stand beside these: through a client's `extra_body`."""
    attempt = Attempt(request)
    with attempt.counted():
        options, fields = read_images(await attempt.body(), attempt.service.engine)
        job = await attempt.job(fields)
        if options.stream:
            return await streamed(attempt, job, options.partials)
        handle = attempt.submit(job)
        result = await attempt.result(handle)
    return JSONResponse(await asyncio.to_thread(answer, handle, result))


@router.get("/models", summary="The models, as the OpenAI API lists them", responses=errors(401, 503))
async def models(request: Request) -> ModelCards:
    """Shorter than GET /api/models."""
    service = service_of(request)
    created = int(service.metrics.started)
    return ModelCards(data=[ModelCard(id=name, created=created) for name in service.engine.catalogue().models])


@router.get("/models/{model}", summary="One model", responses=errors(401, 404, 422, 503))
async def model(request: Request, model: str) -> ModelCard:
    """`created` is when the server started."""
    service = service_of(request)
    known = service.engine.catalogue().models
    if model not in known:
        raise ModelNotFound(f"There is no model {shown(model)!r}. There is: {', '.join(known)}.", field="model")
    return ModelCard(id=model, created=int(service.metrics.started))
