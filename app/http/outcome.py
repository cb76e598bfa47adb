"""What became of a job: counted, logged and traced once, and written as an answer."""

from __future__ import annotations

import base64
import logging

from app import tracing
from app.engine.types import CacheSummary, Job, JobHandle, JobResult
from app.errors import ServiceError
from app.metrics import CacheUse, Metrics, hit_rate
from models.base import Step

_log = logging.getLogger(__name__)


def refused(metrics: Metrics, model: str | None, error: ServiceError, handle: JobHandle | None = None) -> None:
    """Count, log and trace a request that ends without pictures; `handle`: of a job whose request does not wait."""
    metrics.answered(model, error.type)
    tracing.ended({"outcome": error.type, "model": model}, handle)
    _log.info(
        "refused status=%d type=%s field=%s: %s",
        error.status,
        error.type,
        error.field,
        error.message,
        extra={"fields": {"status": error.status, "type": error.type, "field": error.field}},
    )


def done(metrics: Metrics, handle: JobHandle, result: JobResult, *, awaited: bool = True) -> None:
    """Count, log and trace a job that is done. The one place where that happens. `awaited`: by its own request."""
    job, params, cache = handle.job, handle.job.params, result.cache
    use = CacheUse(
        model=job.model,
        strategy=job.strategy.name,
        computed=_count(cache, "computed"),
        reused=_count(cache, "reused"),
        cache_bytes=_count(cache, "cache_bytes"),
    )
    metrics.answered(job.model, "ok")
    metrics.generated(
        use,
        queue_seconds=handle.queue_seconds,
        generation_seconds=handle.total_seconds - handle.queue_seconds,
        images=len(result.images),
        batches=result.batches,
    )
    figures: dict[str, object] = {
        "strategy": use.strategy,
        "model": use.model,
        "computed": use.computed,
        "reused": use.reused,
        "hit_rate": round(hit_rate(use.computed, use.reused), 2),
        **{name: cache[name] for name in ("interval", "depth", "branch", "threshold") if cache.get(name) is not None},
        "images": len(result.images),
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "queue_seconds": round(handle.queue_seconds, 3),
        "denoise_seconds": round(result.timings.denoise_seconds, 3),
        "total_seconds": round(handle.total_seconds, 3),
    }
    tracing.ended({"outcome": "ok", **figures}, None if awaited else handle)
    _log.info("cache %s", " ".join(f"{name}={value}" for name, value in figures.items()), extra={"fields": figures})


def stepped(job: Job, step: Step) -> None:
    """One DEBUG line a step. Called outside the request's context, hence the id."""
    _log.debug(
        "cache strategy=%s step=%d/%d decision=%s",
        job.strategy.name,
        step.index + 1,
        step.total,
        step.decision,
        extra={
            "request_id": job.id,
            "fields": {
                "strategy": job.strategy.name,
                "step": step.index + 1,
                "total": step.total,
                "decision": step.decision,
            },
        },
    )


def answer(handle: JobHandle, result: JobResult) -> dict[str, object]:
    """The JSON that a client gets: its pictures in base64, and the report."""
    pictures = [base64.b64encode(picture).decode("ascii") for picture in result.images]
    images: dict[str, object] = {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
    return {**images, **report(handle, result)}


def report(handle: JobHandle, result: JobResult) -> dict[str, object]:
    return report_of(handle.job, result, queue_seconds=handle.queue_seconds, total_seconds=handle.total_seconds)


def report_of(job: Job, result: JobResult, *, queue_seconds: float, total_seconds: float) -> dict[str, object]:
    params, timings = job.params, result.timings
    return {
        "request_id": job.id,
        "model": job.model,
        "seeds": list(params.seeds),
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "warnings": list(dict.fromkeys([*job.warnings, *result.warnings])),
        "attention": result.attention,
        "timings": {
            "queue_seconds": round(queue_seconds, 4),
            "text_seconds": round(timings.text_seconds, 4),
            "denoise_seconds": round(timings.denoise_seconds, 4),
            "decode_seconds": round(timings.decode_seconds, 4),
            "compile_seconds": round(timings.compile_seconds, 4),
            "total_seconds": round(total_seconds, 4),
        },
        "cache": dict(result.cache),
    }


def _count(cache: CacheSummary, key: str) -> int:
    value = cache.get(key)
    return value if isinstance(value, int) else 0
