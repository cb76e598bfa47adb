"""What is asked without a job: health, the models and adapters that there are, the documentation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, Request
from starlette.responses import FileResponse, HTMLResponse, Response

from app.engine.types import NOT_LOADED, EngineStatus, ModelInfo
from app.errors import NotFound, NotReady
from app.http.render import errors
from app.http.request import known_models, service_of
from app.http.resolve import Adapters

router = APIRouter()

_FOLDER = Path(fastapi_offline.__file__).parent / "static"
_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>WaveSpeed API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon.png">
</head>
<body>
<div id="swagger-ui">This page needs JavaScript; <a href="openapi.json">openapi.json</a> says the same.</div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_HOME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>WaveSpeed</title>
<link rel="icon" href="docs/favicon.png">
</head>
<body>
<h1>WaveSpeed</h1>
<p>This is the API of an image generation service.</p>
<ul>
<li><a href="docs">docs</a>: every address and field, to be tried out</li>
<li><a href="api/models">api/models</a>: what it draws with</li>
<li><a href="readyz">readyz</a>: whether it can draw now</li>
</ul>
<p>A page to draw on is a program of its own: <code>scripts/ui</code>, or <code>docker compose up ui</code>.</p>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
});
"""


@router.get("/", include_in_schema=False)
async def home() -> HTMLResponse:
    return HTMLResponse(_HOME, headers={"Content-Security-Policy": _POLICY})


@router.get("/docs", include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@router.get("/docs/start.js", include_in_schema=False)
async def start() -> Response:
    return Response(_START, media_type="text/javascript")


@router.get("/docs/{name}", include_in_schema=False)
async def file(name: str) -> FileResponse:
    if name not in _FILES:
        raise NotFound("There is no such file of the documentation page.")
    return FileResponse(_FOLDER / name, media_type=_FILES[name], headers={"Cache-Control": "public, max-age=86400"})


@router.get("/health", summary="The process answers", tags=["health"])
@router.get("/livez", summary="The process answers", tags=["health"])
async def alive() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="A worker can take a job", tags=["health"], responses=errors(503))
async def ready(request: Request) -> dict[str, object]:
    """`quarantined`: models that no worker is given at present, `unavailable`: those that cannot be loaded, each with
    the reason. The others are served.
    """
    engine = service_of(request).engine
    status = engine.status()
    if not status.ready:
        raise NotReady(_why_not(status), retry_after=5)
    return {
        "status": "ok",
        "workers": {device.device: device.state.value for device in status.devices},
        "quarantined": dict(status.quarantined),
        "unavailable": {
            name: reason for name, model in known_models(engine).items() if (reason := _not_loaded(model, status))
        },
    }


def _not_loaded(model: ModelInfo, status: EngineStatus) -> str | None:
    """Why the model cannot be loaded, as far as is known."""
    if model.error is None or model.name in status.loaded:
        return status.unavailable.get(model.name)
    return NOT_LOADED  # what is wrong with its files names folders of this machine: that is for the log


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


@router.get(
    "/api/adapters", summary="The LoRAs and embeddings that a request can name", tags=["models"], responses=errors(401)
)
def adapters(request: Request) -> dict[str, list[str]]:
    """Read from the folders at each call. Whether one fits a model is seen when it is used."""
    folders = Adapters.of(service_of(request).settings)
    return {"loras": list(folders.loras.files()), "embeddings": list(folders.embeddings.files())}


@router.get(
    "/api/models", summary="The models, their caches and their samplers", tags=["models"], responses=errors(401, 503)
)
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
    del row["error"]
    reason = status.quarantined.get(model.name) or _not_loaded(model, status)
    return {**row, "available": reason is None, "reason": reason, "loaded": model.name in status.loaded}
