"""The decoder of four times the resolution: its end written out, and where it is used in place of the autoencoder's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from cache import NoCache
from models import fine
from models.base import ModelSpec
from models.families import FAMILIES
from models.generation import LoadedModel
from tests.models.conftest import autoencoder
from tests.models.test_generation import PARAMS, ignore, pixels

CPU = torch.device("cpu")
SIZE = (96, 64)  # drawn


def written(folder: Path, vae: AutoencoderKL) -> AutoencoderKL:
    torch.manual_seed(1)
    made = fine.build(vae.config)
    vae.save_config(folder)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, folder / fine.WEIGHTS)
    return made.eval()


@torch.no_grad()
def test_the_end_adds_details_to_the_nearest_colour() -> None:
    torch.manual_seed(0)
    end, features = fine.FineEnd(4), torch.randn(1, 4, 5, 6)
    made, colours, details = end(features), end.colours(features), end.details(features)
    assert made.shape == (1, 3, 20, 24)
    for channel, y, x in ((0, 0, 0), (1, 7, 13), (2, 19, 23)):
        within = 16 * channel + 4 * (y % 4) + x % 4
        expected = colours[0, channel, y // 4, x // 4] + details[0, within, y // 4, x // 4]
        assert made[0, channel, y, x] == expected


def test_light_that_drifted_comes_back_and_edges_stay() -> None:
    small = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(4, -1).repeat_interleave(4, -2)
    drift = torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(fine.lit_as(small, large + drift), large, rtol=1e-5, atol=1e-5)
    ramp = torch.linspace(-0.2, 0.2, 224)  # slow across the picture: what is left of it is small
    assert (fine.lit_as(small, large + ramp) - large).abs().max() < 0.2 / 3


@torch.no_grad()
def test_an_autoencoder_decodes_finely_within_the_context_alone(tmp_path: Path) -> None:
    vae = autoencoder(4, None).eval()
    made = written(tmp_path, vae)
    latents = torch.randn(2, 4, 4, 6)
    own = vae.decode(latents).sample
    with fine.decoding(vae, tmp_path, CPU):
        (larger,) = vae.decode(latents, return_dict=False)
    assert larger.shape == (2, 3, 128, 192)
    for one, latent, small in zip(larger, latents, own, strict=True):
        expected = fine.lit_as(small[None], made.decode(latent[None]).sample)[0]
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    with fine.decoding(vae, None, CPU):
        assert torch.equal(vae.decode(latents).sample, own)
    assert torch.equal(vae.decode(latents).sample, own)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_more_pixels_than_were_drawn_are_decoded_finely(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Smaller ones and as many are the autoencoder's; between, what is fine is resampled, and cut to the aspect."""
    spec: ModelSpec = request.getfixturevalue(f"{family}_spec")
    plain = LoadedModel(FAMILIES[family].load(spec, "cpu"))
    made = written(tmp_path, plain.pipeline.vae)
    model = LoadedModel(FAMILIES[family].load(replace(spec, render_sizes=(SIZE,), fine_decoder=tmp_path), "cpu"))

    def drawn(source: LoadedModel, width: int, height: int) -> list[Image.Image]:
        return source.generate(replace(PARAMS, width=width, height=height), NoCache(), ignore).images

    native = drawn(plain, *SIZE)
    assert np.array_equal(pixels(drawn(model, *SIZE)), pixels(native))
    smaller = [image.resize((48, 32), Image.Resampling.LANCZOS) for image in native]
    assert np.array_equal(pixels(drawn(model, 48, 32)), pixels(smaller))

    seen: list[torch.Tensor] = []
    vae = plain.pipeline.vae
    decode = vae.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "decode", lambda latents, **rest: (seen.append(latents), decode(latents, **rest))[1])
        drawn(plain, *SIZE)
    with torch.no_grad():
        tensors = [
            fine.lit_as(decode(latent[None]).sample, made.decode(latent[None]).sample)
            for latents in seen
            for latent in latents
        ]
    images = plain.pipeline.image_processor.postprocess(torch.cat(tensors), output_type="pil")
    largest = drawn(model, 384, 256)
    assert np.abs(pixels(largest).astype(int) - pixels(images)).max() <= 1
    assert np.array_equal(
        pixels(drawn(model, 256, 256)),
        pixels([image.resize((256, 256), Image.Resampling.LANCZOS, box=(64, 0, 320, 256)) for image in largest]),
    )
    assert np.array_equal(
        pixels(drawn(model, 120, 80)),
        pixels([image.resize((120, 80), Image.Resampling.LANCZOS) for image in largest]),
    )
