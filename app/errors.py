"""Every error that a client can be answered with: one tree, one JSON shape. And one that the operator is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError

RETRY_SECONDS = 5  # what a client is told to wait
TOGETHER = "together"
"""Kind of a fault that several fields have together; its context's `field` is the one that is named."""


class CannotStart(Exception):
    """What is wrong, in one sentence for the operator; no client ever sees it."""


class ServiceError(Exception):
    """An answer that is not a picture. The message says what is wrong and what to do about it.

    `field` names the request's field at fault; `retry_after` is in seconds.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal"

    def __init_subclass__(cls, *, type: str, status: int | None = None) -> None:
        """Each kind says its `type`, and its `status` where that is not its base's."""
        cls.type = type
        if status is not None:
            cls.status = status

    def __init__(self, message: str, *, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def body(self, request_id: str) -> dict[str, dict[str, str | None]]:
        error = {"type": self.type, "message": self.message, "field": self.field, "request_id": request_id}
        return {"error": error}


class Invalid(ServiceError, status=422, type="invalid"):
    """The request is not one that this API knows: unknown field, wrong type, out of bounds."""


class Incompatible(ServiceError, status=422, type="incompatible"):
    """Each field is good, but not together."""


class Unsupported(ServiceError, status=422, type="unsupported"):
    """A documented feature that this version, or this server's hardware and installation, has not got."""


class BodyTooLarge(ServiceError, status=413, type="body_too_large"): ...


class PictureTooLarge(ServiceError, status=413, type="picture_too_large"):
    """A picture of more pixels than the server decodes."""


class BodyTimeout(ServiceError, status=408, type="body_timeout"):
    """The client did not finish sending its request."""


class Unauthorized(ServiceError, status=401, type="unauthorized"): ...


class ForeignOrigin(ServiceError, status=403, type="foreign_origin"):
    """A page of another web site asks for a change."""


class MisdirectedRequest(ServiceError, status=421, type="misdirected"):
    """The request names a host that this server is not known to go by."""


class NotFound(ServiceError, status=404, type="not_found"): ...


class ModelNotFound(NotFound, type="unknown_model"): ...


class JobNotFound(NotFound, type="unknown_job"):
    """No such job, or one that ended so long ago that it is forgotten."""


class JobFinished(ServiceError, status=409, type="job_finished"):
    """There is nothing left to cancel."""


class IdempotencyConflict(ServiceError, status=422, type="idempotency_conflict"):
    """An Idempotency-Key came a second time with another body (draft-ietf-httpapi-idempotency-key-header-06)."""


class MethodNotAllowed(ServiceError, status=405, type="method_not_allowed"): ...


class QueueFull(ServiceError, status=429, type="queue_full"): ...


class NotReady(ServiceError, status=503, type="not_ready"):
    """No worker can take a job now: starting, failing to start, or shutting down."""


class WorkerLost(ServiceError, status=503, type="worker_lost"):
    """The worker process died or hung under the job, and again when it was tried a second time."""


class LostAtRestart(ServiceError, status=503, type="lost_at_restart"):
    """The server ended before the job was done, and is not set to take jobs up again."""


class StorageFailed(ServiceError, status=503, type="storage_failed"):
    """The disk that keeps jobs and results does not take any more."""


class OutOfMemory(ServiceError, status=503, type="out_of_memory"): ...


class ModelUnavailable(ServiceError, status=503, type="model_unavailable"):
    """The model is configured, but its files do not load, or loading it took workers down."""


class DeadlineExceeded(ServiceError, status=504, type="deadline_exceeded"):
    """The time that the client, or else the operator, gave the request is over."""


class GenerationFailed(ServiceError, type="generation_failed"):
    """The model raised. The cause is in the log, not in the answer."""


class Cancelled(ServiceError, status=409, type="cancelled"):
    """The job was cancelled before it was done. Seen only by whoever waits for a job that another one cancels."""


def worker_lost(reason: str) -> WorkerLost:
    return WorkerLost(
        f"The worker was lost twice while it ran this request, the last time because {reason}. If it repeats, ask for "
        "less: a smaller picture, fewer images at once.",
        retry_after=RETRY_SECONDS,
    )


def leaving() -> NotReady:
    return NotReady("The server is shutting down. Ask again when it is back.", retry_after=RETRY_SECONDS)


def queue_full(size: int) -> QueueFull:
    return QueueFull(f"{size} requests are waiting already. Try again later.", retry_after=RETRY_SECONDS)


def invalid(error: ValidationError) -> Invalid:
    """Names the first field at fault, what is wrong with it, and the others."""
    # The input is left out: a NaN or a lone surrogate in it could not be written into an answer.
    faults = error.errors(include_input=False, include_url=False)
    fields = []
    for fault in faults:
        located = (fault["ctx"]["field"],) if fault["type"] == TOGETHER else ()
        fields.append(".".join(shown(str(part)) for part in (*fault["loc"], *located)))
    first, field = faults[0], fields[0]
    if first["type"] == "missing":
        message = f"{field} is required."
    elif first["type"] == "string_unicode":
        message = f"{field}: holds a lone surrogate, half of a character; send the whole character."
    else:
        message = f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}."
    if others := [other for other in dict.fromkeys(fields) if other != field]:
        message += f" Also wrong: {', '.join(others[:10])}{', …' if len(others) > 10 else ''}."
    return Invalid(message, field=field)


def kinds(of: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    """It and all below it."""
    yield of
    for narrower in of.__subclasses__():
        yield from kinds(narrower)


def status_of(kind: str) -> int:
    """The status that errors of this type are answered with; 500 for a type that is not known."""
    return next((error.status for error in kinds() if error.type == kind), ServiceError.status)


def shown(text: str) -> str:
    """A client's own word, fit for an answer and the log: one short line, with nothing that hides or breaks UTF-8."""
    word = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:81])
    return word if len(text) <= 80 and len(word) <= 80 else f"{word[:80]}…"
