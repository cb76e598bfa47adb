"""What went wrong, in a sentence for whoever looks at the page, with what to do about it."""

from __future__ import annotations

from app.client import ApiError, ClientError, Unreachable


def explained(error: ClientError) -> str:
    """The server's own sentence where there is one."""
    match error:
        case ApiError(retry_after=int(seconds)):
            return f"{error.message} Try again in {seconds} s."
        case Unreachable():
            remedy = "Start it with scripts/run, or start the page with WAVESPEED_UI_SERVER set to where it runs."
            return f"{error} {remedy}"
    return str(error)
