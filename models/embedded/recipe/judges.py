"""Three classifiers in one small network: which weather, place and time a picture shows.

Trained on fresh renderings alone, never on generated pictures, with blur and noise so that it looks at the scene and
not at the sharpness.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.embedded.recipe import data
from models.embedded.recipe.autoencoder import to_tensor
from models.embedded.recipe.grammar import PLACES, TIMES, TRIPLES, WEATHERS, Triple, labels
from models.embedded.recipe.renderer import render
from models.embedded.recipe.training import DEVICE, averaged, train

WEIGHTS = Path(__file__).parents[1] / "judges.safetensors"
TABLES = {"weather": WEATHERS, "place": PLACES, "time": TIMES}


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.body = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                    nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                )
                for a, b in pairwise(widths)
            )
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(2 * widths[-1], len(table)) for table in TABLES.values())

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """(n, 3, h, w) in −1…1 → (n, classes) logits of weather, place and time."""
        features = self.body(pictures).flatten(2)
        pooled = torch.cat([features.mean(-1), features.amax(-1)], 1)
        return [head(pooled) for head in self.heads]


def _spoil(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    if rng.random() < 0.5:
        small = F.interpolate(pictures, scale_factor=float(rng.uniform(0.5, 0.9)), mode="bilinear", antialias=True)
        pictures = F.interpolate(small, pictures.shape[-2:], mode="bilinear")
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(int(rng.integers(1 << 30))))
    return pictures + float(rng.uniform(0, 0.06)) * noise.to(pictures.device)


def run(folder: Path, steps: int, batch: int = 24) -> Judge:
    torch.manual_seed(0)
    judge = Judge().to(DEVICE)
    sources = [data.load(folder, size) for size in data.SIZES]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        pictures, triples = sources[rng.choice(len(sources), p=list(data.SIZES.values()))]
        picks = np.sort(rng.choice(len(pictures), batch, replace=False))
        logits = judge(_spoil(to_tensor(pictures[picks]), rng))
        truth = torch.tensor([labels(triples[i]) for i in picks], device=DEVICE)
        return torch.stack([F.cross_entropy(one, truth[:, i]) for i, one in enumerate(logits)]).sum()

    train("judges", folder, judge, loss_of, steps=steps, learning_rate=2e-3, ema_decay=0.99)
    fresh = [render(triple, 900_000_000 + i) for i, triple in enumerate(TRIPLES)]
    print(f"judges, on fresh renderings of all triples: {score(judge, fresh, TRIPLES)}", flush=True)
    return judge


def save(work: Path, path: Path = WEIGHTS) -> None:
    """Write the trained judge of the work folder as float16 safetensors."""
    judge = averaged("judges", work, Judge().to(DEVICE))
    save_file({name: tensor.half().cpu().contiguous() for name, tensor in judge.state_dict().items()}, path)


def load(path: Path = WEIGHTS) -> Judge:
    """The judge that comes with the models."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.to(DEVICE).eval()


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of pictures judged to show what was asked."""

    weather: float
    place: float
    time: float

    def __str__(self) -> str:
        return f"weather {self.weather:.1%}, place {self.place:.1%}, time {self.time:.1%}"


@torch.no_grad()
def verdicts(judge: Judge, pictures: list[NDArray[np.uint8]], triples: list[Triple] | tuple[Triple, ...]) -> Tensor:
    """(n, 3) booleans: does picture i, (h, w, 3) bytes, show the weather, place and time of triple i?"""
    out = []
    for picture, triple in zip(pictures, triples, strict=True):
        made = torch.stack([one.argmax(-1)[0] for one in judge(to_tensor(picture[None]))]).cpu()
        out.append(made == torch.tensor(labels(triple)))
    return torch.stack(out)


def score(judge: Judge, pictures: list[NDArray[np.uint8]], triples: list[Triple] | tuple[Triple, ...]) -> Score:
    return Score(*verdicts(judge, pictures, triples).float().mean(0).tolist())
