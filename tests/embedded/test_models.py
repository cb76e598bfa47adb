"""The weights in the repository: small, half precision, and they draw what they are asked for."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional

from cache import NoCache
from models import fine
from models.base import Control, Generation, GenerationParams, ModelSpec
from models.control import edges
from models.embedded import CONTROLNETS, DEFAULT, DEFAULT_FLUX, FINE_DECODER, FOLDER, SPECS
from models.embedded.recipe import judges
from models.embedded.recipe.autoencoder import gradients, to_tensor
from models.embedded.recipe.grammar import HELD_OUT, TRAINED, TRIPLES, Triple
from models.embedded.recipe.renderer import render
from models.registry import Registry

FOLDERS = [*(spec.source for spec in SPECS), *CONTROLNETS.values(), FINE_DECODER]
WEIGHTS = sorted(path for folder in FOLDERS for path in folder.rglob("*.safetensors"))


def test_the_models_together_weigh_at_most_60_megabytes() -> None:
    files = [path for folder in FOLDERS for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60_000_000


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_weights_are_half_precision(path: Path) -> None:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}


def test_the_judges_know_fresh_renderings() -> None:
    triples = TRIPLES[::2]
    fresh = [render(triple, 4_000_000 + i) for i, triple in enumerate(triples)]
    score = judges.score(judges.load(), fresh, triples)
    assert min(score.weather, score.place, score.time) >= 0.95


@torch.no_grad()
def test_the_fine_decoder_makes_the_same_picture_with_edges() -> None:
    """Of what the autoencoder keeps of renderings, against its own picture resampled."""
    triples = [TRIPLES[0], *HELD_OUT[::5]]
    pictures = np.stack([render(triple, 5_000_000 + i) for i, triple in enumerate(triples)])
    vae = AutoencoderKL.from_pretrained(SPECS[0].source / "vae", dtype=torch.float32)
    latents = vae.encode(to_tensor(pictures)).latent_dist.mean
    own = vae.decode(latents).sample
    with fine.decoding(vae, FINE_DECODER, torch.device("cpu")):
        (large,) = vae.decode(latents)
    assert large.shape == (len(triples), 3, 512, 768)
    assert (functional.avg_pool2d(large, 4) - own).abs().mean() < 4 / 127.5
    plain = functional.interpolate(own, scale_factor=4, mode="bicubic")
    sharp, soft = (sum(one.square().mean() for one in gradients(pixels.clamp(-1, 1))) for pixels in (large, plain))
    assert (sharp / soft) ** 0.5 > 2
    again = ((functional.avg_pool2d(large, 4).clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    assert judges.verdicts(judges.load(), list(again), triples).all()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_pictures_show_what_was_asked_for(spec: ModelSpec) -> None:
    """Eight triples, two of them never trained on, in few steps. The count of 300 stands in docs/embedded-models."""
    triples = [Triple("misty", "forest", "twilight"), *TRAINED[::28][:5], *HELD_OUT[::8]]
    assert len(triples) == 8
    model = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(spec.name)
    assert spec.guidance_scale is not None
    settings = {"width": 192, "height": 128, "steps": 8, "guidance_scale": spec.guidance_scale}
    requests = [GenerationParams(prompt=str(triple), seeds=(seed,), **settings) for seed, triple in enumerate(triples)]
    made = model.generate_together(requests, NoCache(), lambda steps: None)
    pictures = [np.asarray(one.images[0]) for one in made if isinstance(one, Generation)]
    right = judges.verdicts(judges.load(), pictures, triples).sum(0)
    assert right.min() >= 6, dict(zip(judges.TABLES, right.tolist(), strict=True))


def test_what_is_named_as_a_controlnet_is_one() -> None:
    """And every one that lies there is named: other single networks, as the fine decoder, lie there too."""
    classes = {path.parent: json.loads(path.read_text())["_class_name"] for path in FOLDER.glob("*/config.json")}
    assert set(CONTROLNETS.values()) == {folder for folder, name in classes.items() if name == "ControlNetModel"}


def test_edges_are_where_the_controlnet_was_shown_them() -> None:
    """A picture with it has more of them in their places, to within a pixel, than the same seed without."""
    model, triple = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get("tiny-sd"), Triple("clear", "desert", "sunset")
    shown = render(triple, 7004)
    control = Control(
        name="tiny-sd-edges",
        path=CONTROLNETS["tiny-sd-edges"],
        image=Image.fromarray(shown),
        weight=1.5,
        edges=True,
    )
    settings = {"prompt": str(triple), "width": 192, "height": 128, "steps": 8, "guidance_scale": 3.0, "seeds": (43,)}
    found = []
    for controls in ((), (control,)):
        drawn = model.generate(GenerationParams(**settings, control=controls), NoCache(), lambda step: None)
        near = cv2.dilate(edges(np.asarray(drawn.images[0])), np.ones((3, 3), np.uint8))
        found.append(float(near[edges(shown) > 0].mean()) / 255)
    assert found[1] > found[0] + 0.2
