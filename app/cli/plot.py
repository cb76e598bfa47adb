"""A cache's report as it left the service, read back from an answer's JSON or from a PNG's own text."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cli import COLOURS, INK, PALE, RULE, Canvas, width_of, wrapped
from app.errors import ServiceError
from app.images import encode, format_of

_TOLD = ("interval", "depth", "start", "end", "schedule", "guidance", "threshold", "max_consecutive", "forecast")
_REMEDY = "Give the JSON of an answer or of a job that is done, or a PNG as the service wrote it."


def plot(
    source: Annotated[Path, typer.Argument(help="An answer's JSON, or a PNG that the service wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plot: .png, .jpg or .webp.")] = Path("plot.png"),
) -> None:
    """Plot what the cache did in one request: each call's decision, and what it was decided by."""
    picture = encode(timeline(read(source)), format_of(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(picture)
    print(output)


class Report(BaseModel):
    """The `cache` object of an answer; `title` and `about` say of which picture, as far as the file knows."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="allow")

    strategy: str
    decisions: str = Field(pattern="^[CR ]*$")
    computed: int = Field(ge=0)
    reused: int = Field(ge=0)
    hit_rate: float = Field(ge=0, le=1)
    reuse_cost: Annotated[float | None, Field(ge=0)] = None
    predicted_speedup: Annotated[float | None, Field(gt=0)] = None
    threshold: Annotated[float | None, Field(ge=0)] = None
    residuals: list[Annotated[float | None, Field(ge=0)]] = []
    title: str = ""
    about: str = ""

    @property
    def summary(self) -> str:
        """What was asked of the cache and what came of it, in one line."""
        extra = {"threshold": self.threshold, **(self.model_extra or {})}
        asked = [f"{name} {extra[name]}" for name in _TOLD if extra.get(name) is not None]
        if extra.get("correction"):
            asked.append("corrected")
        found = [f"{self.computed} computed", f"{self.reused} reused", f"hit rate {self.hit_rate:.2f}"]
        if self.predicted_speedup is not None:
            found.append(f"{self.predicted_speedup:.2f} times as fast by operations")
        words = f"{self.strategy}: {', '.join([*asked, *found])}"
        return f"{self.about}. {words}" if self.about else words


def read(path: Path) -> Report:
    """Raises ServiceError, which says what the file lacks and what to give instead."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ServiceError(f"{path}: {error.strerror}.") from None
    text = _of_picture(path, data)
    try:
        answer = json.loads(data if text is None else text)
    except (ValueError, RecursionError):  # no JSON, not even text, or nested without end
        wrong = "is neither JSON nor a picture" if text is None else "carries a text that is no report"
        raise ServiceError(f"{path} {wrong}. {_REMEDY}") from None
    return _report(path, answer)


def _of_picture(path: Path, data: bytes) -> str | None:
    """The JSON in a PNG; None for what is no picture."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            picture.load()  # text may stand behind the pixels
            text: str | None = getattr(picture, "text", {}).get("wavespeed")
    except UnidentifiedImageError:
        return None
    except (OSError, ValueError, SyntaxError) as error:
        raise ServiceError(f"{path} is a damaged picture ({error}).") from None
    if text is None:
        raise ServiceError(f"{path} carries no report: JPEG, WebP and pictures that others saved have none. {_REMEDY}")
    return text


def _report(path: Path, answer: Any) -> Report:
    whole = answer if isinstance(answer, dict) else {}
    if isinstance(whole.get("result"), dict):
        whole = whole["result"]
    cache = whole.get("cache", whole if "decisions" in whole else None)
    if not isinstance(cache, dict):
        raise ServiceError(f"{path} holds no cache report. {_REMEDY}")
    try:
        return Report.model_validate({**cache, **_words(whole)})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise ServiceError(f"{path}: cache.{where}: {fault['msg']}. {_REMEDY}") from None


def _words(whole: dict[str, Any]) -> dict[str, str]:
    seeds = whole.get("seeds")
    seed = seeds[0] if isinstance(seeds, list) and seeds else whole.get("seed")
    about = [str(whole["model"])] if "model" in whole else []
    if "width" in whole and "height" in whole:
        about.append(f"{whole['width']}x{whole['height']}")
    if "steps" in whole:
        about.append(f"{whole['steps']} steps")
    if seed is not None:
        about.append(f"seed {seed}")
    prompt = whole.get("prompt")
    return {"title": f"“{prompt}”" if prompt else "What the cache did", "about": ", ".join(about)}


_WIDTH, _HEIGHT, _MARGIN = 1400, 600, 28  # pixels, as all below
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 1256, 172, 460
_STRIP_TOP, _STRIP = 474, 32
_TITLE, _TEXT, _SMALL = 28, 20, 17
_DOT, _STEM, _LINE = 6, 3, "#c1121f"
_ROOM = 3.0  # times the threshold; what lies higher stands at the upper edge, with its value
_SPACINGS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_NUMBERS, _TICKS = 30, 5  # most that stand below the strip, and at the axis above 0


def timeline(report: Report) -> Image.Image:
    """RGB. Without residuals, which only a first-block cache has, each call is as high as its share of a full one."""
    page = Canvas(_WIDTH, _HEIGHT)
    for line in wrapped(report.title, _TITLE, _WIDTH - 2 * _MARGIN - 260, 1):
        page.write((_MARGIN, _MARGIN), line, _TITLE)
    page.legend(_WIDTH - _MARGIN, _MARGIN + 4, _TEXT)
    for number, line in enumerate(wrapped(report.summary, _TEXT, _WIDTH - 2 * _MARGIN, 2)):
        page.write((_MARGIN, 68 + 26 * number), line, _TEXT, PALE)
    if report.residuals and report.threshold is not None:
        _residuals(page, report.decisions, report.residuals, report.threshold)
    else:
        _costs(page, report)
    page.strip((_LEFT, _STRIP_TOP, _RIGHT, _STRIP_TOP + _STRIP), report.decisions)
    _numbers(page, report.decisions)
    return page.image


def _residuals(page: Canvas, decisions: str, residuals: Sequence[float | None], threshold: float) -> None:
    highest = max([*(value for value in residuals if value is not None), threshold * 1.2, 1e-6])
    if threshold > 0:
        highest = min(highest, threshold * _ROOM)
    _axis(page, highest, "change that was held against the threshold")
    _rule(page, threshold / highest, "threshold", f"{threshold:g}")
    centres = _centres(decisions)
    wide = (_RIGHT - _LEFT) / max(1, len(decisions))
    for (centre, letter), value in zip(centres, residuals, strict=False):
        if value is None:
            page.write((centre, _BOTTOM - 4), "-", _TEXT, PALE, "md")
            continue
        level = _level(min(value, highest) / highest)
        page.draw.line((centre, _BOTTOM, centre, level), fill=COLOURS[letter], width=_STEM)
        page.draw.ellipse((centre - _DOT, level - _DOT, centre + _DOT, level + _DOT), fill=COLOURS[letter])
        if value > highest and width_of(f"{value:.2g}", _SMALL) < wide:
            page.write((centre, level - _DOT - 2), f"{value:.2g}", _SMALL, PALE, "md")


def _costs(page: Canvas, report: Report) -> None:
    _axis(page, 1.0, "operations of a call, as a share of a full one")
    half = (_RIGHT - _LEFT) / max(1, len(report.decisions)) / 2
    for centre, letter in _centres(report.decisions):
        share = 1.0 if letter == "C" else report.reuse_cost
        if share is not None:
            left, right = round(centre - half), round(centre + half) - 1
            page.draw.rectangle((left, _level(share), max(left, right - 1), _BOTTOM), fill=COLOURS[letter])
    if report.predicted_speedup:
        _rule(page, 1 / report.predicted_speedup, "mean", f"{1 / report.predicted_speedup:.2f}")


def _axis(page: Canvas, highest: float, name: str) -> None:
    page.write((_MARGIN, _TOP - 44), name, _SMALL)
    # Round distances, from far too small on: 1, 2 and 5 times each power of ten.
    distances = (digit * 10.0**power for power in itertools.count(-9) for digit in (1, 2, 5))
    each = next(each for each in distances if highest / each <= _TICKS)
    for number in range(int(highest / each * (1 + 1e-9)) + 1):
        level = _level(number * each / highest)
        page.draw.line((_LEFT, level, _RIGHT, level), fill=RULE)
        page.write((_LEFT - 8, level), f"{number * each:.3g}", _SMALL, PALE, "rm")


def _rule(page: Canvas, share: float, *name: str) -> None:
    """A line across, its name in lines at its right end."""
    level = _level(share)
    page.draw.line((_LEFT, level, _RIGHT, level), fill=_LINE, width=2)
    for number, line in enumerate(name):
        page.write((_RIGHT + 8, level - 11 + 21 * (number - (len(name) - 1) / 2)), line, _SMALL, _LINE)


def _centres(decisions: str) -> list[tuple[float, str]]:
    """Of each call's cell in the strip; the spaces between batches and passes have a cell too."""
    width = (_RIGHT - _LEFT) / max(1, len(decisions))
    return [(_LEFT + (at + 0.5) * width, letter) for at, letter in enumerate(decisions) if letter in COLOURS]


def _numbers(page: Canvas, decisions: str) -> None:
    """Below the strip, from 1, as many as there is room for."""
    centres = _centres(decisions)
    each = next((step for step in _SPACINGS if len(centres) <= step * _NUMBERS), _SPACINGS[-1])
    for number, (centre, _) in enumerate(centres, 1):
        if number % each == 0 or (number == 1 and each > 2):
            page.write((centre, _STRIP_TOP + _STRIP + 8), str(number), _SMALL, PALE, "ma")
    name = "call of the denoiser, from noise to picture"
    page.write(((_LEFT + _RIGHT) / 2, _STRIP_TOP + _STRIP + 34), name, _SMALL, INK, "ma")


def _level(share: float) -> float:
    """The y of a share of the axis' height, pixels."""
    return _BOTTOM - (_BOTTOM - _TOP) * share
