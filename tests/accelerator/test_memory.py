"""The server's arithmetic, and the page, against bytes of the simulated device at full size."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from benchmarks.geometries import FLUX_DEV, SD15, SDXL, Geometry
from tests.accelerator.memory import Peaks, peaks, strategies


@functools.cache
def found_peaks(geometry: Geometry, strategy: str, **options: Any) -> Peaks:
    return peaks(geometry, strategies(geometry)[strategy], **options)


PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


@pytest.mark.parametrize(
    ("geometry", "images", "options"),
    [
        (SD15, 1, {}),
        (SD15, 2, {"vae_slicing": True}),
        (SD15, 1, {"vae_tiling": True}),
        (SDXL, 1, {}),
        (FLUX_DEV, 1, {}),
    ],
    ids=lambda one: getattr(one, "name", str(one)),
)
def test_admission_counts_what_a_decode_takes(geometry: Geometry, images: int, options: dict[str, Any]) -> None:
    """Never more than that: refused is what cannot work. SDXL's runs in float32, of weights in half precision."""
    found = found_peaks(geometry, "default", images=images, **options)
    assert found.decode == max(found.text, found.denoise, found.decode)
    assert 0.97 <= found.working / (found.decode - found.weights) <= 1
    assert found.denoise - found.weights < found.working + 0.2e9  # what the bound leaves to the second attempt
    kept = f"| {found.weights / 1e9:.2f} | {found.text / 1e9:.2f} |"
    if images == 1:
        assert kept in PAGE.read_text(encoding="utf-8")  # made by python -m tests.accelerator memory


@pytest.mark.parametrize("geometry", [SD15, SDXL, FLUX_DEV], ids=lambda one: one.name)
def test_a_cache_takes_no_more_than_the_document_says(geometry: Geometry) -> None:
    """What is kept: 0.2 GB at most beside a UNet, 0.12 beside Flux."""
    none, cached = found_peaks(geometry, "none", steps=1), found_peaks(geometry, "default", images=1)
    assert 0 < cached.kept < (0.12e9 if geometry is FLUX_DEV else 0.2e9)
    assert cached.denoise - none.denoise < 0.2e9
    if geometry is SD15:
        assert cached.decode < 3.4e9


def test_offloaded_weights_leave_room() -> None:
    whole, model, sequential = (
        found_peaks(SD15, "none", steps=1, offload=how) for how in (None, "model", "sequential")
    )
    assert (model.weights, sequential.weights) == (0, pytest.approx(0, abs=2000))  # what lies in no layer of its own
    assert sequential.denoise < model.denoise < whole.denoise
