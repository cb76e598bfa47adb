"""Weights, long prompts and skipped layers against compel's own classes, diffusers, and the encoder called by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compel import Compel

from cache import DeepCache, NoCache
from models.base import GenerationParams, Step
from models.generation import LoadedModel
from models.text import clip as text
from models.text.clip import TooFewLayers
from models.text.prompt import parse

WINDOW = 16  # tokens of the tiny encoder, two of them at the ends
LONG = "a misty forest, a snowy hill, a stormy sea"  # a token a letter
PARAMS = GenerationParams(prompt="forest", width=64, height=64, steps=2, guidance_scale=3.0, seeds=(7,))


def ignore(step: Step) -> None:
    """A step hook that wants nothing."""


def pixels(drawn: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in drawn.images])


def states(model: LoadedModel, *prompts: str, clip_skip: int | None = None) -> list[torch.Tensor]:
    with torch.no_grad():
        clips = text.encoders(model.pipeline, model.model.device, clip_skip)
        return text.states(clips, [parse(prompt) for prompt in prompts])


@pytest.mark.parametrize("prompt", ["", "forest", "a (red) sea"])
def test_one_plain_window_is_diffusers_own_encoding(sd: LoadedModel, prompt: str) -> None:
    expected = sd.pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
    assert torch.equal(states(sd, prompt.replace("(", r"\(").replace(")", r"\)"))[0], expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("a (red:1.3) sea", "a (red)1.3 sea"),
        ("a (red:0.4) sea", "a (red)0.4 sea"),
        ("((a) red) sea", "((a)1.1 red)1.1 sea"),
        (LONG.replace("snowy", "(snowy:1.5)"), LONG.replace("snowy", "(snowy)1.5")),
    ],
)
def test_weights_are_compels(sd: LoadedModel, ours: str, theirs: str) -> None:
    """Two syntaxes of one meaning. A mask that hides nothing, which compel passes, changes the last bits."""
    from compel.embeddings_provider import SplitLongTextMode

    compel = Compel(
        sd.pipeline.tokenizer,
        sd.pipeline.text_encoder,
        truncate_long_prompts=False,
        split_long_text_mode=SplitLongTextMode.PHRASES,
    )
    torch.testing.assert_close(states(sd, ours)[0], compel(theirs), rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_read_window_by_window(sd: LoadedModel) -> None:
    """The oracle: each stretch of a window's letters encoded by itself, and the states strung together."""
    tokenizer, encoder = sd.pipeline.tokenizer, sd.pipeline.text_encoder
    ids = tokenizer(LONG).input_ids[1:-1]
    (ours,) = states(sd, LONG)
    windows = ours.shape[1] // WINDOW
    assert windows >= -(-len(ids) // (WINDOW - 2)) > 1
    read = 0
    for window in range(windows):
        found = ours[:, window * WINDOW : (window + 1) * WINDOW]
        best = None
        for end in range(read + 1, min(read + WINDOW - 2, len(ids)) + 1):
            padded = [0, *ids[read:end], 1]
            padded += [1] * (WINDOW - len(padded))
            with torch.no_grad():
                if torch.equal(encoder(torch.tensor([padded])).last_hidden_state, found):
                    best = end
        assert best is not None, f"window {window} is not the encoding of the letters from {read} on"
        read = best
    assert read == len(ids)


def test_break_begins_a_window(sd: LoadedModel) -> None:
    """Each part encoded by itself, and the states strung together; diffusers alone would read the word."""
    (ours,) = states(sd, "a sea BREAK red")
    assert torch.equal(ours, torch.cat([states(sd, "a sea")[0], states(sd, "red")[0]], dim=1))
    (weighed,) = states(sd, "a (sea BREAK red:1.3)")
    assert torch.equal(weighed, torch.cat([states(sd, "a (sea:1.3)")[0], states(sd, "(red:1.3)")[0]], dim=1))
    clips = text.encoders(sd.pipeline, sd.model.device, None)
    assert not text.plain_enough(clips, [parse("a BREAK b")], None)


def test_sdxl_pools_the_first_part(sdxl: LoadedModel) -> None:
    broken, first = (sdxl.model.encode(replace(PARAMS, prompt=prompt)) for prompt in ("a sea BREAK red", "a sea"))
    assert torch.equal(broken["pooled_prompt_embeds"], first["pooled_prompt_embeds"])
    assert broken["prompt_embeds"].shape[1] == 2 * first["prompt_embeds"].shape[1]


@pytest.mark.parametrize("prompt", ["a sea", "a (sea:1.3)", LONG], ids=["plain", "weighted", "long"])
def test_sdxl_without_a_negative_prompt_takes_zeros(sdxl: LoadedModel, prompt: str) -> None:
    """diffusers' force_zeros_for_empty_prompt, on the weighted path as well; with words there it reads them."""
    for negative, zero in (("", True), (" ", True), ("rain", False)):
        encoded = sdxl.model.encode(replace(PARAMS, prompt=prompt, negative_prompt=negative))
        assert encoded["negative_prompt_embeds"].shape == encoded["prompt_embeds"].shape
        for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
            assert bool(encoded[name].eq(0).all()) is zero
    config = sdxl.pipeline.config
    sdxl.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        assert sdxl.model.encode(replace(PARAMS, prompt=prompt))["negative_prompt_embeds"].ne(0).any()
    finally:
        sdxl.pipeline.register_to_config(force_zeros_for_empty_prompt=config["force_zeros_for_empty_prompt"])


def test_prompts_of_unequal_length_are_filled_with_the_empty_one(sd: LoadedModel) -> None:
    long, short = states(sd, LONG, "sea")
    assert long.shape == short.shape
    assert torch.equal(short[:, :WINDOW], states(sd, "sea")[0])
    assert torch.equal(short[:, WINDOW : 2 * WINDOW], states(sd, "")[0])


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_reads_an_earlier_layer(sd: LoadedModel, clip_skip: int) -> None:
    encoder = sd.pipeline.text_encoder
    ids = sd.pipeline.tokenizer("forest", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-clip_skip]
        expected = encoder.final_layer_norm(hidden)
    assert torch.equal(states(sd, "forest", clip_skip=clip_skip)[0], expected)


def test_clip_skip_and_its_bound_reach_the_picture(sd: LoadedModel) -> None:
    plain = pixels(sd.generate(PARAMS, NoCache(), ignore))
    one = pixels(sd.generate(replace(PARAMS, clip_skip=1), NoCache(), ignore))
    two = pixels(sd.generate(replace(PARAMS, clip_skip=2), NoCache(), ignore))
    assert np.array_equal(plain, one)
    assert not np.array_equal(plain, two)
    with pytest.raises(TooFewLayers, match="1 to 2"):
        sd.generate(replace(PARAMS, clip_skip=3), NoCache(), ignore)


def test_guidance_rescale_is_diffusers(sd: LoadedModel) -> None:
    drawn = sd.generate(replace(PARAMS, guidance_rescale=0.7), NoCache(), ignore)
    expected = sd.pipeline(
        "forest",
        negative_prompt="",
        num_inference_steps=PARAMS.steps,
        guidance_scale=3.0,
        guidance_rescale=0.7,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images
    assert np.array_equal(pixels(drawn), np.stack([np.asarray(image) for image in expected]))
    assert not np.array_equal(pixels(drawn), pixels(sd.generate(PARAMS, NoCache(), ignore)))
    (sentence,) = sd.generate(replace(PARAMS, guidance_rescale=0.7, guidance_scale=1.0), NoCache(), ignore).warnings
    assert "guidance_rescale has no effect" in sentence


def test_words_behind_the_window_and_weights_change_the_picture_under_a_cache_too(sd: LoadedModel) -> None:
    params = replace(PARAMS, negative_prompt="rain", steps=4)
    pictures = [
        pixels(sd.generate(replace(params, prompt=prompt), DeepCache(interval=2), ignore))
        for prompt in (LONG, LONG + " by night", LONG + " by (night:1.5)", LONG + " by (night:0.5)")
    ]
    for index, picture in enumerate(pictures):
        assert not any(np.array_equal(picture, other) for other in pictures[:index])


def test_sdxl_reads_both_encoders_and_the_pooled_text(sdxl: LoadedModel) -> None:
    params = replace(PARAMS, negative_prompt="rain")
    plain = pixels(sdxl.generate(params, NoCache(), ignore))
    clips = text.encoders(sdxl.pipeline, sdxl.model.device, None, trained=1, normed=False)
    expected = sdxl.pipeline.encode_prompt("forest", device="cpu", do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        assert torch.equal(text.states(clips, [parse("forest")])[0], expected)
    for changes in ({"prompt": LONG}, {"prompt": "(forest:1.4)"}, {"negative_prompt": LONG}):
        drawn = pixels(sdxl.generate(replace(params, **changes), NoCache(), ignore))
        assert not np.array_equal(drawn, plain), changes
    assert np.array_equal(pixels(sdxl.generate(replace(params, clip_skip=1), NoCache(), ignore)), plain)
    with pytest.raises(TooFewLayers, match="1 to 1"):  # of two layers, SDXL is trained on the last but one
        sdxl.generate(replace(params, clip_skip=2), NoCache(), ignore)


def test_unruly_prompts_are_encoded(sd: LoadedModel) -> None:
    """Special tokens spelled out, punctuation alone, a weight on nothing, one word longer than a window."""
    for prompt in (
        "<|startoftext|> (<|endoftext|>:0.5) a",
        "[!!!] ... ,,, (,:0.3)",
        "( :0.5) (\n:2)",
        "[" + "a" * 50 + "] b",
        "日本 (語:0.7) 🌊",
    ):
        (found,) = states(sd, prompt)
        assert bool(found.isfinite().all()), prompt
        assert found.shape[1] % WINDOW == 0


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("x" * 10_000, text.MOST_WINDOWS * (WINDOW - 2)),  # a token a letter
        ("a BREAK " * 1250, text.MOST_WINDOWS),
        (f"(red:1.3) {'x' * 10_000}", text.MOST_WINDOWS * (WINDOW - 2)),
        (LONG * 2, len(LONG * 2)),
    ],
)
def test_a_prompt_is_read_as_far_as_its_windows_reach(sd: LoadedModel, prompt: str, read: int) -> None:
    """However long it is, a step has so much work and no more; what is left out is said."""
    [state] = states(sd, prompt)
    assert state.shape[1] <= (text.MOST_WINDOWS + 1) * WINDOW  # compel cuts between two words, and may need one more
    [clip] = text.encoders(sd.pipeline, sd.model.device, None)
    parts = clip.read(parse(prompt))
    assert len(parts) <= text.MOST_WINDOWS
    drawn = sd.generate(replace(PARAMS, prompt=prompt, steps=1), NoCache(), ignore)
    said = [sentence for sentence in drawn.warnings if "were not read" in sentence]
    assert bool(said) is (len(prompt) > 1000)
    if said:
        assert "its last" in said[0]
        [characters] = [int(word) for word in said[0].split() if word.isdigit() and word != str(text.MOST_WINDOWS)]
        words = len(prompt.replace("BREAK", "").replace(" ", "").replace("(", "").replace(":1.3)", ""))
        assert words - characters == pytest.approx(read, abs=8)


def test_what_is_read_of_a_long_prompt_is_its_beginning(sd: LoadedModel) -> None:
    longest = "x" * (text.MOST_WINDOWS * (WINDOW - 2))
    [whole], [cut] = states(sd, longest), states(sd, longest + "y" * 500)
    assert torch.equal(whole, cut)
