"""The models of one device, as a worker runs them and as the command line does without one.

Importing this needs no torch; `configured_runner` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import psutil

from app import images
from app.engine.memory import draw, draw_together, lighten
from app.engine.pipe import Condition
from app.engine.report import summarise_passes
from app.engine.types import (
    Branch,
    Catalogue,
    DeviceMemory,
    Job,
    JobResult,
    ModelInfo,
    StepListener,
    StepsListener,
)
from app.engine.worker import Finish, RunnerFactory
from app.errors import CannotStart
from app.settings import Settings, available_cores
from models.base import Generation, LoadedModel
from models.models_file import BadModelsFile, Configuration, embedded, read

SPINS = "30000"


def share_cores() -> None:
    """Let this process's idle threads give up their cores soon. To be called before torch is imported.

    At the end of each parallel loop, thousands in a picture, GNU's OpenMP, which torch computes with on Linux, lets the
    threads that are done spin for the last one, 300 000 rounds. Where another program wants the cores the last one
    waits for them (docs/decisions/spinning-threads.md). What the operator says in OpenMP's own variables stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


class Models(Protocol):
    """What of `models.registry.Registry` a runner needs."""

    default: str
    default_flux: str | None
    device: str
    on_stage: Callable[[str, str], None]

    @property
    def loaded(self) -> Sequence[str]: ...

    def get(self, name: str) -> LoadedModel: ...

    def describe(self) -> list[dict[str, Any]]: ...


class RegistryRunner:
    """A `Runner` over a model registry."""

    def __init__(self, registry: Models, device_name: str) -> None:
        self._registry = registry
        self._device_name = device_name

    def catalogue(self) -> Catalogue:
        return Catalogue(
            models={row["name"]: _info(row) for row in self._registry.describe()},
            default=self._registry.default,
            default_flux=self._registry.default_flux,
        )

    def watch_loading(self, on_stage: Callable[[str, str], None]) -> None:
        self._registry.on_stage = on_stage

    def model(self, name: str) -> LoadedModel:
        return self._registry.get(name)

    def load(self, model: str) -> None:
        self._registry.get(model)

    def run(self, job: Job, on_step: StepListener) -> JobResult:
        """One job by itself; whatever `on_step` raises passes."""
        [finish] = self.draw([job], lambda steps: on_step(steps[job.id]))
        return finish()

    def draw(self, jobs: Sequence[Job], on_steps: StepsListener) -> list[Finish]:
        """See `Runner`. Jobs that could not be drawn together are drawn one after the other."""
        model = self._registry.get(jobs[0].model)
        device = self._registry.device
        drawn = draw_together(model, jobs, on_steps, device)
        return [
            partial(_finished, job, drawn[job.id] if job.id in drawn else _alone(model, job, on_steps, device))
            for job in jobs
        ]

    def condition(self) -> Condition:
        device = self._registry.device
        return Condition(
            kind=device.split(":")[0],
            name=self._device_name,
            memory=_memory(device),
            loaded=tuple(self._registry.loaded),
        )


def _alone(model: LoadedModel, job: Job, on_steps: StepsListener, device: str) -> Generation | Exception:
    try:
        return draw(model, job.params, job.strategy, lambda step: on_steps({job.id: step}), device)
    except Exception as error:  # noqa: BLE001  # it is raised again where the job is finished
        lighten(error)
        return error


def _finished(job: Job, generation: Generation | Exception) -> JobResult:
    """Encodes the pictures."""
    if isinstance(generation, Exception):
        raise generation
    cache = summarise_passes(generation.passes)
    pictures = tuple(
        images.encode(image, job.output_format, images.metadata(job, seed, cache))
        for image, seed in zip(generation.images, job.params.seeds, strict=True)
    )
    said = [sentence for report in generation.reports for sentence in report.warnings]
    return JobResult(
        images=pictures,
        cache=cache,
        timings=generation.timings,
        batches=tuple(generation.batches),
        warnings=tuple(dict.fromkeys([*generation.warnings, *said])),
        attention=generation.attention,
    )


def configured_runner(
    device: str, *, configuration: Configuration | None = None, threads: int = 0, memory: float | None = None
) -> RegistryRunner:
    """A runner of the configured models, None: those that come with the project.

    `device` may be `auto`; 0 threads: the cores available. `memory`: GiB for all loaded weights together, None: nine
    tenths of what the device has.
    """
    share_cores()
    import torch

    from models.registry import Registry

    torch.set_num_threads(threads or available_cores())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise CannotStart(f"WAVESPEED_DEVICES: torch has {torch.cuda.device_count()} CUDA devices and no {device!r}.")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    models = configuration or embedded()
    room = int(memory * 2**30) if memory is not None else _total_bytes(device) * 9 // 10
    return RegistryRunner(Registry(models.specs, models.default, models.default_flux, device, memory=room), name)


def _total_bytes(device: str) -> int:
    if not device.startswith("cuda"):
        return int(psutil.virtual_memory().total)
    import torch

    return int(torch.cuda.mem_get_info(device)[1])


def _info(row: dict[str, Any]) -> ModelInfo:
    return ModelInfo(
        name=row["name"],
        family=row["family"],
        native_size=(row["native_width"], row["native_height"]),
        size_multiple=row["size_multiple"],
        cache=row["cache"],
        steps=row["steps"],
        guidance_scale=row["guidance_scale"],
        samplers={name: tuple(schedulers) for name, schedulers in row["samplers"].items()},
        branches=tuple(Branch(**branch) for branch in row["branches"]),
        render_sizes=tuple((width, height) for width, height in row["render_sizes"]),
        attention=row.get("attention", {}),
        compilation=row.get("compilation"),
        error=row["error"],
    )


def _memory(device: str) -> DeviceMemory:
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


def runner_arguments(settings: Settings) -> dict[str, Any]:
    """Of `configured_runner`. Raises CannotStart."""
    try:
        configuration = read(settings.models_file)
    except BadModelsFile as error:
        raise CannotStart(f"WAVESPEED_MODELS_FILE: {error}.") from None
    if settings.model is not None:
        names = [spec.name for spec in configuration.specs]
        if settings.model not in names:
            raise CannotStart(f"WAVESPEED_MODEL: there is no model {settings.model!r}, but {', '.join(names)}.")
        configuration = replace(configuration, default=settings.model)
    return {"configuration": configuration, "threads": settings.threads, "memory": settings.model_memory}


def runner_factory(settings: Settings) -> RunnerFactory:
    """Raises CannotStart, before anything is started."""
    return partial(configured_runner, **runner_arguments(settings))


def runner_here(settings: Settings) -> RegistryRunner:
    """In this process, on the first of the settings' devices: what the commands draw with. Raises CannotStart."""
    return configured_runner(settings.devices[0], **runner_arguments(settings))
