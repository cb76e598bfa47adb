"""Memory of a device: is there enough for a job, in batches of which size, and what to do when there was not.

docs/decisions/memory-admission.md says why so. Importing this needs no torch.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import psutil

from cache import CacheStrategy
from models.base import Generation, GenerationParams, LoadedModel, StepHook

_CGROUP = Path("/sys/fs/cgroup")  # version 2, of this process's container


def draw(
    model: LoadedModel, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook, device: str
) -> tuple[Generation, int]:
    """The generation and how many images were denoised together: at most as many as asked for and as fit.

    Raises MemoryError before anything is drawn when not even one image fits. A device that runs out of memory all the
    same is freed, and the images are drawn one at a time; the second failure passes through, as all others do.
    """
    asked = min(params.batch_size, len(params.seeds))
    free = free_bytes(device)
    together = next((images for images in range(asked, 0, -1) if model.working_bytes(params, images) <= free), 0)
    if not together:
        need = model.working_bytes(params, 1)
        raise MemoryError(f"an image needs {need} bytes at least, and {free} are free on {device}")
    generation = _attempt(model, replace(params, batch_size=together), strategy, on_step)
    if generation is None:
        together = 1
        release(device)
        generation = model.generate(replace(params, batch_size=together), strategy, on_step)
    if together < asked:
        number = "one" if together == 1 else str(together)
        generation.warnings.append(
            f"{asked} images together do not fit into the device's memory: they were denoised {number} at a time."
        )
    return generation, together


def _attempt(
    model: LoadedModel, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook
) -> Generation | None:
    """None when memory ran out and fewer images at a time may do; the traceback, which holds tensors, is gone then."""
    try:
        return model.generate(params, strategy, on_step)
    except Exception as error:  # exhaustion is told by name, not by one class; whatever else goes on
        if params.batch_size == 1 or not is_exhaustion(error):
            raise
        return None


def is_exhaustion(error: BaseException) -> bool:
    """Did memory run out? By name: torch need not be imported to be judged.

    Its CPU allocator raises a plain RuntimeError with the words below.
    """
    by_name = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
    return by_name or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def free_bytes(device: str) -> int:
    """What a job could still take: on a GPU also what torch has reserved and does not use."""
    if not device.startswith("cuda"):
        return int(min(psutil.virtual_memory().available, _container_bytes()))
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def release(device: str) -> None:
    """Give back what no tensor uses."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _container_bytes(folder: Path = _CGROUP) -> float:
    """What the container's limit leaves; the file cache is given up on demand, and counts as free."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        files = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return float(limit.replace("max", "inf")) - int(used) + int(files.get("inactive_file", 0))
    except (OSError, ValueError):
        return float("inf")  # no container, or another version
