"""One request on its way: sent, followed and fetched in a thread, so that the page stays free meanwhile."""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.client import Client, ClientError, Event, Job
from app.ui.refusal import explained

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, at one moment. `decisions`: C or R for each step done; `preview`: JPEG."""

    state: str = "sending"  # queued, running, fetching, done, failed, cancelled
    position: int | None = None
    step: int = 0
    total: int | None = None
    decisions: str = ""
    preview: bytes | None = None
    error: str | None = None
    drawn: Job | None = None


@dataclass(eq=False)
class Run:
    """`progress` may be read from any thread. `purpose` is the page's own, and comes back with the run.

    `body`: what is submitted; of a job that is under way already, `joined`, it is not looked at.
    """

    server: Client
    body: Mapping[str, Any]
    purpose: str = "draw"
    joined: Job | None = None
    progress: Progress = field(default_factory=Progress, init=False)
    ended: threading.Event = field(default_factory=threading.Event, init=False)
    _started: float = field(default_factory=time.monotonic, init=False)
    _job: Job | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False)

    def start(self) -> Run:
        threading.Thread(target=self._follow, name="wavespeed-run", daemon=True).start()
        return self

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def cancel(self) -> None:
        """Ask the server to stop. The run ends when the server says so; a late cancel changes nothing."""
        self._cancelled = True
        if self._job is not None:
            try:
                self._job.cancel()
            except ClientError:
                return  # it has ended, or the server is away: what follows the events finds out and says so

    def _follow(self) -> None:
        try:
            job = self._job = self.joined or self.server.submit(**self.body)
            if self._cancelled:  # while the server had not yet named the job
                self.cancel()
            for event in job.events():
                self._take(event)
            if self._cancelled and job.refresh().state == "cancelled":
                self._set(state="cancelled")
            else:
                self._set(state="fetching")
                job.result()
                self._set(state="done", drawn=job)
        except ClientError as error:
            self._set(state="failed", error=explained(error))
        except Exception as error:  # noqa: BLE001  # the page waits for an end, and must not wait for ever
            _log.exception("a run's thread")
            self._set(state="failed", error=f"The page made a mistake ({type(error).__name__}); its log has it.")
        finally:
            self.ended.set()

    def _take(self, event: Event) -> None:
        data = event.data
        match event.name:
            case "queued":
                self._set(state="queued", position=data.get("position"))
            case "running":  # a second time when the worker was lost: it starts anew
                self._set(state="running", position=None, step=0, decisions="", preview=None)
            case "progress":
                decisions = self.progress.decisions + str(data["decision"])
                self._set(state="running", step=int(data["step"]), total=int(data["total"]), decisions=decisions)
            case "preview":
                self._set(preview=base64.b64decode(data["image"]))

    def _set(self, **changes: Any) -> None:
        self.progress = replace(self.progress, **changes)
