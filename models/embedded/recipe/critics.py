"""What tells renderings from what a decoder makes, and so teaches it edges and shapes: used in training alone.

Each takes pictures (n, 3, h, w) in 0 … 1 and answers verdicts, (n, 1, rows, columns) each: how much a part looks like
a rendering. They learn by the loss of Lim and Ye 2017, "Geometric GAN".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fine
from models.embedded.recipe.alexnet import AlexNet
from models.embedded.recipe.training import autocast

_SHIFT = 16  # pixels by which what AlexNet sees is moved at random


class EdgeCritic(nn.Module):
    """Reads four by four pixels at once, and what each of them has beside their mean, amplified.

    Edges are all that a soft picture lacks there. Where the first four lie is drawn, so that it sees the seams between
    the decoder's own.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(6 * fine.SCALE**2, 64, 1), nn.LeakyReLU(0.2)]
        for taken, stride in ((64, 1), (width, 2), (width, 1)):
            layers += [nn.Conv2d(taken, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        pictures = _moved(pictures, fine.SCALE)
        blocks = F.pixel_unshuffle(pictures, fine.SCALE)
        means = F.avg_pool2d(pictures, fine.SCALE).repeat_interleave(fine.SCALE**2, dim=1)
        seen = torch.cat([blocks * 2 - 1, 8 * (blocks - means)], 1).to(memory_format=torch.channels_last)
        return [self.layers(seen).float()]


class ShapeCritic(nn.Module):
    """Reads AlexNet's features, which stay as they are, and gives a verdict on each of its five layers.

    Sauer et al. 2021, "Projected GANs Converge Faster": a critic that can see from its first step. The deepest layer
    has 163 pixels in view, a palm and what it stands on.
    """

    def __init__(self, alexnet: AlexNet, width: int = 64) -> None:
        super().__init__()
        self.alexnet = (alexnet,)  # in a tuple: it does not learn, and a checkpoint needs none of it
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(channels, width, 1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)),
                *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)),
                nn.Conv2d(width, 1, 3, padding=1),
            )
            for channels in alexnet.channels
        )

    def forward(self, pictures: Tensor) -> list[Tensor]:
        features = self.alexnet[0](_moved(pictures, _SHIFT) * 2 - 1)
        return [head(one).float() for head, one in zip(self.heads, features, strict=True)]


def _moved(pictures: Tensor, most: int) -> Tensor:
    """So many pixels smaller, cut at a random place."""
    top, left = torch.randint(most, (2,)).tolist()
    height, width = (side - most for side in pictures.shape[-2:])
    return pictures[..., top : top + height, left : left + width]


def learn(critic: nn.Module, optimizer: torch.optim.Optimizer, true: Tensor, made: Tensor) -> None:
    """One step of telling renderings from what was made."""
    with autocast():
        verdicts = critic(torch.cat([true, made]))
    count = len(true)
    loss = torch.stack([F.relu(1 - one[:count]).mean() + F.relu(1 + one[count:]).mean() for one in verdicts]).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def doubt(critic: nn.Module, made: Tensor) -> Tensor:
    """How little what was made looks like a rendering: a number. The critic does not learn by it."""
    critic.requires_grad_(False)
    with autocast():
        verdicts = critic(made)
    critic.requires_grad_(True)
    return -torch.stack([one.mean() for one in verdicts]).mean()
