"""Numbers that are not finite end a run with a sentence on the part that made them, not in a black picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cache import NoCache
from models.finite import NotFinite
from tests.models.test_generation import PARAMS as FOUR_STEPS
from tests.models.test_generation import ignore, pixels

PARAMS = replace(FOUR_STEPS, steps=2, seeds=(7,), batch_size=1)

READ = {"text_encoder": "token_embedding", "unet": "conv_out", "transformer": "proj_out", "vae": "decoder.conv_out"}


@contextmanager
def spoilt(weights: nn.Parameter, value: float) -> Iterator[None]:
    saved = weights.data.clone()
    weights.data[(0,) * weights.dim()] = value
    try:
        yield
    finally:
        weights.data.copy_(saved)


@pytest.fixture(params=["sd", "sdxl", "flux"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def parts(model: Any) -> list[tuple[str, str]]:
    """Each network and what of a run it spoils first."""
    denoiser = "unet" if hasattr(model.pipeline, "unet") else "transformer"
    return [
        ("text_encoder", "The encoded text"),
        (denoiser, "The latents of the pass base"),
        ("vae", "The decoded pixels"),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_part_with_the_weight_is_named(model: Any, value: float) -> None:
    for number, (part, result) in enumerate(parts(model)):
        params = replace(PARAMS, prompt=f"{value} {'a' * number}")  # a text of its own: encoded texts are kept
        network = getattr(model.pipeline, part)
        path, weights = next((name, one) for name, one in network.named_parameters() if READ[part] in name)
        with spoilt(weights, value), pytest.raises(NotFinite, match=f"^{result} (are|is) not finite") as failure:
            model.generate(params, NoCache(), ignore)
        assert f"the {part} holds weights that are not" in str(failure.value)
        assert path in str(failure.value)
        assert np.isfinite(pixels(model.generate(params, NoCache(), ignore).images)).all()


def test_an_overflow_is_told_from_broken_weights(sd: Any) -> None:
    weights = sd.pipeline.unet.conv_out.weight
    saved = weights.data.clone()
    weights.data.fill_(1e38)
    try:
        with pytest.raises(NotFinite, match=r"weights of unet are: they overflowed in float32"):
            sd.generate(PARAMS, NoCache(), ignore)
    finally:
        weights.data.copy_(saved)


def test_a_decoder_that_overflows_half_precision_decodes_in_full(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in answers with infinities in half precision; what is drawn is float32's picture."""
    vae = sd.pipeline.vae
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sd.model.decode(latents, 64, 64)
        decode, asked = vae.decode, []

        def overflowing(clean: torch.Tensor, **options: Any) -> Any:
            asked.append(clean.dtype)
            if clean.dtype == torch.float16:
                return (torch.full((1, 3, 64, 64), torch.inf),)
            return decode(clean, **options)

        monkeypatch.setattr(vae, "decode", overflowing)
        weights = {name: value.clone() for name, value in vae.state_dict().items()}
        vae.to(torch.float16)
        try:
            drawn = sd.model.decode(latents.half(), 64, 64)
            assert vae.dtype == torch.float16
        finally:
            vae.to(torch.float32)
            vae.load_state_dict(weights)
    assert asked == [torch.float16, torch.float32]
    difference = pixels(drawn).astype(int) - pixels(expected)
    assert np.abs(difference).max() <= 2  # weights and latents were rounded to half precision
