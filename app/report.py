"""A cache's report as it left the service, read back from an answer's JSON or from a PNG's own text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import ServiceError

_TOLD = ("interval", "depth", "start", "end", "schedule", "guidance", "threshold", "max_consecutive", "forecast")
_REMEDY = "Give the JSON of an answer or of a job that is done, or a PNG as the service wrote it."


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
