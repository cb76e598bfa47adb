"""The API reference is built from the docstrings without a warning."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import cache

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "docs")
    yield importlib.import_module("reference")
    sys.modules.pop("reference")


def test_it_is_built_and_holds_what_the_packages_offer(reference: ModuleType, tmp_path: Path) -> None:
    reference.build(tmp_path, source=False)
    page = (tmp_path / "cache.html").read_text(encoding="utf-8")
    assert [name for name in cache.__all__ if f'id="{name}"' not in page] == []
    for module in reference.MODULES:
        if not module.startswith("!"):
            assert (tmp_path / f"{module.replace('.', '/')}.html").exists(), module
    assert not (tmp_path / "models" / "embedded" / "recipe.html").exists()


def test_a_warning_is_an_error(reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dangling.py").write_text('def f(x: "Nowhere") -> None:\n    """Its type is not there."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserWarning, match="Nowhere"):
        reference.build(tmp_path / "out", ("dangling",))
    sys.modules.pop("dangling")
