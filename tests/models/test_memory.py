"""Working memory, counted without computing: against sums made by hand and networks that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.quantizers.gguf.utils import GGUFParameter
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from models.base import GenerationParams
from models.embedded import SPECS
from models.families.sd import StableDiffusionModel
from models.generation import LoadedModel
from models.loading.footprint import loaded_bytes
from models.memory import decode_bytes, peak_bytes, unpacked_bytes


def test_the_peak_of_a_chain_is_its_two_largest_neighbours() -> None:
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 1000), nn.Linear(1000, 3))
        rows = torch.empty(7, 10)
    # While the third layer runs, its input (7 × 100) and its result (7 × 1000) live; weights and rows are not counted.
    assert peak_bytes(lambda: layers(rows)) == 7 * (100 + 1000) * 4


def test_views_hold_their_storage_and_changes_in_place_take_none() -> None:
    def call() -> None:
        whole = torch.empty(1000, device="meta")
        part = whole[:1]
        del whole
        part.add_(1)
        torch.empty(10, device="meta")

    assert peak_bytes(call) == (1000 + 10) * 4


def test_attention_keeps_no_scores() -> None:
    query = torch.empty(1, 1, 4096, 8, device="meta")

    def call() -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, query, value=query)

    assert peak_bytes(call) == 4096 * 8 * 4


@pytest.mark.parametrize(("kind", "size"), [("Q8_0", 34), ("Q4_0", 18)])
def test_a_ggufs_matrix_is_there_in_float16_and_in_bfloat16_at_once(kind: str, size: int) -> None:
    """diffusers makes the one of the file's blocks, each of 32 numbers, and then the other of that: 2 + 2 bytes."""
    blocks = torch.empty(10, 3 * size, dtype=torch.uint8, device="meta")
    assert unpacked_bytes(GGUFParameter(blocks, quant_type=GGMLQuantizationType[kind])) == 10 * 3 * 32 * 4


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2)])
def test_stable_diffusions_decoder_holds_three_maps_of_256_channels(dtype: torch.dtype, size: int) -> None:
    """At the size of the picture: a residual block's input, its normalised copy and one more (or the doubled input)."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        ).to(dtype)
    per_pixel = decode_bytes(vae, 10**6) / 10**6
    assert per_pixel == pytest.approx(3 * 256 * size, rel=0.01)
    assert decode_bytes(vae, 512 * 512) == pytest.approx(per_pixel * 512 * 512, rel=1e-6)


def test_a_decode_in_a_wider_type_takes_its_weights_along() -> None:
    """As Stable Diffusion XL's, whose autoencoder rests in half precision."""
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).half()
    weights = sum(parameter.numel() for parameter in vae.parameters())
    narrow = decode_bytes(vae, 10**6)
    assert decode_bytes(vae, 10**6, torch.float32) == pytest.approx(2 * narrow + 2 * weights, rel=1e-6)
    assert decode_bytes(vae, 10**6, torch.float16) == narrow


def test_weights_that_stay_in_the_file_are_not_counted(tmp_path: Path) -> None:
    """A training run's average, which diffusers does not load: as large as the UNet, in files of Stable Diffusion 1."""
    file = tmp_path / "model.safetensors"
    kept = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(10, 10)}
    save_file({**kept, "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(10, 10)}, file)
    assert loaded_bytes([file], 2) == 200


def test_the_bound_is_no_more_than_torch_really_takes() -> None:
    """The oracle is torch's own profiler, on the CPU, with the embedded model's decoder."""
    spec = next(spec for spec in SPECS if spec.name == "tiny-sd")
    vae = AutoencoderKL.from_pretrained(spec.source, subfolder="vae").eval()
    latents = torch.zeros(1, vae.config.latent_channels, 16, 24)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        pixels = vae.decode(latents).sample
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    counted = decode_bytes(vae, pixels.shape[-1] * pixels.shape[-2])
    assert 0.7 * peak <= counted <= peak


def test_tiles_and_slices_need_less() -> None:
    params = GenerationParams(prompt="a", width=2048, height=1024)

    def need(images: int, **options: bool) -> int:
        spec = replace(SPECS[0], render_sizes=(), **options)
        vae = AutoencoderKL.from_pretrained(spec.source, subfolder="vae")
        model = StableDiffusionModel(spec, SimpleNamespace(vae=vae), None, {})  # type: ignore[arg-type]
        return LoadedModel(model).working_bytes(params, images)

    whole, tile = need(1), AutoencoderKL.load_config(SPECS[0].source, subfolder="vae")["sample_size"]
    assert need(3) == pytest.approx(3 * whole, abs=2)
    assert need(3, vae_slicing=True) == whole
    assert need(1, vae_tiling=True) == pytest.approx(whole * tile**2 / (2048 * 1024), abs=2)
