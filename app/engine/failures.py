"""What a client is told when a job fails. Stack traces and names of this machine stay in the log."""

from __future__ import annotations

from app.engine.base import JobHandle
from app.engine.messages import Failed
from app.engine.quarantine import Quarantine
from app.engine.states import JobState
from app.errors import (
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    Incompatible,
    Invalid,
    ModelNotFound,
    ModelUnavailable,
    NotReady,
    OutOfMemory,
    QueueFull,
    ServiceError,
    WorkerLost,
)

ATTEMPTS = 2  # a job whose worker is lost is tried once more: the loss may not have been its doing
RETRY_SECONDS = 5  # what a client is told to wait


def error_of(failure: Failed) -> ServiceError:
    match failure.kind:
        case "cancelled":
            return Cancelled("The job was cancelled.")
        case "unknown_model":
            return ModelNotFound(failure.message, field="model")
        case "load_failed":
            return ModelUnavailable(  # its own message names folders of this machine
                "The model is configured, but its files do not load; the server's log says why. Ask for another one.",
                field="model",
                retry_after=RETRY_SECONDS,
            )
        case "model_error":
            return Invalid(failure.message, field=failure.field)
        case "incompatible":
            return Incompatible(failure.message)
        case "out_of_memory":
            return OutOfMemory(
                "The device ran out of memory. Lower batch_size, width or height, or deepcache_depth, "
                "or turn off other features that hold memory.",
                retry_after=RETRY_SECONDS,
            )
        case _:
            return GenerationFailed("The model failed on this request; the server's log has the cause.")


def worker_lost(reason: str) -> WorkerLost:
    return WorkerLost(
        f"The worker was lost twice while it ran this request, the last time because {reason}. If it repeats, ask for "
        "less: a smaller picture, fewer images at once.",
        retry_after=RETRY_SECONDS,
    )


def model_held(model: str, quarantine: Quarantine) -> ModelUnavailable:
    return ModelUnavailable(
        f"{model} is not given to any worker at present. {quarantine.reasons.get(model, '')} Ask for another model, or "
        "again later.",
        field="model",
        retry_after=quarantine.retry_after(model),
    )


def leaving() -> NotReady:
    return NotReady("The server is shutting down. Ask again when it is back.", retry_after=RETRY_SECONDS)


def queue_full(size: int) -> QueueFull:
    return QueueFull(f"{size} requests are waiting already. Try again later.", retry_after=RETRY_SECONDS)


def deadline_passed(handle: JobHandle) -> DeadlineExceeded:
    where = "waited" if handle.state is JobState.QUEUED else "ran"
    return DeadlineExceeded(
        f"The request still {where} after {handle.job.deadline_seconds:g} seconds, its deadline. Ask for "
        "less, or allow more in deadline_seconds."
    )


def models_unknown() -> NotReady:
    return NotReady("The models are not known yet. Try again soon.", retry_after=RETRY_SECONDS)
