"""Full-size models through the server's own code on the simulated device: every kind of request ends in a picture.

What is asserted is what the device tells: that nothing lies on the wrong side, that reports say what acted, and where
weights are. Few steps are run, since they are all alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks.geometries import ALL, FLUX_DEV, FLUX_SCHNELL, SD15, SD21, SDXL, Geometry
from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models import faces
from models.base import Generation, GenerationParams, Img2Img, Inpaint, Lora, Multiscale, Step
from models.generation import LoadedModel
from tests.accelerator.conftest import Load
from tests.accelerator.device import NAME, Accelerator

BIG = pytest.mark.parametrize("geometry", [SD15, SDXL, FLUX_DEV], ids=lambda one: one.name)


def params(geometry: Geometry, **changes: Any) -> GenerationParams:
    settings = {"steps": 2, "prompt": "a cat", "width": geometry.width, "height": geometry.height}
    return GenerationParams(**{**settings, "guidance_scale": geometry.guidance_scale, **changes})


def cache(geometry: Geometry) -> CacheStrategy:
    if geometry.is_transformer:
        return FirstBlockCache(max_consecutive=1)
    return DeepCache(interval=2, schedule="uniform")


def draw(model: LoadedModel, request: GenerationParams, strategy: CacheStrategy | None = None) -> Generation:
    return model.generate(request, strategy or NoCache(), lambda step: None)


@pytest.mark.parametrize("geometry", ALL, ids=lambda one: one.name)
def test_each_model_draws_with_its_cache(load: Load, geometry: Geometry) -> None:
    made = draw(load(geometry), params(geometry, sampler="euler", steps=4), cache(geometry))
    (report,) = made.reports
    assert made.images[0].size == (geometry.width, geometry.height)
    assert report.decisions == {"deepcache": "CRCR", "first_block": "CRCC"}[report.strategy]  # a last call computes
    assert report.settings["correction"] is True
    assert report.cache_bytes > 0


@BIG
def test_from_a_picture(load: Load, geometry: Geometry) -> None:
    request = params(geometry, steps=4, img2img=Img2Img(picture=Image.new("RGB", (300, 200)), denoise=0.5))
    for sampler in ("euler", "heun") if geometry is FLUX_DEV else ("euler", "ddim", "dpmpp_2m", "lcm"):
        made = draw(load(geometry), replace(request, sampler=sampler), cache(geometry))
        assert [one.name for one in made.stages] == ["img2img"]


@BIG
def test_within_a_mask(load: Load, geometry: Geometry) -> None:
    mask = Image.new("L", (300, 200))
    mask.paste(255, (100, 50, 200, 150))
    for fill in ("original", "noise"):
        over = Img2Img(picture=Image.new("RGB", (300, 200)), inpaint=Inpaint(mask=mask, fill=fill))  # type: ignore[arg-type]
        made = draw(load(geometry), params(geometry, steps=4, img2img=over))
        assert [one.name for one in made.stages] == ["inpaint"]


@pytest.mark.parametrize("geometry", [SD15, FLUX_SCHNELL], ids=lambda one: one.name)
def test_small_first_then_large(load: Load, geometry: Geometry) -> None:
    side = 2 * (512 if geometry is SD15 else 1024)
    made = draw(load(geometry), params(geometry, width=side, height=side, hires_fix=True), cache(geometry))
    assert [(one.name, one.width) for one in made.stages] == [("base", side // 2), ("hires_fix", side)]


@BIG
def test_steps_at_two_sizes(load: Load, geometry: Geometry) -> None:
    settings = Multiscale(fullres_start=1, fullres_end=1, intermittent=False)
    made = draw(load(geometry), params(geometry, steps=4, multiscale=settings), cache(geometry))
    assert made.stages[0].sizes.strip("F") in ("SS", "SSS")  # PNDM calls twice in its first step


def test_faces_are_drawn_anew(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "finder", lambda detector: lambda image: [faces.Box(100, 100, 80, 80)])
    made = draw(load(SDXL), params(SDXL, steps=5, adetailer=True), cache(SDXL))
    assert [one.name for one in made.stages] == ["base", "adetailer"]


@BIG
def test_previews(load: Load, geometry: Geometry) -> None:
    steps: list[Step] = []
    load(geometry).generate(params(geometry, sampler="euler", preview=True), cache(geometry), steps.append)
    assert all(step.preview for step in steps)


def test_long_and_weighted_prompts(load: Load) -> None:
    words = "(cat:1.3), " + "a b c d e f, " * 30
    for geometry in (SD15, SDXL):
        made = draw(load(geometry), params(geometry, prompt=words, negative_prompt="dog"))
        assert made.images
    assert draw(load(SD21), params(SD21, prompt="a cat", clip_skip=2)).images


def lora(folder: Path, network: nn.Module, prefix: str) -> Lora:
    """Rank 4 beside the queries of the first attention layers."""
    tensors = {}
    queries = [name for name, module in network.named_modules() if name.endswith(("attn1.to_q", "attn.to_q"))]
    for name in queries[:3]:
        rows, columns = network.get_submodule(name).weight.shape  # type: ignore[union-attr, misc]
        tensors[f"{prefix}.{name}.lora_A.weight"] = torch.zeros(4, columns)
        tensors[f"{prefix}.{name}.lora_B.weight"] = torch.zeros(rows, 4)
    save_file(tensors, folder / "style.safetensors")
    return Lora(name="style", path=folder / "style.safetensors", weight=0.5)


@pytest.mark.parametrize("offload", [None, "model", "sequential"])
def test_a_lora_lies_where_its_layers_do(load: Load, tmp_path: Path, offload: str | None) -> None:
    model = load(SD15, offload=offload)
    style = lora(tmp_path, model.denoiser.root, "unet")
    before = {name: parameter.device for name, parameter in model.denoiser.root.named_parameters()}
    assert draw(model, params(SD15, loras=(style,))).images
    after = {name: parameter.device for name, parameter in model.denoiser.root.named_parameters()}
    assert {name: place.type for name, place in after.items()} == {name: place.type for name, place in before.items()}


def test_a_lora_of_flux(load: Load, tmp_path: Path) -> None:
    model = load(FLUX_DEV)
    style = lora(tmp_path, model.denoiser.root, "transformer")
    assert draw(model, params(FLUX_DEV, loras=(style,))).images


def test_items_of_a_batch_decide_apart(load: Load, device: Accelerator) -> None:
    """The second item is told that its first block has moved, the first one that it has not."""

    def script(shape: torch.Size) -> torch.Tensor:
        told = torch.full(shape, 0.01)
        if shape:  # what is asked of all at once, such as whether it is finite, is a single number
            told[..., 1::2] = 0.5
        return told

    device.script = script
    request = params(FLUX_SCHNELL, steps=3, seeds=(1, 2), batch_size=2)
    for forecast in (True, False):
        (report,) = draw(load(FLUX_SCHNELL), request, FirstBlockCache(forecast=forecast)).reports
        assert report.item_decisions == ["CRC" if forecast else "CRR", "CCC"]


@pytest.mark.parametrize(
    ("geometry", "offload"),
    [(SDXL, "model"), (FLUX_DEV, "model"), (SD15, "sequential"), (FLUX_DEV, "sequential")],
    ids=lambda one: getattr(one, "name", one),
)
def test_offloaded_with_previews(load: Load, geometry: Geometry, offload: str) -> None:
    model = load(geometry, offload=offload)
    steps: list[Step] = []
    request = params(geometry, steps=3, sampler="euler", preview=True)  # the last call computes
    made = model.generate(request, cache(geometry), steps.append)
    assert made.images
    assert all(step.preview for step in steps)
    assert "R" in made.reports[0].decisions
    places = {parameter.device.type for parameter in model.denoiser.root.parameters()}
    assert places == ({"cpu"} if offload == "model" else {"meta"})


@pytest.mark.parametrize("offload", [None, "model", "sequential"])
def test_a_distilled_decoder_lies_where_the_latents_do(load: Load, tmp_path: Path, offload: str | None) -> None:
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    generator: Any = load(SD15, offload=offload)
    model = generator.model
    spec, known = model.spec, model.__dict__.pop("preview_decoder", None)
    model.spec = replace(spec, source=tmp_path)
    try:
        steps: list[Step] = []
        generator.generate(params(SD15, preview=True), NoCache(), steps.append)
        assert all(step.preview for step in steps)
    finally:
        model.spec = spec
        vars(model).pop("preview_decoder", None)
        if known is not None:
            model.preview_decoder = known


def test_requests_of_several_callers_in_one_batch(load: Load) -> None:
    requests = [params(SD15, prompt=prompt, seeds=(seed,)) for seed, prompt in enumerate(["a", "b"])]
    made = load(SD15).generate_together(requests, DeepCache(), lambda steps: None)
    assert [len(one.images) for one in made if isinstance(one, Generation)] == [1, 1]


@BIG
def test_weights_are_where_the_server_puts_them(load: Load, geometry: Geometry) -> None:
    for part in load(geometry).pipeline.components.values():  # type: ignore[attr-defined]
        if isinstance(part, nn.Module):
            assert {parameter.device.type for parameter in part.parameters()} == {NAME}
