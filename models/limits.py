"""What a model cannot draw as asked: sizes that it was not trained at, words that it never read, too few steps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .base import GenerationParams, ModelSpec
from .errors import TooFewSteps

if TYPE_CHECKING:
    from PIL import Image

_WORD = re.compile(r"[^\W\d_]+")
_WORDS_NAMED = 10
_LETTERS_NAMED = 30


def render_size(spec: ModelSpec, width: int, height: int) -> tuple[int, int]:
    """The (width, height) to draw at: the request's own, or the model's size of the nearest aspect."""
    if not spec.render_sizes:
        return width, height

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        aspect = abs(math.log((size[0] / size[1]) / (width / height)))
        return round(aspect, 9), abs(math.log(size[0] * size[1] / (width * height)))

    return min(spec.render_sizes, key=distance)


def fine_decoder(spec: ModelSpec, drawn: tuple[int, int], width: int, height: int) -> Path | None:
    """The folder of the model's fine decoder, where a picture of `drawn` (width, height) is to become a larger one."""
    return spec.fine_decoder if drawn[0] < width or drawn[1] < height else None


def need_two(params: GenerationParams, name: str) -> None:
    """Raise TooFewSteps for the stage `name`, which draws over a part of the schedule: one step is all or nothing."""
    if params.steps < 2:
        raise TooFewSteps(
            f"{name} draws over the picture in a part of the steps, and 1 step has no part: use 2 or more."
        )


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale `image` until it covers width × height, and cut the overhang evenly from both sides.

    By Lanczos; a mask, L, by a filter that rings at no edge.
    """
    from PIL import Image

    resampling = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    kept_width, kept_height = width / scale, height / scale
    left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return image.resize((width, height), resampling, box=box)


def unknown_words(spec: ModelSpec, prompt: str) -> list[str]:
    """Words of `prompt`, lower-cased, once each in their order, that the model was not trained on."""
    if not spec.vocabulary:
        return []
    words = (word.lower() for word in _WORD.findall(prompt) if word != "BREAK")
    return [word for word in dict.fromkeys(words) if word not in spec.vocabulary]


def warnings(spec: ModelSpec, prompt: str, width: int, height: int) -> list[str]:
    """Sentences for the user about what this model makes of the request."""
    sentences = []
    drawn = render_size(spec, width, height)
    if drawn != (width, height):
        how = "resampled" if fine_decoder(spec, drawn, width, height) is None else "enlarged"
        sentences.append(f"{spec.name} draws at {drawn[0]}×{drawn[1]}; the picture was {how} to {width}×{height}.")
    if unknown := unknown_words(spec, prompt):
        named = ", ".join(word[:_LETTERS_NAMED] for word in unknown[:_WORDS_NAMED])
        more = f" and {len(unknown) - _WORDS_NAMED} more" if len(unknown) > _WORDS_NAMED else ""
        sentences.append(f"{spec.name} was not trained on these words of the prompt: {named}{more}.")
    return sentences
