"""What a trace says of a request, beside what FastAPI says of every one; nothing where no exporter is configured.

FastAPI makes the span of a request and exports it where the environment says so (`FASTAPI_OTEL_AUTO_CONFIGURE`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from app.errors import Cancelled

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

_POLLED = frozenset({"/metrics", "/livez", "/readyz", "/health"})
_tracer = trace.get_tracer("wavespeed")


def telemetry_config() -> TelemetryConfig:
    """FastAPI's settings: one span a request, none for what is asked every few seconds."""
    return {"operation_spans": False, "exclude": lambda scope: scope.get("path") in _POLLED}


def identified(request_id: str) -> None:
    """The span of this request has the id that the log and the job have."""
    trace.get_current_span().set_attribute("wavespeed.request_id", request_id)


def ended(figures: Mapping[str, Any]) -> None:
    """Write `figures` to the span of the request that waits for what they tell of."""
    trace.get_current_span().set_attributes(_attributes(figures))


def job_ended(job_id: str, seconds: float, figures: Mapping[str, Any]) -> None:
    """A job of `seconds`, whose request was answered when it was accepted, becomes a span below that one."""
    end = time.time_ns()
    attributes = {**_attributes(figures), "wavespeed.request_id": job_id}
    job = _tracer.start_span("job", start_time=end - int(seconds * 1e9), attributes=attributes)
    if figures.get("outcome") not in ("ok", Cancelled.type):
        job.set_status(trace.StatusCode.ERROR)
    job.end(end)


def _attributes(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {f"wavespeed.{name}": value for name, value in figures.items() if value is not None}


def trace_id() -> str | None:
    """Of the request that is being answered, if it is traced."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None
