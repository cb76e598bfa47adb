"""The web application, put together."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app import __version__
from app.engine.types import Engine, Job
from app.errors import Invalid, MethodNotAllowed, NotFound, ServiceError
from app.http import pages
from app.http.apis import a1111, a1111_extras, openai, wavespeed
from app.http.middleware import Guard, RequestContext, error_response
from app.http.render import request_schema
from app.http.request import LARGEST_AT_ONCE, Service, Uploads, request_id_of
from app.http.resolve import Resolver
from app.http.schemas import parse
from app.jobs.jobs import Jobs
from app.metrics import Metrics
from app.settings import Settings, available_cores
from app.tracing import telemetry_config

_DECODING = 10  # how nice: about a tenth of a core that a worker wants too
_DESCRIPTION = "Image generation with per-request feature caching: DeepCache for UNets, First Block Cache for Flux."
_FOREIGN = {
    "description": "A page of another web site asks, and its origin is not allowed.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
}


class Page(Protocol):
    """What is shown at /: an application beside ours, which asks this service as any client does.

    `address`: where it does, set before its lifespan begins; `token`: by which it may say for whom it asks.
    """

    address: str
    token: str

    def lifespan(self) -> Callable[[Any], AbstractAsyncContextManager[None]]: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


def create_app(settings: Settings, engine: Engine, page: Page | None = None) -> FastAPI:
    """The app starts `engine` and `page` when it starts and stops them when it stops."""
    metrics = Metrics()
    decoders = ThreadPoolExecutor(max(1, available_cores() // 4), "decode", _step_back)
    resolver = Resolver(engine, settings, decoders)

    async def resolve_again(body: Mapping[str, Any], job_id: str) -> Job:
        return await resolver.job(parse(dict(body)), job_id)

    jobs = Jobs(engine, metrics, resolve_again, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await jobs.start()
        await engine.start()
        try:
            async with AsyncExitStack() as stack:
                if page is not None:
                    await stack.enter_async_context(page.lifespan()(app))
                yield
        finally:
            await engine.stop()
            await jobs.stop()

    app = FastAPI(
        title="WaveSpeed",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        telemetry=telemetry_config(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect names the scheme of this process, which behind TLS is another one
    )
    uploads = Uploads(LARGEST_AT_ONCE * settings.max_body_bytes)
    app.state.service = Service(settings, engine, metrics, jobs, resolver, uploads)
    guard = Guard(
        settings.api_keys,
        settings.allowed_hosts,
        settings.cors_origins,
        metrics_open=settings.metrics_open,
        page=None if page is None else page.token,
    )
    app.add_middleware(RequestContext, guard=guard)
    if settings.cors_origins:  # added last, so outermost: a preflight carries no key, and a refusal must be readable
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # client packages send headers of their own, such as x-stainless-os
            expose_headers=["*"],
        )
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    if page is not None:
        app.router.routes.extend(pages.page_routes(page, guard))
    for module in (wavespeed, openai, a1111, a1111_extras, pages):
        app.include_router(module.router)
    _describe(app)
    return app


def _step_back() -> None:
    """Who draws goes before who decodes: Linux gives each thread a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _DECODING)


async def _service_error(request: Request, error: Any) -> Response:  # of its class alone, which no type can say
    return error_response(error, request_id_of(request))


async def _http_error(request: Request, error: Any) -> Response:
    """What the framework refuses by itself, in our shape."""
    ours: ServiceError
    match error.status_code:
        case 204:
            return Response(status_code=204)
        case 404:
            ours = NotFound("There is nothing at this address; /docs lists what there is.")
        case 405:
            ours = MethodNotAllowed("This address does not take this method; /docs lists what it takes.")
        case _:
            ours = Invalid(str(error.detail))
    response = error_response(ours, request_id_of(request))
    if error.headers and "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


async def _validation_error(request: Request, error: Any) -> Response:
    """An address's own parameters, which the framework checks; the client's words are left out."""
    fault = error.errors()[0]
    field = str(fault["loc"][-1])
    return error_response(Invalid(f"{field}: {fault['msg']}.", field=field), request_id_of(request))


def _describe(app: FastAPI) -> None:
    """Add the request's schema to OpenAPI: its body is parsed by us, so the framework doesn't know of it."""
    framework = app.openapi

    def openapi() -> dict[str, Any]:
        document = framework()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "GenerateRequest" not in schemas:
            request = request_schema(rerender=True)
            schemas.update(request.pop("$defs", {}))
            schemas["GenerateRequest"] = request
            for module in (a1111, a1111_extras, openai):
                schemas.update(module.schemas())
        for operations in document["paths"].values():
            for method, operation in operations.items():
                if method not in ("get", "head"):
                    operation["responses"]["403"] = _FOREIGN
                for status, response in operation["responses"].items():
                    content = response.get("content", {})
                    if status >= "400" and "text/event-stream" in content:  # the framework calls a stream's errors one
                        content["application/json"] = content.pop("text/event-stream")
        return document

    app.openapi = openapi  # type: ignore[method-assign]
