"""Small real stand-ins: models that each behave in one way, a registry of them, an engine without a process.

None of them needs torch, so a worker process that holds them starts in a moment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from app.engine.runner import RegistryRunner
from app.engine.types import (
    Catalogue,
    DeviceMemory,
    DeviceStatus,
    EngineStatus,
    Job,
    JobHandle,
    JobResult,
    StepListener,
    WorkerState,
)
from app.errors import NotReady, QueueFull
from cache import CacheReport, CacheStrategy, DeepCache, FirstBlockCache
from models.acceleration.attention import KERNELS, unavailable
from models.base import Generation, GenerationParams, StageReport, Step, StepHook, StepsHook, Timings
from models.errors import LoadFailed, UnknownModel
from models.text.clip import TooFewLayers
from models.tuning.profile import Profile

SAMPLERS = {"euler": ["normal", "karras"], "ddim": ["normal"]}
STEP_SECONDS = 0.02
WEIGHTS = 10_000  # bytes of each model
PLAN = {"offload": "none", "words": "All networks lie on the device."}


def decision(strategy: CacheStrategy, index: int) -> str:
    """What a uniform DeepCache would do; the first-block fake reuses every second call."""
    match strategy:
        case DeepCache(interval=interval):
            return "C" if index % interval == 0 else "R"
        case FirstBlockCache():
            return "CR"[index % 2]
        case _:
            return "C"


class FakeModel:
    """Draws a plain picture whose colour is the seed's; the subclasses misbehave in `step`."""

    denoiser: Any = None

    def step(self, index: int) -> None:
        """What happens in a denoising step."""

    def working_bytes(self, params: GenerationParams, images: int) -> int:
        return params.width * params.height * images

    def refined_by(self, refiner: FakeModel) -> AbstractContextManager[None]:
        return nullcontext()

    def tighter(self, params: GenerationParams, free: int) -> None:
        """There is but one plan."""

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        batches = [params.seeds[at : at + params.batch_size] for at in range(0, len(params.seeds), params.batch_size)]
        stages, images = [], []
        for number, seeds in enumerate(batches):
            report = CacheReport(strategy.name, reuse_cost=0.25, cache_bytes=1000 * len(seeds))
            if isinstance(strategy, DeepCache):
                report.settings = {"interval": strategy.interval, "depth": strategy.depth, "branch": 1}
            for index in range(params.steps):
                self.step(index)
                letter = decision(strategy, index)
                report.decisions += letter
                on_step(Step(number * params.steps + index, len(batches) * params.steps, letter))
            size = {"width": params.width, "height": params.height}
            stages.append(StageReport(name="base", cache=report, steps=params.steps, **size))
            images += painted(params, seeds)
        timings = Timings(text_seconds=0.1, denoise_seconds=0.2, decode_seconds=0.3)
        sizes = list(map(len, batches))
        return Generation(images=images, stages=stages, timings=timings, warnings=["The fake says so."], batches=sizes)

    def generate_together(
        self, requests: Sequence[GenerationParams], strategy: CacheStrategy, on_steps: StepsHook
    ) -> list[Generation | Exception]:
        """The steps are run once; each request gets its own pictures."""
        seeds = tuple(seed for params in requests for seed in params.seeds)
        whole = replace(requests[0], seeds=seeds, batch_size=len(seeds))
        made = self.generate(whole, strategy, lambda step: on_steps(dict.fromkeys(range(len(requests)), step)))
        results: list[Generation | Exception] = []
        start = 0
        for params in requests:
            items = slice(start, start := start + len(params.seeds))
            stages = [replace(one, cache=one.cache.of_items(items, len(seeds))) for one in made.stages]
            batches = [] if results else made.batches
            images = painted(params, params.seeds)
            results.append(replace(made, images=images, stages=stages, batches=batches))
        return results


def painted(params: GenerationParams, seeds: Sequence[int]) -> list[Image.Image]:
    size = (params.width, params.height)
    return [Image.new("RGB", size, (seed % 256, seed // 256 % 256, len(params.prompt) % 256)) for seed in seeds]


class SlowModel(FakeModel):
    def step(self, index: int) -> None:
        time.sleep(STEP_SECONDS)


class DyingModel(FakeModel):
    def step(self, index: int) -> None:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class RaisingModel(FakeModel):
    def step(self, index: int) -> None:
        raise RuntimeError("secret detail of the inside")


class HungryModel(FakeModel):
    def step(self, index: int) -> None:
        raise MemoryError("no more")


class OutOfMemoryError(RuntimeError):
    """As torch's, by name and base."""


class GreedyModel(FakeModel):
    """Has memory for two images at a time."""

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        if min(params.batch_size, len(params.seeds)) > 2:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().generate(params, strategy, on_step)


class MisfitModel(FakeModel):
    """Is asked for what it has not got, by one field of the request."""

    def step(self, index: int) -> None:
        raise TooFewLayers("This model's text encoder has 2 layers to choose from: clip_skip can be 1 to 2.")


class FrozenModel(FakeModel):
    """Hangs in native code that holds the interpreter's lock: no thread of the process runs any more."""

    def step(self, index: int) -> None:
        ctypes.PyDLL(None).sleep(3600)


class GarbageModel(FakeModel):
    """Answers with something that is no result."""

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Any:
        return "a picture, honestly"


class HangingModel(FakeModel):
    """Never reaches the end of its step, and hears nothing meanwhile."""

    def step(self, index: int) -> None:
        threading.Event().wait()


MODELS: Mapping[str, type[FakeModel]] = {
    "fine": FakeModel,
    "flux": FakeModel,
    "slow": SlowModel,
    "dies": DyingModel,
    "raises": RaisingModel,
    "hungry": HungryModel,
    "greedy": GreedyModel,
    "misfit": MisfitModel,
    "hangs": HangingModel,
    "frozen": FrozenModel,
    "garbage": GarbageModel,
}


class FakeRegistry:
    """As `models.registry.Registry` is to a runner; knows one more model, `broken`, that does not load."""

    device = "cpu"

    def __init__(self, default: str = "fine") -> None:
        self.default = default
        self.default_flux = "flux"
        self.unserved: dict[str, str] = {}
        self.on_stage: Callable[[str, str], None] = lambda name, stage: None
        self._loaded: dict[str, FakeModel] = {}

    def refresh(self) -> bool:
        return False

    def give_up_idle(self, used: Sequence[str], missing: int = 0) -> str | None:
        idle = [name for name in self._loaded if name not in used]
        if not idle or len(idle) * WEIGHTS < missing:
            return None
        del self._loaded[idle[0]]
        return idle[0]

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    @property
    def plans(self) -> dict[str, Any]:
        return dict.fromkeys(self._loaded, PLAN)

    def get(self, name: str, beside: str | None = None) -> FakeModel:
        if name == "broken":
            raise LoadFailed("The model 'broken' lacks its files. Put them back.")
        if name not in MODELS:
            raise UnknownModel(f"There is no model {name!r}.")
        if name not in self._loaded:
            self.on_stage(name, "mixing colours")
        self._loaded[name] = self._loaded.pop(name, None) or MODELS[name]()  # the one used last is last
        return self._loaded[name]

    def describe(self) -> list[dict[str, Any]]:
        return [_row(name) for name in (*MODELS, "broken")]

    def profile(self, name: str, device: str) -> Profile:
        return Profile()


def _row(name: str) -> dict[str, Any]:
    flux = name == "flux"
    return {
        "name": name,
        "family": "flux" if flux else "sd",
        "native_width": 512,
        "native_height": 512,
        "size_multiple": 16 if flux else 8,
        "render_sizes": [],
        "steps": 4 if flux else 20,
        "inpaints": False,
        "guidance_scale": 3.5 if flux else 7.5,
        "cache": "first_block" if flux else "deepcache",
        "branches": [] if flux else [{"branch": 0, "reuse_cost": 0.1}, {"branch": 1, "reuse_cost": 0.25}],
        "samplers": SAMPLERS,
        "attention": {"sdpa": None, **{kernel: unavailable(kernel, "cpu", "float32") for kernel in KERNELS}},
        "compilation": "No compiler is installed." if name == "hungry" else None,
        "error": "Its files in /a/folder are missing." if name == "broken" else None,
    }


def fake_runner(device: str, default: str = "fine") -> RegistryRunner:
    return RegistryRunner(FakeRegistry(default), "fake device")


def broken_runner(device: str) -> RegistryRunner:
    """Its default model does not load."""
    return RegistryRunner(FakeRegistry("broken"), "fake device")


def broken_flux_runner(device: str) -> RegistryRunner:
    registry = FakeRegistry()
    registry.default_flux = "broken"
    return RegistryRunner(registry, "fake device")


class FolderRegistry(FakeRegistry):
    """A model can be loaded on a device while its file is in that device's folder."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        super().__init__(default=names[0])
        self.default_flux = None
        self._folder = folder
        self._names = names

    def get(self, name: str, beside: str | None = None) -> FakeModel:
        if name not in self._loaded and not (self._folder / name).exists():
            raise LoadFailed(f"{self._folder / name} is missing")
        return super().get(name)

    def refresh(self) -> bool:
        before = self.unserved
        self.unserved = {file.stem: f"{file.name} is empty." for file in self._folder.glob("*.safetensors")}
        return self.unserved != before

    def describe(self) -> list[dict[str, Any]]:
        return [row for row in super().describe() if row["name"] in self._names]


def folder_runner(device: str, folder: Path, names: tuple[str, ...]) -> RegistryRunner:
    return RegistryRunner(FolderRegistry(folder / device, names), "fake device")


def no_runner(device: str) -> RegistryRunner:
    """A worker that cannot start: there is no such device, or no torch."""
    raise RuntimeError("no device that torch can use")


def fake_catalogue() -> Catalogue:
    return fake_runner("cpu").catalogue()


@dataclass
class FakeEngine:
    """Answers at once in the event loop; `submitted` is what got past validation."""

    capacity: int = 100
    ready: bool = True
    submitted: list[Job] = field(default_factory=list)
    models: Catalogue = field(default_factory=fake_catalogue)

    async def start(self) -> None: ...

    async def drain(self, seconds: float) -> None: ...

    async def stop(self) -> None: ...

    def catalogue(self) -> Catalogue:
        if not self.ready:
            raise NotReady("Still loading.", retry_after=5)
        return self.models

    def admit(self, model: str, *, promised: bool = False) -> None:
        if len(self.submitted) >= self.capacity:
            raise QueueFull("Full.", retry_after=5)

    def submit(self, job: Job, on_step: StepListener | None = None, *, promised: bool = False) -> JobHandle:
        self.admit(job.model, promised=promised)
        self.submitted.append(job)
        handle = JobHandle(job, on_step)
        handle.run()
        handle.succeed(self._result(job))
        return handle

    def _result(self, job: Job) -> JobResult:
        return fake_runner("cpu").run(job, lambda step: None)

    def cancel(self, job_id: str) -> bool:
        return False

    def status(self) -> EngineStatus:
        device = DeviceStatus(
            device="cpu",
            kind="cpu",
            name="none",
            state=WorkerState.READY if self.ready else WorkerState.STARTING,
            pid=None,
            restarts=0,
            memory=DeviceMemory(),
            loaded=("fine",),
            plans={"fine": PLAN},
        )
        return EngineStatus(pending=0, running=0, devices=(device,))
