"""`python -m app plot`: a report read back from what the service wrote, and drawn."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor
from typer.testing import CliRunner

import app.__main__ as command_line
from app import cli
from app.cli.plot import Report, read, timeline
from app.engine.types import Job
from app.errors import ServiceError
from app.images import encode
from app.infotext import text_chunks
from cache import DeepCache
from models.base import GenerationParams

COLOURS = {"C": ImageColor.getrgb(cli.COMPUTED), "R": ImageColor.getrgb(cli.REUSED)}
THRESHOLD_LINE = ImageColor.getrgb("#c1121f")
CACHE: dict[str, Any] = {
    "strategy": "deepcache",
    "computed": 3,
    "reused": 3,
    "hit_rate": 0.5,
    "decisions": "CRRCRC",
    "interval": 2,
    "depth": 2,
    "forecast": "damped",
    "reuse_cost": 0.25,
    "predicted_speedup": 1.6,
    "cache_bytes": 100,
}
FIRST_BLOCK: dict[str, Any] = {
    **{key: CACHE[key] for key in ("computed", "reused", "hit_rate", "decisions")},
    "strategy": "first_block",
    "threshold": 0.1,
    "residuals": [None, 0.02, 0.09, 0.15, 0.01, 7.0],
}


def columns(image: Image.Image, count: int) -> list[np.ndarray[Any, Any]]:
    """The pixels of each call's share of the plot, left to right, cut where the strip's cells lie."""
    pixels = np.asarray(image)
    coloured = (pixels == COLOURS["C"]).all(-1) | (pixels == COLOURS["R"]).all(-1)
    strip = int(np.flatnonzero(coloured.sum(1) > coloured.sum(1).max() * 0.9)[-1])  # the lowest full line
    at = np.flatnonzero(coloured[strip])
    edges = np.linspace(at[0], at[-1] + 1, count + 1).round().astype(int)
    return [pixels[:, start + 1 : end - 1] for start, end in pairwise(edges)]


def heights(column: np.ndarray[Any, Any], colour: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.flatnonzero((column == colour).all(-1).any(1))


def png(cache: dict[str, Any]) -> bytes:
    job = Job(id="1", model="tiny", params=GenerationParams(prompt="a wood", seeds=(4,)), strategy=DeepCache())
    return encode(Image.new("RGB", (64, 64)), "png", text_chunks(job.params, 4, job.model, job.strategy.name, cache))


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"image": "aaaa", "model": "tiny", "cache": CACHE}).encode(),
        json.dumps({"state": "done", "result": {"model": "tiny", "cache": CACHE}}).encode(),
        json.dumps(CACHE).encode(),
        png(CACHE),
    ],
    ids=["answer", "job", "report", "picture"],
)
def test_whatever_the_service_wrote_can_be_plotted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "source").write_bytes(content)
    result = CliRunner().invoke(
        command_line.cli, ["plot", str(tmp_path / "source"), "-o", str(tmp_path / "a" / "plot.png")]
    )
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "a" / "plot.png") as image:
        found = columns(image, 6)
    for letter, column in zip(CACHE["decisions"], found, strict=True):
        own, other = (heights(column, COLOURS[one]) for one in (letter, "CR".replace(letter, "")))
        assert len(other) == 0
        assert len(own) > 0


def test_a_call_is_as_high_as_its_share_of_a_full_one() -> None:
    image = timeline(Report.model_validate(CACHE))
    high = {
        letter: len(heights(column, COLOURS[letter]))
        for letter, column in zip("CR", columns(image, 6)[:2], strict=True)
    }
    strip = 32
    assert (high["R"] - strip) / (high["C"] - strip) == pytest.approx(0.25, abs=0.01)  # pixels are whole


def test_residuals_stand_above_the_threshold_or_below_it() -> None:
    image = timeline(Report.model_validate(FIRST_BLOCK))
    found = columns(image, 6)
    line = int(heights(np.asarray(image), THRESHOLD_LINE)[0])
    tops = []
    for letter, value, column in zip(FIRST_BLOCK["decisions"], FIRST_BLOCK["residuals"], found, strict=True):
        top = int(heights(column, COLOURS[letter])[0])
        tops.append(top)
        if value is not None:
            assert (top < line) == (value > FIRST_BLOCK["threshold"]) or abs(value - 0.1) < 0.02
    assert tops[0] > max(tops[1:]), "a call that had nothing to compare with has no residual"
    assert tops[5] < tops[3] < tops[2] < tops[1] < tops[4]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("residuals", [[None], [0.0], [1e-12], [1e30]])
def test_extremes_are_drawn(threshold: float, residuals: list[float | None]) -> None:
    report = FIRST_BLOCK | {"threshold": threshold, "residuals": residuals, "decisions": "C"}
    image = timeline(Report.model_validate(report))
    assert len(heights(np.asarray(image), THRESHOLD_LINE)) > 0


def test_a_long_run_of_many_batches_is_drawn() -> None:
    report = CACHE | {"decisions": " ".join(["CRR" * 100] * 10)}
    image = timeline(Report.model_validate(report))
    assert len(heights(np.asarray(image), COLOURS["C"])) > 0


def test_what_the_plot_says_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(CACHE))
    report = read(tmp_path / "x.png")
    assert report.title == "“a wood”"
    assert report.summary == (
        "tiny, 512x512, 20 steps, seed 4. deepcache: interval 2, depth 2, forecast damped, 3 computed, 3 reused, "
        "hit rate 0.50, 1.60 times as fast by operations"
    )
    assert ", forecast damped, corrected, 3 computed" in Report.model_validate(CACHE | {"correction": True}).summary
    assert "correct" not in Report.model_validate(CACHE | {"correction": False}).summary


@pytest.mark.parametrize("seeds", [5, "x", {"a": 1}, [], None])
def test_seeds_that_are_none_are_not_told(tmp_path: Path, seeds: object) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"seeds": seeds, "cache": CACHE}))
    assert read(tmp_path / "x.json").about == ""


def with_text(words: str) -> bytes:
    """A PNG in which another program has written where our report stands."""
    return encode(Image.new("RGB", (8, 8)), "png", {"wavespeed": words})


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "neither JSON nor a picture"),
        (b"\xff\x00", "neither JSON nor a picture"),
        (b"[1, 2]", "no cache report"),
        (b'{"cache": []}', "no cache report"),
        (b'{"error": {"type": "invalid"}}', "no cache report"),
        (json.dumps({"cache": CACHE | {"decisions": "CXR"}}).encode(), "cache.decisions"),
        (json.dumps({"cache": {**FIRST_BLOCK, "residuals": [float("nan")]}}).encode(), "cache.residuals"),
        (json.dumps({"cache": {"decisions": "C"}}).encode(), "cache.strategy"),
        (encode(Image.new("RGB", (8, 8)), "png"), "carries no report"),
        (jpeg(), "carries no report"),
        (png(CACHE)[:60], "damaged picture"),
        (with_text("no JSON"), "carries a text that is no report"),
        (b"[" * 100_000, "neither JSON nor a picture"),
    ],
)
def test_a_file_without_a_report_is_refused_with_the_reason(tmp_path: Path, content: bytes | None, words: str) -> None:
    source = tmp_path / "source"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(ServiceError, match=words):
        read(source)
