"""The recipe's parts, each against something it does not compute itself."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from models.embedded import FOLDER
from models.embedded.recipe import data, fine, flux, judges, latents, text, unet
from models.embedded.recipe.grammar import HELD_OUT, PLACES, TIMES, TRAINED, TRIPLES, WEATHERS, WORDS, Triple, caption
from models.embedded.recipe.muon import orthogonalised
from models.embedded.recipe.renderer import render


def test_held_out_triples_leave_every_word_and_nearly_every_pair_in_training() -> None:
    assert len(set(HELD_OUT)) == 15
    assert len(TRIPLES) == 150
    assert not set(HELD_OUT) & set(TRAINED)
    assert {t.weather for t in TRAINED} == set(WEATHERS)
    for first, second in (("weather", "place"), ("place", "time"), ("weather", "time")):
        seen = {(getattr(t, first), getattr(t, second)) for t in TRAINED}
        assert {(getattr(t, first), getattr(t, second)) for t in HELD_OUT} <= seen


def test_captions_use_only_words_of_the_vocabulary_and_name_all_three() -> None:
    rng = Random(0)
    for triple in TRIPLES:
        said = caption(triple, rng)
        words = set(said.replace(",", "").split())
        assert words <= WORDS
        for table, name in ((WEATHERS, triple.weather), (PLACES, triple.place), (TIMES, triple.time)):
            assert words & {name, *table[name]}


def test_the_same_seed_draws_the_same_picture_and_another_another() -> None:
    triple = Triple("misty", "forest", "twilight")
    first, again, other = render(triple, 5), render(triple, 5), render(triple, 6)
    assert first.shape == (128, 192, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("place", PLACES)
def test_a_scene_drawn_larger_is_the_same_scene(place: str) -> None:
    triple = Triple("clear", place, "noon")
    small, large = render(triple, 3).astype(float), render(triple, 3, scale=4)
    assert large.shape == (512, 768, 3)
    reduced = large.reshape(128, 4, 192, 4, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 2
    assert np.abs(reduced - render(triple, 4)).mean() > 4


def test_pairs_are_dealt_from_one_place_of_one_scene() -> None:
    """Noise, so that another place or another picture would show."""
    rng = np.random.default_rng(0)
    large = {(w, h): rng.integers(0, 256, (3, 4 * h, 4 * w, 3), dtype=np.uint8) for w, h in data.SIZES}
    reduced = {
        size: torch.nn.functional.avg_pool2d(torch.tensor(pictures).permute(0, 3, 1, 2).float(), 4).round().byte()
        for size, pictures in large.items()
    }
    pairs = fine.Pairs(large, {size: dict.fromkeys(fine.KINDS, one) for size, one in reduced.items()}, [])
    small, true = pairs.deal(rng, 8)
    assert true.shape == (8, 3, 4 * fine.CROP, 4 * fine.CROP)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(true, 4), small, atol=0.003, rtol=0)


def test_scenes_of_fine_shapes_are_shown_more_often() -> None:
    trained = Counter(triple.place for triple in TRAINED)
    whole = sum(often * fine.OFTEN.get(place, 1) for place, often in trained.items())
    shown = Counter(triple.place for triple in fine._triples(whole * 4, 0))
    for place, often in trained.items():  # a fifth of them is cut off, at random
        assert shown[place] == pytest.approx(4 * often * fine.OFTEN.get(place, 1), rel=0.2)
    assert set(fine._triples(whole, 0)) <= set(TRAINED)


@torch.no_grad()
def test_what_tiny_flux_draws_for_the_fine_decoder_is_what_it_was_asked_for() -> None:
    """In clear weather, nearly all of them: what a text in another padding is taken for is a storm."""
    triples = TRAINED[:32:4]
    pipeline = fine._pipeline("tiny-flux", FOLDER)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(triples))]
    drawn = fine._latents(pipeline, [str(one) for one in triples], seeds, (192, 128), num_inference_steps=10)
    pictures = fine._decoded(pipeline.vae, drawn).permute(0, 2, 3, 1).numpy()
    right = judges.verdicts(judges.load(), list(pictures), triples).float().mean(0)
    assert right.min() >= 0.85


def test_spoiling_leaves_what_has_no_edges() -> None:
    torch.manual_seed(0)
    flat = torch.full((6, 3, 32, 32), 0.5)
    spoilt = fine.spoilt(flat, np.random.default_rng(0))
    assert (spoilt - flat).abs().max() < 0.15  # the noise
    edge = flat.clone()
    edge[..., 16:] = 1
    soft = fine.spoilt(edge, np.random.default_rng(0)).diff(dim=-1).abs().amax((1, 2, 3))
    assert soft.min() < 0.3


def test_noon_is_brighter_than_night_everywhere() -> None:
    for weather in WEATHERS:
        for place in PLACES:
            noon, night = (render(Triple(weather, place, time), 1).mean() for time in ("noon", "night"))
            assert noon > 1.5 * night


@pytest.mark.parametrize("word", sorted(WORDS))
def test_every_word_is_one_token_for_both_tokenizers(word: str) -> None:
    assert len(text.clip_tokenizer().tokenize(word)) == 1
    if len(word) > 1:
        assert text.t5_tokenizer().tokenize(word) == [f"▁{word}"]


def test_the_noise_schedule_ends_at_one_percent_of_the_signal() -> None:
    signal = (1 - unet.betas()).cumprod(0).sqrt()
    assert signal[-1].item() == pytest.approx(0.01, rel=1e-6)
    assert signal[0].item() == pytest.approx((1 - 0.00085) ** 0.5, rel=1e-6)
    assert (signal.diff() < 0).all()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_orthogonalised_has_the_singular_vectors_of_its_argument(precision: torch.dtype) -> None:
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalised(matrix[None], precision)[0]
    assert ((left.T @ made @ right.T).diagonal() - 1).abs().max() < 0.35  # the iteration's own band, 0.7 to 1.2
    assert made.shape == matrix.shape
    torch.testing.assert_close(orthogonalised(matrix.T[None], precision)[0], made.T, atol=0.02, rtol=0)


@torch.no_grad()
def test_folding_the_statistics_in_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    coder = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).eval()
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    before = coder.encode(picture).latent_dist
    shown = coder.decode(before.mean).sample
    mean, deviation = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([2.0, 0.5, 1.0, 3.0])
    latents.normalise(coder, mean, deviation)
    after = coder.encode(picture).latent_dist
    torch.testing.assert_close(after.mean, (before.mean - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1))
    torch.testing.assert_close(after.std, before.std / deviation.view(1, -1, 1, 1))
    torch.testing.assert_close(coder.decode(after.mean).sample, shown, atol=1e-5, rtol=1e-4)


def test_flow_matching_mixes_towards_noise_and_aims_from_latents_to_noise() -> None:
    clean = torch.randn(4, 8, 4, 6, generator=torch.Generator().manual_seed(1))
    at = flux.noised(latents.Batch(clean, []), step=3)
    assert at.hidden_states.shape == (4, 6, 32)
    assert at.img_ids.shape == (6, 3)
    # x = clean + sigma (noise - clean): taking the velocity's share off again leaves the packed latents.
    back = at.hidden_states - at.timestep.view(-1, 1, 1) * at.velocity
    again = flux.noised(latents.Batch(clean, []), step=4)
    torch.testing.assert_close(back, again.hidden_states - again.timestep.view(-1, 1, 1) * again.velocity)
    assert at.timestep.min() >= 0
    assert at.timestep.max() <= 1
