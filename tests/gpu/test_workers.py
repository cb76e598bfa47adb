"""Two worker processes on one device: they draw beside each other; memory that runs out, and a death within a step."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.engine.memory import free_bytes
from app.engine.runner import RegistryRunner
from app.engine.supervisor import LocalEngine
from app.engine.types import Job, JobResult, WorkerState
from app.errors import OutOfMemory
from cache import DeepCache
from models.base import GenerationParams, ModelSpec
from models.generation import LoadedModel
from models.registry import Registry
from tests.app.test_engine import until


class Misbehaving(Registry):
    """One model under three names: `fine`, `hungry`, and `dies`, which kills its worker in its first use of all."""

    def __init__(self, device: str, folder: Path, died: Path) -> None:
        specs = [ModelSpec(name=name, family="sd", source=folder) for name in ("fine", "hungry", "dies")]
        super().__init__(specs, "fine", None, device)
        self._hooks = {"hungry": self._exhaust, "dies": self._die}
        self._died = died

    def get(self, name: str) -> LoadedModel:
        known = name in self.loaded
        model = super().get(name)
        if not known and name in self._hooks:
            model.denoiser.root.mid_block.register_forward_pre_hook(self._hooks[name])  # type: ignore[union-attr, operator]
        return model

    def _exhaust(self, *_: Any) -> None:
        half = free_bytes(self.device) // 2 if self.device != "cpu" else 2**20
        held = torch.empty(half, dtype=torch.uint8, device=self.device)
        torch.empty(2**50, dtype=torch.uint8, device=held.device)

    def _die(self, *_: Any) -> None:
        if not self._died.exists():
            self._died.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def runner(device: str, folder: Path, died: Path) -> RegistryRunner:
    torch.set_num_threads(1)
    return RegistryRunner(Misbehaving(device, folder, died), device)


@pytest.fixture(scope="module")
async def engine(
    anyio_backend: str, device: str, small_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalEngine]:
    died = tmp_path_factory.mktemp("workers") / "died"
    engine = LocalEngine(
        partial(runner, folder=small_folders["epsilon"], died=died), [device, device], stop_seconds=0.1
    )
    await engine.start()
    try:
        async with asyncio.timeout(120):
            while any(one.state is not WorkerState.READY for one in engine.status().devices):
                await asyncio.sleep(0.05)
        yield engine
    finally:
        await engine.stop()


def job(identity: str, model: str = "fine", steps: int = 4) -> Job:
    params = GenerationParams(prompt="a", width=64, height=64, steps=steps, seeds=(7,))
    return Job(id=identity, model=model, params=params, strategy=DeepCache(interval=2))


def picture(result: JobResult) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(result.images[0])))


def pids(engine: LocalEngine) -> list[int | None]:
    return [one.pid for one in engine.status().devices]


async def test_two_workers_draw_beside_each_other_what_one_draws_alone(engine: LocalEngine) -> None:
    alone = await engine.submit(job("alone")).result
    handles = [engine.submit(job(name)) for name in ("one", "other")]
    assert engine.status().running == 2
    for handle in handles:
        assert np.array_equal(picture(await handle.result), picture(alone))
    assert picture(alone).std() > 0


async def test_after_memory_ran_out_the_same_workers_draw(engine: LocalEngine) -> None:
    before = pids(engine)
    quiet = await engine.submit(job("quiet")).result
    for number in range(4):  # both workers come by
        with pytest.raises(OutOfMemory):
            await engine.submit(job(f"hungry {number}", "hungry")).result
        after = await engine.submit(job(f"after {number}")).result
        assert np.array_equal(picture(after), picture(quiet))
    assert pids(engine) == before


async def test_a_worker_killed_in_a_step_costs_no_picture(engine: LocalEngine) -> None:
    before = pids(engine)
    quiet = await engine.submit(job("quiet too")).result
    handle = engine.submit(job("killed", "dies"))
    assert np.array_equal(picture(await handle.result), picture(quiet))
    assert handle.attempts == 2
    await until(lambda: len(set(pids(engine)) & set(before)) == 1)
