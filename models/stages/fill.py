"""What a masked part begins from, where that is not the picture's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from cache.patching import shadowed
from cache.transfer import upload
from models.run import Run


@contextmanager
def noise_within(run: Run, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Within the context `run` begins in noise alone where its mask is, as if its picture were noise there.

    Noise of unit variance stands for the clean latents, as AUTOMATIC1111's "latent noise" does it.
    """
    scheduler, mask = run.scheduler, run.settings["mask_image"]
    name = "scale_noise" if hasattr(scheduler, "scale_noise") else "add_noise"
    add = getattr(scheduler, name)
    height, width = run.grid
    drawn = torch.from_numpy(np.array(mask.resize((width, height), Image.Resampling.NEAREST))) > 0
    begun = False

    def noised(clean: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal begun
        if not begun:  # later calls are for what lies outside of the mask
            begun = True
            noise = randn_tensor(clean.shape, list(generators), clean.device, clean.dtype)
            clean = torch.where(upload(drawn, clean.device), noise, clean)
        result: torch.Tensor = add(clean, *rest)
        return result

    with shadowed([(scheduler, name, noised)]):
        yield
