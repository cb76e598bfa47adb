"""Textual inversion against a vocabulary extended by hand; and no trace of it afterwards."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache import NoCache
from models.adapters import embedding
from models.base import Embedding, GenerationParams, Step
from models.errors import AdapterFailed, GenerationCancelled
from models.generation import LoadedModel
from models.libraries import quiet

PARAMS = GenerationParams(
    prompt="a misty forest", negative_prompt="", width=64, height=64, steps=3, guidance_scale=3.0, seeds=(7,)
)
WIDTH = 16  # of the tiny text encoder


def ignore(step: Step) -> None:
    """A step hook that wants nothing."""


def pixels(drawn: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in drawn])


def saved(folder: Path, name: str, **tensors: torch.Tensor) -> Embedding:
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return Embedding(name=name, path=path)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def known(model: LoadedModel, word: str) -> torch.Tensor:
    """The vectors of a word that the tokenizer has, without the two tokens at the ends."""
    ids = model.pipeline.tokenizer(word).input_ids[1:-1]
    return model.pipeline.text_encoder.get_input_embeddings().weight[ids].detach().clone()


@pytest.mark.parametrize("where", ["prompt", "negative_prompt"])
def test_an_embedding_of_a_words_own_vectors_is_that_word(sd: LoadedModel, tmp_path: Path, where: str) -> None:
    """The oracle: the same picture, bit for bit, as with the word itself in the name's place."""
    word = saved(tmp_path, "my-Word", emb_params=known(sd, "snow"))
    params = replace(PARAMS, embeddings=(word,))
    ours = sd.generate(replace(params, **{where: "in MY-word here"}), NoCache(), ignore)
    spelled = sd.generate(replace(PARAMS, **{where: "in snow here"}), NoCache(), ignore)
    assert np.array_equal(pixels(ours.images), pixels(spelled.images))


def test_new_vectors_draw_what_diffusers_own_loading_draws(sd: LoadedModel, tmp_path: Path) -> None:
    new = vectors(3)
    ours = sd.generate(
        replace(PARAMS, prompt="a style of it", embeddings=(saved(tmp_path, "style", emb_params=new),)),
        NoCache(),
        ignore,
    )
    theirs = copy.copy(sd.pipeline)
    theirs.tokenizer = copy.deepcopy(sd.pipeline.tokenizer)
    theirs.text_encoder = copy.deepcopy(sd.pipeline.text_encoder)
    with quiet():
        theirs.load_textual_inversion({"style": new}, token="<style>")
        expected = theirs(
            "a <style> of it",
            negative_prompt="",
            num_inference_steps=3,
            guidance_scale=3.0,
            width=64,
            height=64,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images
    assert np.array_equal(pixels(ours.images), pixels(expected))
    plain = sd.generate(replace(PARAMS, prompt="a style of it"), NoCache(), ignore)
    assert not np.array_equal(pixels(ours.images), pixels(plain.images))


def test_sdxl_reads_a_matrix_for_each_of_its_encoders(sdxl: LoadedModel, tmp_path: Path) -> None:
    """The pooled text is the end token's state, not that of the new token, whose id is the highest."""
    ids = sdxl.pipeline.tokenizer("snow").input_ids[1:-1]
    tables = [getattr(sdxl.pipeline, name).get_input_embeddings().weight for name in ("text_encoder", "text_encoder_2")]
    both = {key: table[ids].detach().clone() for key, table in zip(("clip_l", "clip_g"), tables, strict=True)}
    params = replace(PARAMS, prompt="in word here", embeddings=(saved(tmp_path, "word", **both),))
    spelled = replace(PARAMS, prompt="in snow here")
    plain = sdxl.generate(spelled, NoCache(), ignore)
    assert np.array_equal(pixels(sdxl.generate(params, NoCache(), ignore).images), pixels(plain.images))
    ends = [part for part in sdxl.pipeline.text_encoder_2.modules() if part.__dict__.get("eos_token_id") is not None]
    assert ends
    try:
        for part in ends:
            part.eos_token_id = 2  # as published SDXL says, and means the highest id by it
        swapped = {"clip_l": both["clip_l"], "clip_g": both["clip_g"].flip(0)}
        other = replace(params, embeddings=(saved(tmp_path, "word", **swapped),))
        assert not np.array_equal(pixels(sdxl.generate(other, NoCache(), ignore).images), pixels(plain.images))
        assert [part.eos_token_id for part in ends] == [2] * len(ends)
    finally:
        for part in ends:
            part.eos_token_id = 1
    one = saved(tmp_path, "word", emb_params=vectors(1))
    with pytest.raises(AdapterFailed, match="2 text encoder"):
        sdxl.generate(replace(params, embeddings=(one,)), NoCache(), ignore)


def traces(model: LoadedModel) -> dict[str, Any]:
    pipeline = model.pipeline
    matrix = pipeline.text_encoder.get_input_embeddings()
    return {
        "tokenizer": id(pipeline.tokenizer),
        "words": dict(pipeline.tokenizer.get_vocab()),
        "matrix": (id(matrix), matrix.weight.numpy(force=True).tobytes()),
        "modules": [
            (path, id(module), sorted(module.__dict__)) for path, module in pipeline.text_encoder.named_modules()
        ],
        "size": pipeline.text_encoder.config.vocab_size,
    }


def test_no_trace_after_success_error_and_cancel(sd: LoadedModel, tmp_path: Path) -> None:
    params = replace(PARAMS, prompt="a style", embeddings=(saved(tmp_path, "style", emb_params=vectors(2)),))
    plain = pixels(sd.generate(PARAMS, NoCache(), ignore).images)
    before = traces(sd)
    sd.generate(params, NoCache(), ignore)
    assert traces(sd) == before

    def stop(step: Step) -> None:
        raise GenerationCancelled

    with pytest.raises(GenerationCancelled):
        sd.generate(params, NoCache(), stop)
    assert traces(sd) == before
    narrow = saved(tmp_path, "narrow", emb_params=torch.ones(1, 5))
    with pytest.raises(AdapterFailed, match=r"'narrow'.*5 numbers.*16"):
        sd.generate(replace(params, embeddings=(*params.embeddings, narrow)), NoCache(), ignore)
    assert traces(sd) == before
    assert np.array_equal(pixels(sd.generate(PARAMS, NoCache(), ignore).images), plain)


def test_a_name_in_the_prompt_is_not_an_unknown_word(sd: LoadedModel, tmp_path: Path) -> None:
    sd_like: Any = LoadedModel(copy.copy(sd.model))
    sd_like.model.spec = replace(sd.spec, vocabulary=frozenset({"a", "forest"}))
    style = saved(tmp_path, "deep-style", emb_params=vectors(1))
    params = replace(PARAMS, prompt="a deep-style forest", embeddings=(style,))
    assert sd_like.generate(params, NoCache(), ignore).warnings == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"clip_l": torch.ones(1, WIDTH), "clip_g": torch.ones(1, 20)},
        {"emb_params": torch.ones(1, 1, WIDTH)},
        {"emb_params": torch.ones(0, WIDTH)},
        {"emb_params": torch.ones(1, WIDTH, dtype=torch.int64)},
        {"a": torch.ones(1, WIDTH), "b": torch.ones(1, WIDTH)},
        {"emb_params": torch.tensor(1.0)},
        {"emb_params": torch.full((1, WIDTH), torch.nan)},
    ],
    ids=["of SDXL", "three dimensions", "no vectors", "integers", "two tensors", "a number", "NaN"],
)
def test_a_file_that_does_not_fit_is_named(sd: LoadedModel, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    odd = saved(tmp_path, "odd", **tensors)
    with pytest.raises(AdapterFailed, match="'odd' cannot be used"):
        sd.generate(replace(PARAMS, prompt="odd", embeddings=(odd,)), NoCache(), ignore)


def test_a_truncated_file_is_named(sd: LoadedModel, tmp_path: Path) -> None:
    style = saved(tmp_path, "style", emb_params=vectors(2))
    style.path.write_bytes(style.path.read_bytes()[:-9])
    with pytest.raises(AdapterFailed, match=r"'style' cannot be used .* cannot be read"):
        sd.generate(replace(PARAMS, prompt="style", embeddings=(style,)), NoCache(), ignore)


def test_a_file_of_a_subfolder_is_named_with_or_without_its_folders() -> None:
    files = {name: Path(f"{name}.safetensors") for name in ("hands", "style/hands", "style/ink")}
    texts = ("an ink drawing of hands, style/hands",)
    found = {(one.name, one.path.as_posix()) for one in embedding.mentioned(files, texts)}
    assert found == {
        ("hands", "hands.safetensors"),
        ("style/hands", "style/hands.safetensors"),
        ("ink", "style/ink.safetensors"),
    }
    assert embedding.mentioned({"a/ink": Path("a"), "b/ink": Path("b")}, ("in ink",)) == ()


def test_names_are_words_of_their_own() -> None:
    files = {name: Path(f"{name}.safetensors") for name in ("art", "Bad-Hands", "c++")}
    found = embedding.mentioned(files, ("a party in a cart", "(bad-hands:1.2), c++"))
    assert [one.name for one in found] == ["Bad-Hands", "c++"]
    assert embedding.mentioned(files, ("bad-hands-5 smart-art",)) == ()
    assert embedding.without("art, (BAD-hands:1.2) art-deco", (*found, Embedding(name="art", path=Path()))) == (
        " , ( :1.2) art-deco"
    )
