"""What a command says while it works: a bar on stderr, or a line in less than two seconds where that is no terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SILENCE = 1.5  # seconds; two, with what the interpreter takes to start: nobody is left to wonder for longer


class Bar:
    """One task and how far it is. `note` stands behind the numbers: the last step's decision, for example."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=None, note="")

    @property
    def task(self) -> Task:
        return self._progress.tasks[0]

    def show(
        self,
        description: str | None = None,
        *,
        completed: float | None = None,
        total: float | None = None,
        note: str | None = None,
    ) -> None:
        """What is given changes, the rest stays."""
        self._progress.update(self._task, description=description, completed=completed, total=total)
        if note is not None:
            self._progress.update(self._task, note=note)

    def loading(self, model: str, stage: str) -> None:
        """What a runner tells of the parts that it loads."""
        self.show(f"loading {model}: {stage}")

    def reach(self, work: str, stage: str) -> None:
        """One more stage of this work."""
        self.show(f"{work}: {stage}", completed=self.task.completed + 1)

    def advance(self, note: str | None = None) -> None:
        self.show(completed=self.task.completed + 1, note=note)


@contextmanager
def bar(description: str) -> Iterator[Bar]:
    """A bar for the time of the block. Enter it before heavy imports: they take seconds too.

    Without a terminal the end is told as well, except that of work that failed: there the error speaks.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        shown = Bar(progress, description)
        if console.is_terminal:
            yield shown
            return
        ended = threading.Event()
        speaker = threading.Thread(target=_speak, args=(shown.task, ended), name="progress", daemon=True)
        speaker.start()
        try:
            yield shown
        finally:
            ended.set()
            speaker.join()
        _say(shown.task)


def _speak(task: Task, ended: threading.Event) -> None:
    while not ended.wait(SILENCE):
        _say(task)


def _say(task: Task) -> None:
    done = "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}"
    words = (task.description, done, task.fields["note"], f"{task.elapsed or 0:.0f} s")
    sys.stderr.write(" ".join(word for word in words if word) + "\n")
    sys.stderr.flush()
