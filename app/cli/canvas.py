"""What the figures share: a page that is drawn on with Pillow, its colours, its type, the strip of decisions."""

from __future__ import annotations

from bisect import bisect

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, PALE, RULE = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
COMPUTED, REUSED = "#1d4e89", "#f4a259"  # far apart in lightness too: told apart without colour
LEGEND = (("computed", COMPUTED), ("reused", REUSED))
COLOURS = {"C": COMPUTED, "R": REUSED}
_LETTERS = frozenset(map(chr, range(0x20, 0x7F))) | set("“”‘’…·±")  # of the font that Pillow brings
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
_LEAST_CELL = 5  # pixels of a decision, from which on a gap between two can be seen
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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
