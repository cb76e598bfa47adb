"""What went wrong, in a sentence for whoever looks at the page, with what to do about it."""

from __future__ import annotations

from app.client import ApiError, ClientError, Unreachable


def explained(error: ClientError) -> str:
    """The server's own sentence where there is one."""
    match error:
        case ApiError(status=401):
            return "The server no longer knows the key that you gave. Load the page anew to give another one."
        case ApiError(retry_after=int(seconds)):
            return f"{error.message} Try again in {seconds} s."
        case Unreachable():
            return "The server does not answer. If it was ended, start it again: scripts/run."
    return str(error)
