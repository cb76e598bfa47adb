"""The fine decoder of both models: from latents to the scene rendered four times as large, edges and points and all.

It learns from pairs of one scene at two sizes. What it will be shown are latents that a denoiser made, soft and askew:
so the small picture is decoded, or noised or drawn over by the models before that, then bent and blurred, and encoded
again. Where an edge of the large one lies cannot be told from that to the pixel, and the mean of all such edges is a
blur. Two critics ask for edges and for shapes (Goodfellow et al. 2014): they see large renderings, and what is made of
small ones and of the models' own pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from models import fine
from models.embedded.recipe import critics, data
from models.embedded.recipe.alexnet import AlexNet
from models.embedded.recipe.autoencoder import gradients, to_tensor
from models.embedded.recipe.grammar import TRAINED, Triple
from models.embedded.recipe.renderer import render
from models.embedded.recipe.training import DEVICE, autocast, averaged, train

PAIRS = 520
DRAWN = {"tiny-sd": 300, "tiny-flux": 80}
KINDS = {"clean": 3, "noised": 2, "drawn over": 1}  # of small pictures, and how often each is shown
OFTEN = {"island": 3, "forest": 2, "mountains": 2}  # places whose shapes are fine; others once
CROP = 64  # pixels of the small picture
FACTOR = 8  # pixels a latent
BATCH = 4  # pictures that are made together


def render_pairs(folder: Path) -> None:
    """Write each size's large renderings, (n, 4 h, 4 w, 3), and the same scenes small."""
    for at, (size, share) in enumerate(data.SIZES.items()):
        large, small = _path(folder, "large", size), _path(folder, "small", size)
        if small.exists():
            continue
        scenes = [(triple, (at + 7) * 10_000_000 + i) for i, triple in enumerate(_triples(int(PAIRS * share), at))]
        np.save(large, np.stack([render(*scene, *size, scale=fine.SCALE) for scene in scenes]))
        np.save(small, np.stack([render(*scene, *size) for scene in scenes]))
        print(f"rendered {len(scenes)} pairs of {size[0]}×{size[1]}", flush=True)


@torch.no_grad()
def draw(folder: Path, embedded: Path) -> None:
    """Write what the models draw from noise, a file a size, and small renderings, decoded in the ways of KINDS."""
    for name, count in DRAWN.items():
        pipeline = _pipeline(name, embedded)
        for at, (size, share) in enumerate(data.SIZES.items()):
            if (path := _path(folder, f"drawn-{name}", size)).exists():
                continue
            made = []
            for _, prompts, seeds in _batches(_triples(int(count * share), 10 + at)):
                latents = _latents(pipeline, prompts, seeds, size, num_inference_steps=20 if name == "tiny-sd" else 28)
                made.append((latents.half(), _decoded(pipeline.vae, latents)))
            torch.save([torch.cat(parts) for parts in zip(*made, strict=True)], path)
    pipeline = _pipeline("tiny-sd", embedded)
    over = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    for at, size in enumerate(data.SIZES):
        if (path := _path(folder, "inputs", size)).exists():
            continue
        small, rng = np.load(_path(folder, "small", size)), Random(at)
        kinds: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for first, prompts, seeds in _batches(_triples(len(small), at)):
            pictures = to_tensor(small[first : first + len(prompts)])
            clean, strength = pipeline.vae.encode(pictures).latent_dist.mean, rng.uniform(0.15, 0.55)
            options = {"image": pictures / 2 + 0.5, "strength": strength, "num_inference_steps": round(4.5 / strength)}
            ways = {
                "clean": clean,
                "noised": _noised(clean, 0.3),
                "drawn over": _latents(over, prompts, seeds, None, **options),
            }
            for kind, latents in ways.items():
                kinds[kind].append(_decoded(pipeline.vae, latents))
        torch.save({kind: torch.cat(parts) for kind, parts in kinds.items()}, path)


def _triples(count: int, seed: int) -> list[Triple]:
    scenes = [triple for triple in TRAINED for _ in range(OFTEN.get(triple.place, 1))]
    triples = scenes * (count // len(scenes) + 1)
    Random(seed).shuffle(triples)
    return triples[:count]


def _batches(triples: list[Triple]) -> Iterator[tuple[int, list[str], list[torch.Generator]]]:
    """The place of the first, prompts and seeds."""
    for first in range(0, len(triples), BATCH):
        prompts = [str(triple) for triple in triples[first : first + BATCH]]
        yield first, prompts, [torch.Generator().manual_seed(500_000 + first + i) for i in range(len(prompts))]


def _pipeline(name: str, embedded: Path) -> Any:
    kind = StableDiffusionPipeline if name == "tiny-sd" else FluxPipeline
    pipeline = kind.from_pretrained(embedded / name, dtype=torch.float32).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    if name == "tiny-sd":
        pipeline.unet.register_to_config(sample_size=24)  # the img2img pipeline compares it with a number
    return pipeline


def _latents(
    pipeline: Any, prompts: list[str], seeds: list[torch.Generator], size: tuple[int, int] | None, **options: Any
) -> Tensor:
    """(n, 8, h / 8, w / 8) as the autoencoder has them. size: (width, height), None over a picture."""
    if size is not None:
        options |= {"width": size[0], "height": size[1]}
    if isinstance(pipeline, FluxPipeline):  # as in training: it reads padding too, and the pipeline's own is 512
        options |= {"max_sequence_length": pipeline.tokenizer_2.model_max_length}
    latents: Tensor = pipeline(prompts, generator=seeds, guidance_scale=3.0, output_type="latent", **options).images
    if size is not None and isinstance(pipeline, FluxPipeline):
        latents = pipeline._unpack_latents(latents, size[1], size[0], pipeline.vae_scale_factor)
    return latents


def _decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """(n, 3, h, w) bytes."""
    return ((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()


def _noised(latents: Tensor, most: float) -> Tensor:
    """With up to so much of each channel's deviation added."""
    amount = most * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    return latents + amount * latents.std((0, 2, 3), keepdim=True) * torch.randn_like(latents)


def spoilt(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """(n, 3, h, w) in 0…1: bent a little, blurred, noised, each by its own measure."""
    count, _, height, width = pictures.shape
    knots = int(rng.choice([4, 6, 10]))  # pixels from one bend to the next
    amount = 0.8 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.4)
    bends = torch.randn(count, 2, height // knots + 2, width // knots + 2)
    bends = amount * F.interpolate(bends, (height, width), mode="bicubic", align_corners=True)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = (torch.stack([columns, rows]) + bends).permute(0, 2, 3, 1) / torch.tensor([width, height]) * 2 - 1
    bent = F.grid_sample(pictures, places.to(pictures), mode="bilinear", padding_mode="border", align_corners=False)
    blurred = torch.cat([_blurred(one, rng) if rng.random() < 0.65 else one for one in bent.unsqueeze(1)])
    noise = 0.02 * torch.rand(count, 1, 1, 1, device=blurred.device) * torch.randn_like(blurred)
    return (blurred + noise).clamp(0, 1)


def _blurred(picture: Tensor, rng: np.random.Generator) -> Tensor:
    down, across = rng.uniform(0.4, 2.2, 2) if rng.random() < 0.5 else [rng.uniform(0.4, 2.2)] * 2  # σ, pixels
    for sigma, shape in ((down, (1, 1, -1, 1)), (across, (1, 1, 1, -1))):
        weights = torch.exp(-(torch.arange(-6, 7, device=picture.device) ** 2) / (2 * sigma**2)).view(shape)
        padding = (0, 0, 6, 6) if shape[2] == -1 else (6, 6, 0, 0)
        picture = F.conv2d(F.pad(picture.transpose(0, 1), padding, mode="replicate"), weights / weights.sum())
        picture = picture.transpose(0, 1)
    return picture


@dataclass(slots=True)
class Pairs:
    """What is shown: crops of one size of small pictures, and the same crops large."""

    large: dict[tuple[int, int], np.ndarray]
    small: dict[tuple[int, int], dict[str, Tensor]]
    drawn: list[dict[tuple[int, int], list[Tensor]]]

    @classmethod
    def of(cls, folder: Path) -> Pairs:
        return cls(
            {size: np.load(_path(folder, "large", size), mmap_mode="r") for size in data.SIZES},
            {size: torch.load(_path(folder, "inputs", size), weights_only=True) for size in data.SIZES},
            [
                {size: torch.load(_path(folder, f"drawn-{name}", size), weights_only=True) for size in data.SIZES}
                for name in DRAWN
            ],
        )

    def deal(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """(count, 3, CROP, CROP) and (count, 3, 4 CROP, 4 CROP), both in 0…1, half of them mirrored."""
        pairs = []
        for _ in range(count):
            size = _size(rng)
            pictures = self.small[size][str(rng.choice([kind for kind, often in KINDS.items() for _ in range(often)]))]
            index, scale = int(rng.integers(len(pictures))), fine.SCALE
            top, left = _place(pictures[index], 1, rng)
            small = pictures[index, :, top : top + CROP, left : left + CROP].float() / 255
            rows, columns = (slice(scale * at, scale * (at + CROP)) for at in (top, left))
            large = torch.tensor(self.large[size][index, rows, columns]).permute(2, 0, 1).float() / 255
            pairs.append((small.flip(-1), large.flip(-1)) if rng.random() < 0.5 else (small, large))
        return _stacked(pairs)

    def deal_drawn(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Latents that a model drew, (count, 8, CROP / 8, CROP / 8), and what they were decoded to, in 0…1."""
        pairs = []
        for _ in range(count):
            latents, pictures = self.drawn[rng.integers(len(self.drawn))][_size(rng)]
            index, side = int(rng.integers(len(latents))), CROP // FACTOR
            top, left = _place(pictures[index], FACTOR, rng)
            rows, columns = top // FACTOR, left // FACTOR
            there = latents[index, :, rows : rows + side, columns : columns + side].float()
            pairs.append((there, pictures[index, :, top : top + CROP, left : left + CROP].float() / 255))
        return _stacked(pairs)


def _size(rng: np.random.Generator) -> tuple[int, int]:
    sizes = list(data.SIZES)
    return sizes[rng.choice(len(sizes), p=list(data.SIZES.values()))]


def _place(picture: Tensor, step: int, rng: np.random.Generator) -> tuple[int, int]:
    """The top and the left, multiples of `step`, of the crop that has most in it of three."""

    def edges(place: tuple[int, int]) -> float:
        crop = picture[:, place[0] : place[0] + CROP, place[1] : place[1] + CROP].float()
        return sum(float(one.abs().mean()) for one in gradients(crop))

    height, width = picture.shape[1:]
    downs, rights = (step * rng.integers((side - CROP) // step + 1, size=3) for side in (height, width))
    return max(zip(downs.tolist(), rights.tolist(), strict=True), key=edges)


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = (torch.stack(list(one)).to(DEVICE) for one in zip(*pairs, strict=True))
    return first.to(memory_format=torch.channels_last), second.to(memory_format=torch.channels_last)


def build(embedded: Path) -> tuple[AutoencoderKL, AutoencoderKL]:
    """The models' autoencoder, and the fine decoder that begins with its weights."""
    vae = AutoencoderKL.from_pretrained(embedded / "tiny-sd" / "vae", dtype=torch.float32)
    made = fine.build(vae.config)
    known = {name.replace("conv_out.", "conv_out.colours."): value for name, value in vae.state_dict().items()}
    made.load_state_dict({name: value for name, value in known.items() if name in made.state_dict()}, strict=False)
    with torch.no_grad():
        made.decoder.conv_out.details[-1].weight.mul_(0.1)
        made.decoder.conv_out.details[-1].bias.zero_()
    return tuple(one.to(DEVICE, memory_format=torch.channels_last) for one in (vae, made))


def likeness_loss(made: Tensor, true: Tensor) -> Tensor:
    """L1, of the pixels and of the image gradients."""
    return F.l1_loss(made, true) + sum(F.l1_loss(a, b) for a, b in zip(gradients(made), gradients(true), strict=True))


def run(folder: Path, embedded: Path, seeing: AlexNet, alike_steps: int, critic_steps: int) -> None:
    """Likeness alone first, then with the critics, one of which reads what `seeing` sees. All in 0…1."""
    torch.manual_seed(0)
    vae, model = build(embedded)
    pairs = Pairs.of(folder)

    def shown(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        small, large = pairs.deal(rng, count)
        with torch.no_grad(), autocast():
            latents = vae.encode(spoilt(small, rng) * 2 - 1).latent_dist.mean
        return _noised(latents.float(), 0.12), large

    def made_of(latents: Tensor) -> Tensor:
        with autocast():
            pixels = model.decode(latents).sample
        return pixels.float() / 2 + 0.5

    def alike(step: int) -> Tensor:
        latents, large = shown(np.random.default_rng([3, step]), 6)
        return likeness_loss(made_of(latents), large)

    train("fine-alike", folder, model, alike, steps=alike_steps, learning_rate=3e-3, ema_decay=0.995)
    criticised = Criticised(pairs, shown, made_of, seeing)
    train(
        "fine",
        folder,
        model,
        criticised,
        steps=critic_steps,
        learning_rate=2e-3,
        ema_decay=0.997,
        beside=criticised.learning,
    )


class Criticised:
    """The loss with critics, which learn one step beside each of it.

    What is made of a drawn picture has no truth beside it: four small pixels' mean is kept. How much a critic weighs
    beside the rest is its share of the gradient at the pixels (Esser et al. 2021, "Taming transformers": at the last
    layer).
    """

    def __init__(
        self,
        pairs: Pairs,
        shown: Callable[[np.random.Generator, int], tuple[Tensor, Tensor]],
        made_of: Callable[[Tensor], Tensor],
        seeing: AlexNet,
    ) -> None:
        self.pairs, self.shown, self.made_of, self.seeing = pairs, shown, made_of, seeing
        edges, shapes = critics.EdgeCritic().to(DEVICE), critics.ShapeCritic(seeing).to(DEVICE)
        of_edges = torch.optim.AdamW(edges.parameters(), lr=1e-3, betas=(0.5, 0.99), weight_decay=0)
        of_shapes = torch.optim.AdamW(shapes.parameters(), lr=5e-4, betas=(0.0, 0.99), weight_decay=0)
        self.critics: list[tuple[nn.Module, torch.optim.Optimizer, float]] = [  # and the shares
            (edges, of_edges, 0.5),
            (shapes, of_shapes, 1.0),
        ]
        self.learning = {"edges": edges, "edges' optimizer": of_edges, "shapes": shapes, "shapes' optimizer": of_shapes}

    def __call__(self, step: int) -> Tensor:
        rng = np.random.default_rng([4, step])
        latents, large = self.shown(rng, 3)
        more, drawn = self.pairs.deal_drawn(rng, 2)
        made = self.made_of(torch.cat([latents, more]))
        alike, free = made[: len(large)], made[len(large) :]
        near = F.l1_loss(F.avg_pool2d(alike, fine.SCALE), F.avg_pool2d(large, fine.SCALE))
        kept = F.l1_loss(F.avg_pool2d(free, 4 * fine.SCALE), F.avg_pool2d(drawn, 4))
        with autocast():
            seen = self.seeing.distance(alike * 2 - 1, large * 2 - 1).mean()
        total = loss = 0.5 * likeness_loss(alike, large) + near + kept + seen
        (by_loss,) = torch.autograd.grad(loss, made, retain_graph=True)
        for critic, optimizer, share in self.critics:
            critics.learn(critic, optimizer, large, made.detach())
            doubt = critics.doubt(critic, made)
            (by_doubt,) = torch.autograd.grad(doubt, made, retain_graph=True)
            total = total + share * min(float(by_loss.norm() / (by_doubt.norm() + 1e-9)), 2.0) * doubt
        return total


def save(folder: Path, embedded: Path) -> None:
    """Write the averaged weights as float16 safetensors, and the configuration beside them."""
    vae, model = build(embedded)
    model = averaged("fine", folder, model)
    target = embedded / "fine-decoder"
    vae.save_config(target)
    tensors = {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, target / fine.WEIGHTS)


def _path(folder: Path, name: str, size: tuple[int, int]) -> Path:
    suffix = "npy" if name in ("large", "small") else "pt"
    return folder / f"fine-{name}-{size[0]}x{size[1]}.{suffix}"
