"""Every error that a client can be answered with: one tree, one JSON shape. And one that the operator is told."""

from __future__ import annotations

from typing import ClassVar


class CannotStart(Exception):
    """What is wrong, in one sentence for the operator; no client ever sees it."""


class ServiceError(Exception):
    """An answer that is not a picture. The message says what is wrong and what to do about it.

    `field` names the request's field at fault; `retry_after` is in seconds.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal"

    def __init__(self, message: str, *, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def body(self, request_id: str) -> dict[str, dict[str, str | None]]:
        return {
            "error": {
                "type": self.type,
                "message": self.message,
                "field": self.field,
                "request_id": request_id,
            }
        }


class Invalid(ServiceError):
    """The request is not one that this API knows: unknown field, wrong type, out of bounds."""

    status = 422
    type = "invalid"


class Incompatible(ServiceError):
    """Each field is good, but not together."""

    status = 422
    type = "incompatible"


class Unsupported(ServiceError):
    """A documented feature that this version, or this server's hardware and installation, has not got."""

    status = 422
    type = "unsupported"


class BodyTooLarge(ServiceError):
    status = 413
    type = "body_too_large"


class PictureTooLarge(ServiceError):
    """A picture of more pixels than the server decodes."""

    status = 413
    type = "picture_too_large"


class BodyTimeout(ServiceError):
    """The client did not finish sending its request."""

    status = 408
    type = "body_timeout"


class Unauthorized(ServiceError):
    status = 401
    type = "unauthorized"


class ForeignOrigin(ServiceError):
    """A page of another web site asks for a change."""

    status = 403
    type = "foreign_origin"


class MisdirectedRequest(ServiceError):
    """The request names a host that this server is not known to go by."""

    status = 421
    type = "misdirected"


class NotFound(ServiceError):
    status = 404
    type = "not_found"


class ModelNotFound(NotFound):
    type = "unknown_model"


class JobNotFound(NotFound):
    """No such job, or one that ended so long ago that it is forgotten."""

    type = "unknown_job"


class JobFinished(ServiceError):
    """There is nothing left to cancel."""

    status = 409
    type = "job_finished"


class IdempotencyConflict(ServiceError):
    """An Idempotency-Key came a second time with another body (draft-ietf-httpapi-idempotency-key-header-06)."""

    status = 422
    type = "idempotency_conflict"


class MethodNotAllowed(ServiceError):
    status = 405
    type = "method_not_allowed"


class QueueFull(ServiceError):
    status = 429
    type = "queue_full"


class NotReady(ServiceError):
    """No worker can take a job now: starting, failing to start, or shutting down."""

    status = 503
    type = "not_ready"


class WorkerLost(ServiceError):
    """The worker process died or hung under the job, and again when it was tried a second time."""

    status = 503
    type = "worker_lost"


class LostAtRestart(ServiceError):
    """The server ended before the job was done, and is not set to take jobs up again."""

    status = 503
    type = "lost_at_restart"


class StorageFailed(ServiceError):
    """The disk that keeps jobs and results does not take any more."""

    status = 503
    type = "storage_failed"


class OutOfMemory(ServiceError):
    status = 503
    type = "out_of_memory"


class ModelUnavailable(ServiceError):
    """The model is configured, but its files do not load, or loading it took workers down."""

    status = 503
    type = "model_unavailable"


class DeadlineExceeded(ServiceError):
    """The time that the client, or else the operator, gave the request is over."""

    status = 504
    type = "deadline_exceeded"


class GenerationFailed(ServiceError):
    """The model raised. The cause is in the log, not in the answer."""

    type = "generation_failed"


class Cancelled(ServiceError):
    """The job was cancelled before it was done. Seen only by whoever waits for a job that another one cancels."""

    status = 409
    type = "cancelled"


def status_of(kind: str) -> int:
    """The status that errors of this type are answered with; 500 for a type that is not known."""
    waiting = [ServiceError]
    while waiting:
        error = waiting.pop()
        if error.type == kind:
            return error.status
        waiting += error.__subclasses__()
    return ServiceError.status


def shown(text: str) -> str:
    """A client's own word, fit for an answer and the log: one short line, with nothing that hides or breaks UTF-8."""
    word = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:81])
    return word if len(text) <= 80 and len(word) <= 80 else f"{word[:80]}…"
