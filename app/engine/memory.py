"""Memory of a device: is there enough for a job, in batches of which size, and what to do when there was not.

docs/decisions/memory-admission.md says why so. Importing this needs no torch.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from app.engine.types import DeviceMemory, Job, StepsListener
from cache import CacheStrategy
from models.base import Generation, GenerationParams, Step, StepHook
from models.errors import GenerationCancelled

if TYPE_CHECKING:
    from models.generation import LoadedModel

_log = logging.getLogger(__name__)
_CGROUP = Path("/sys/fs/cgroup")  # version 2, of this process's container
_Made = TypeVar("_Made")


def draw(
    model: LoadedModel,
    params: GenerationParams,
    strategy: CacheStrategy,
    on_step: StepHook,
    device: str,
    give_up_idle: Callable[[int], bool] = lambda missing: False,
) -> Generation:
    """The generation, in batches of at most as many images as asked for and as fit.

    Where not even one image fits, four things are tried in this order: `give_up_idle`, which drops a model that is not
    used if all of them take the bytes that are missing; decoding in tiles; another plan of where the model's networks
    lie, for this request alone; MemoryError, before anything is drawn. A device that runs out of memory all the same is
    freed, and the images are drawn one at a time, then with the idle models dropped, then in tiles; the last failure
    passes through, as all others do.
    """
    asked = min(params.batch_size, len(params.seeds))
    together, in_tiles = 0, False
    settled = ExitStack()

    def use_tiles() -> bool:
        nonlocal params, in_tiles
        tiled = replace(params, vae_tiling=True)
        if in_tiles or model.working_bytes(tiled, 1) >= model.working_bytes(params, 1):
            return False
        params, in_tiles = tiled, True
        return True

    def use_another_plan(free: int) -> bool:
        plan = model.tighter(params, free)
        if plan is None:
            return False
        _log.warning("settled otherwise for one request: %s", plan)
        settled.enter_context(model.settled(plan))
        return True

    def attempt() -> Generation:
        return model.generate(replace(params, batch_size=together), strategy, on_step)

    def use_less() -> bool:
        nonlocal together
        if together == 1:
            return give_up_idle(0) or use_tiles()
        together = 1
        return True

    with settled:
        while not (together := _fitting(model, params, asked, device)):
            need, free = model.working_bytes(params, 1), free_bytes(device)
            if not give_up_idle(need - free) and not use_tiles() and not use_another_plan(free):
                raise MemoryError(f"an image needs {need} bytes at least, and {free} are free on {device}")
        generation = while_exhausted(attempt, use_less, device)
    if together < asked:
        number = "one" if together == 1 else str(together)
        generation.warnings.append(
            f"{asked} images together do not fit into the device's memory: they were denoised {number} at a time."
        )
    if in_tiles:
        generation.warnings.append(
            "The whole picture's decoding does not fit into the device's memory: it was decoded in tiles, which blend."
        )
    return generation


def draw_together(
    model: LoadedModel, jobs: Sequence[Job], on_steps: StepsListener, device: str
) -> dict[str, Generation | GenerationCancelled]:
    """What came, by job, of drawing jobs of one kind in as few batches as fit into memory.

    Left out are jobs without company, and those of a batch that failed: the failure may be another one's, or there may
    be memory for one image. To be cancelled is no failure.
    """
    drawn: dict[str, Generation | GenerationCancelled] = {}
    if len(jobs) < 2:
        return drawn
    fitting = _fitting(model, jobs[0].params, sum(job.images for job in jobs), device)
    for part in _parts(jobs, fitting):
        if len(part) > 1:
            drawn |= _together(model, part, on_steps)
    if len(drawn) < len(jobs):
        release(device)
    return drawn


def _together(
    model: LoadedModel, jobs: Sequence[Job], on_steps: StepsListener
) -> dict[str, Generation | GenerationCancelled]:
    def told(steps: Mapping[int, Step]) -> None:
        on_steps({jobs[index].id: step for index, step in steps.items()})

    try:
        made = model.generate_together([job.params for job in jobs], jobs[0].strategy, told)
    except Exception as error:  # noqa: BLE001  # each job is tried by itself, and then says what is wrong with it
        made = [error] * len(jobs)
    drawn: dict[str, Generation | GenerationCancelled] = {}
    for job, one in zip(jobs, made, strict=True):
        if isinstance(one, Generation | GenerationCancelled):
            drawn[job.id] = one
        else:
            _log.warning("drawn by itself, as it failed with others: %r", one, extra={"request_id": job.id})
        if isinstance(one, Exception):
            lighten(one)
    return drawn


def lighten(error: BaseException) -> None:
    """Let go of what the frames of its traceback hold: tensors of a run that is over."""
    chained: BaseException | None = error
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__


def _parts(jobs: Sequence[Job], images: int) -> list[list[Job]]:
    """The jobs in their order, in groups of at most so many images; one that has more is by itself."""
    parts: list[list[Job]] = []
    room = 0
    for job in jobs:
        room -= job.images
        if room < 0 or not parts:
            parts.append([])
            room = images - job.images
        parts[-1].append(job)
    return parts


def _fitting(model: LoadedModel, params: GenerationParams, most: int, device: str) -> int:
    """How many images of up to `most` the free memory is enough for."""
    free = free_bytes(device)
    return next((images for images in range(most, 0, -1) if model.working_bytes(params, images) <= free), 0)


def while_exhausted(attempt: Callable[[], _Made], use_less: Callable[[], bool], device: str) -> _Made:
    """What `attempt` returns, tried again while memory runs out and `use_less` finds something to save."""
    while True:
        try:
            return attempt()
        except Exception as error:  # exhaustion is told by name, not by one class; whatever else goes on
            if not is_exhaustion(error) or not use_less():
                raise
        release(device)  # here, as the traceback, which holds tensors, is gone


def is_exhaustion(error: BaseException) -> bool:
    """Did memory run out? By name, its own or its cause's: torch need not be imported to be judged.

    Its CPU allocator raises a plain RuntimeError with the words below.
    """
    by_name = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
    if by_name or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return True
    return error.__cause__ is not None and is_exhaustion(error.__cause__)


def free_bytes(device: str) -> int:
    """What a job could still take: on a GPU also what torch has reserved and does not use.

    No more than this process may take of it, where it has been told so (`WAVESPEED_DEVICE_MEMORY`).
    """
    if not device.startswith("cuda"):
        return int(min(psutil.virtual_memory().available, _container_bytes()))
    import torch

    (free, total), allocated = torch.cuda.mem_get_info(device), torch.cuda.memory_allocated(device)
    most = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + torch.cuda.memory_reserved(device), most) - allocated


def card_bytes(device: str, gigabytes: float | None) -> int | None:
    """What a model and a request may take of a GPU, from now on no more than `gigabytes` GiB; None on the CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if gigabytes is not None and (asked := int(gigabytes * 2**30)) < free:
        torch.cuda.set_per_process_memory_fraction(asked / total, device)
        return asked
    return int(free)


def total_bytes(device: str) -> int:
    """Of the device, whether free or not."""
    if not device.startswith("cuda"):
        return int(psutil.virtual_memory().total)
    import torch

    return int(torch.cuda.mem_get_info(device)[1])


def memory_of(device: str) -> DeviceMemory:
    """As telemetry tells it; zeros on the CPU."""
    if not device.startswith("cuda"):
        return DeviceMemory()
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        total=total,
        used=total - free,
        allocated=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
        peak=torch.cuda.max_memory_allocated(device),
    )


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
