"""CLIP's tokenizer is the published one; T5's is found, or its place is told."""

from __future__ import annotations

import importlib.util
import shutil
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from models.base import ModelSpec
from models.embedded import FOLDER
from models.errors import LoadFailed
from models.loading import tokenizers
from models.loading.shapes import configurations

TEXTS = ("a photo of a cat", "Ünïcode naïve café, 12345 emoji 🎉 it's we'll", "  double  spaces\n x", "日本語", "")


@pytest.fixture(scope="module")
def published() -> Any:
    """OpenAI's own, from the file of their package: its module alone, because the package imports torchvision."""
    file = distribution("openai-clip").locate_file("clip/simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("simple_tokenizer", str(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_texts_become_what_openais_tokenizer_makes_of_them(text: str, published: Any) -> None:
    ours = tokenizers.clip_tokenizer("!")(text).input_ids
    assert ours == [49406, *published.encode(text), 49407]


@pytest.mark.parametrize(("family", "padding"), [("sd15", [49407]), ("sd21", [0]), ("sdxl", [49407, 0])])
def test_short_texts_are_filled_with_what_the_family_was_trained_on(family: str, padding: list[int]) -> None:
    spec = ModelSpec(name="a", family=family, source=Path("a.safetensors"))
    made = tokenizers.tokenizers(spec, configurations(family, {}))
    assert list(made) == ["tokenizer", "tokenizer_2"][: len(padding)]
    filled = [one("cat", padding="max_length").input_ids for one in made.values()]
    assert filled == [[49406, 2368, 49407, *[pad] * 74] for pad in padding]


def test_the_tokenizer_of_t5_is_read_from_its_place(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "tiny-flux" / "tokenizer_2" / "tokenizer.json", tmp_path)
    spec = ModelSpec(name="a", family="flux-dev", source=Path("a.safetensors"), parts={"tokenizer_2": tmp_path})
    made = tokenizers.tokenizers(spec, configurations("flux-dev", {}))
    assert made["tokenizer_2"]("misty forest").input_ids[-1] == 1
    assert (made["tokenizer_2"].model_max_length, made["tokenizer"].model_max_length) == (512, 77)


def test_without_a_network_the_place_of_the_tokenizer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(spec: ModelSpec, hub: object, path: str) -> Path:
        raise LoadFailed(f"The model 'a' could not be fetched from {hub}: the hub cannot be reached.")

    monkeypatch.setattr(tokenizers, "fetch_file", unreachable)
    spec = ModelSpec(name="a", family="flux-dev", source=Path("a.safetensors"), parts={"tokenizer_2": tmp_path / "t5"})
    with pytest.raises(
        LoadFailed, match=r"google-t5/t5-small.* Without a network, put tokenizer.json .* at .*t5/tokeni"
    ):
        tokenizers.tokenizers(spec, configurations("flux-dev", {}))
