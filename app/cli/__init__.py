"""What commands share: what they say while they work, and the page that their figures are drawn on.

That is a bar on stderr, or a line in less than two seconds where that is no terminal. The page is drawn with Pillow.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageDraw, ImageFont
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
PAPER, INK, PALE, RULE = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
COMPUTED, REUSED = "#1d4e89", "#f4a259"  # far apart in lightness too: told apart without colour
LEGEND = (("computed", COMPUTED), ("reused", REUSED))
COLOURS = {"C": COMPUTED, "R": REUSED}
_LETTERS = frozenset(map(chr, range(0x20, 0x7F))) | set("“”‘’…·±")  # of the font that Pillow brings
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
_LEAST_CELL = 5  # pixels of a decision, from which on a gap between two can be seen
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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


def typeset(text: str, size: int) -> tuple[str, Font]:
    """`text` as it can be shown, and a font `size` pixels high that shows it.

    Pillow's own font, which is the same on every machine, where it has the letters; else one of the system's; where
    there is none, a question mark stands for each letter that Pillow's lacks.
    """
    text = "".join(char if char.isprintable() else " " for char in text)
    if not set(text) <= _LETTERS:
        for name in _SYSTEM_FONTS:
            try:
                return text, ImageFont.truetype(name, size)
            except OSError:
                continue
        text = "".join(char if char in _LETTERS else "?" for char in text)
    return text, ImageFont.load_default(size)


class Canvas:
    """A page `width` × `height` pixels; places are (x, y) of the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def write(self, place: tuple[float, float], text: str, size: int, colour: str = INK, anchor: str = "la") -> None:
        """`anchor` as Pillow's: which corner or side of the text `place` is."""
        shown, font = typeset(text, size)
        self.draw.text(place, shown, fill=colour, font=font, anchor=anchor)

    def strip(self, box: tuple[float, float, float, float], decisions: str) -> None:
        """A cell for each letter of `decisions`, along `box` (left, top, right, bottom); a space is bare."""
        left, top, right, bottom = box
        cell = (right - left) / max(1, len(decisions))
        gap = 1 if cell >= _LEAST_CELL else 0
        for index, letter in enumerate(decisions):
            if (colour := COLOURS.get(letter)) is not None:
                start, end = round(left + index * cell), round(left + (index + 1) * cell)
                self.draw.rectangle((start, top, max(start, end - 1 - gap), bottom - 1), fill=colour)

    def legend(self, right: float, top: float, size: int) -> None:
        """The two colours with their names, ending at `right`."""
        for name, colour in reversed(LEGEND):
            right -= width_of(name, size)
            self.write((right, top), name, size, PALE)
            right -= size * 1.2
            self.draw.rectangle((right, top + size * 0.15, right + size * 0.8, top + size * 0.95), fill=colour)
            right -= size


def width_of(text: str, size: int) -> float:
    """Pixels."""
    shown, font = typeset(text, size)
    return font.getlength(shown)


def wrapped(text: str, size: int, width: float, lines: int) -> list[str]:
    """`text` in at most so many lines no wider than `width` pixels, broken at spaces; … stands for what is left out."""
    found: list[str] = []
    words = text.split()
    while words:
        line = words.pop(0)
        while words and width_of(f"{line} {words[0]}", size) <= width:
            line += f" {words.pop(0)}"
        if len(found) == lines - 1 and words:
            line += " " + words[0]
            words = []
        found.append(_cut(line, size, width))
    return found


def _cut(line: str, size: int, width: float) -> str:
    if width_of(line, size) <= width:
        return line
    kept = bisect(range(len(line)), width, key=lambda length: width_of(line[:length] + "…", size)) - 1
    return line[: max(0, kept)].rstrip() + "…"
