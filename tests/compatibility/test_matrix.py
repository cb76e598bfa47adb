"""Every pair of the document's compatibility list, through the HTTP API, and the page that is printed from them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from models.registry import Registry
from tests.compatibility.conftest import filled, made_for
from tests.compatibility.files import FILES
from tests.compatibility.page import page
from tests.compatibility.rows import ON, ROWS, Row

ROOT = Path(__file__).resolve().parents[2]
SIDES = {"tiny-sd": 128, "tiny-flux": 128}  # what the embedded models draw at; 64 pixels for the others
PAIRS = [(row, model, fields) for row in ROWS for model in row.models for fields in row.fields]


def name_of(value: object) -> str:
    if isinstance(value, Row):
        return f"{value.cache} and {value.beside}"
    return " ".join(f"{field}={part}" for field, part in value.items()) if isinstance(value, dict) else str(value)


def body(row: Row, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    side = SIDES.get(model, 64)
    steps = 6 if row.passes or "multiscale_enabled" in fields else 4  # each pass reuses, and each of several sizes
    base = {"prompt": "a misty forest", "model": model, "width": side, "height": side, "steps": steps, "seed": 1}
    return filled({**base, **ON[row.cache], **fields}, model, side)


@pytest.mark.parametrize(("row", "model", "fields"), PAIRS, ids=name_of)
async def test_pair(
    client: httpx.AsyncClient, registry: Registry, weights: Path, row: Row, model: str, fields: Mapping[str, Any]
) -> None:
    if row.remedy is None:
        made_for(registry.get(model), f"own-{model}", weights)
    response = await client.post("/api/generate", json=body(row, model, fields))
    if row.remedy is not None:
        field, words = row.remedy
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["field"]) == (422, "incompatible", field)
        assert words in error["message"]
        return
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"] == model
    cache = answer["cache"]
    assert cache["strategy"] == {"DeepCache": "deepcache", "FBCache": "first_block"}[row.cache]
    assert cache["reused"] > 0, answer["warnings"]
    assert cache["computed"] + cache["reused"] == len(cache["decisions"].replace(" ", ""))
    if fields.get("attention") == "auto":
        assert answer["attention"] in ("sdpa", "sage", "sparge")
    reused = {one["name"]: one["reused"] for one in cache.get("passes", ())}
    assert all(reused[name] > 0 for name in row.passes), reused
    size = Image.open(io.BytesIO(base64.b64decode(answer["image"]))).size
    assert size == (answer["width"], answer["height"])


def test_every_line_of_the_document_has_its_row() -> None:
    """Against the lines themselves, kept here as the document words them."""
    for cache, verdicts in DOCUMENT.items():
        for beside, works in verdicts.items():
            (row,) = [row for row in ROWS if (row.cache, row.beside) == (cache, beside)]
            assert (row.remedy is None) == works, (cache, beside)


DOCUMENT = {
    "DeepCache": {
        "Stable Diffusion 1.5": True,
        "Stable Diffusion 2.1": True,
        "SDXL": True,
        "All samplers (Euler, DPM++, etc.)": True,
        "LoRA adapters": True,
        "Textual inversion embeddings": True,
        "HiresFix": True,
        "ADetailer": True,
        "Multi-scale diffusion": True,
        "SageAttention/SpargeAttn": True,
        "Stable-Fast": True,
        "Flux models (use FBCache instead)": False,
        "Img2Img mode (can cause artifacts)": False,
    },
    "FBCache": {
        "Flux models": True,
        "SageAttention/SpargeAttn": True,
        "All Flux-compatible features": True,
        "SD1.5/SDXL (use DeepCache instead)": False,
        "Stable-Fast (Flux not supported by Stable-Fast)": False,
    },
}


def test_the_page_is_printed_from_these_rows() -> None:
    printed = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert printed == page(), "run: python -m tests.compatibility.page > docs/compatibility.md"


def test_the_page_names_no_pair_twice() -> None:
    lines = [line for line in page().splitlines() if re.match(r"\| [✅❌] ", line)]
    assert len(lines) == len(set(lines)) == len(ROWS) + len(FILES)
