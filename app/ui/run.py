"""One request on its way: sent, followed and fetched in a thread, so that the page stays free meanwhile."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.ui.server import Away, Event, Refused, Server, ServerError

RECONNECTIONS = 5
PAUSE = 0.5  # seconds before the first of them; each waits as long again as the one before


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, at one moment. `decisions`: C or R for each step done; `preview`: JPEG."""

    state: str = "sending"  # queued, running, lost (the connection), fetching, done, failed, cancelled
    position: int | None = None
    step: int = 0
    total: int | None = None
    decisions: str = ""
    preview: bytes | None = None
    error: ServerError | None = None
    answer: Mapping[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


@dataclass(eq=False)
class Run:
    """`progress` may be read from any thread. `purpose` and `values` are the page's own, and come back with the run."""

    server: Server
    body: Mapping[str, Any]
    purpose: str = "draw"
    values: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress, init=False)
    ended: threading.Event = field(default_factory=threading.Event, init=False)
    _started: float = field(default_factory=time.monotonic, init=False)
    _job: str | None = field(default=None, init=False)
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
                self.server.cancel(self._job)
            except ServerError:
                return  # it has ended, or the server is away: what follows the events finds out and says so

    def _follow(self) -> None:
        try:
            job = self._job = self.server.submit(self.body)
            if self._cancelled:  # while the server had not yet named the job
                self.cancel()
            if self._listen(job):
                self._set(state="fetching")
                answer = self.server.result(job)
                self._set(state="done", answer=answer)
        except ServerError as error:
            self._set(state="failed", error=error)
        except Exception as error:  # noqa: BLE001  # the page waits for an end, and must not wait for ever
            self._set(state="failed", error=ServerError(f"The page made a mistake: {type(error).__name__}."))
        finally:
            self.ended.set()

    def _listen(self, job: str) -> bool:
        """Whether the job was done; raises ServerError when it was not, unless it was cancelled."""
        number, tries = 0, 0
        while True:
            try:
                for event in self.server.events(job, number):
                    number, tries = event.number, 0
                    if event.name == "done":
                        return True
                    if event.name == "error":
                        return self._failed(event)
                    self._take(event)
                raise Away("The server closed the connection before the picture was done. Generate it again.")
            except Away:
                tries += 1
                if tries > RECONNECTIONS:
                    raise
                self._set(state="lost")
                time.sleep(PAUSE * tries)

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

    def _failed(self, event: Event) -> bool:
        error = event.data["error"]
        if error["type"] == "cancelled" and self._cancelled:
            self._set(state="cancelled")
            return False
        raise Refused(error["message"], status=0, type=error["type"], field=error.get("field"))

    def _set(self, **changes: Any) -> None:
        self.progress = replace(self.progress, **changes)
