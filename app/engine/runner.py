"""The models of one device, as a worker runs them and as the command line does without one.

Importing this needs no torch; `configured_runner` does.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from app import images
from app.engine.memory import (
    card_bytes,
    draw,
    draw_together,
    lighten,
    memory_of,
    total_bytes,
    while_exhausted,
)
from app.engine.pipe import Condition
from app.engine.types import (
    AnyJob,
    Branch,
    Catalogue,
    Job,
    JobResult,
    ModelInfo,
    StepListener,
    StepsListener,
    UpscaleJob,
)
from app.engine.worker import Finish, RunnerFactory
from app.errors import CannotStart
from app.infotext import text_chunks
from app.settings import Settings, default_threads
from cache import CacheReport, DeepCache, FirstBlockCache
from models import upscaling
from models.base import Generation, GenerationParams, StageReport, Step, Timings
from models.families import FAMILIES
from models.loading.checkpoints import CheckpointFolder
from models.models_file import BadModelsFile, Configuration, embedded, read
from models.tuning.profile import Profile, processor

if TYPE_CHECKING:
    from PIL import Image

    from models.generation import LoadedModel
    from models.registry import Registry

_log = logging.getLogger(__name__)
SPINS = "30000"
_PINNED = "pinned_max_round_threshold_mb:1"  # else each tensor's page-locked memory is a power of two


def share_cores() -> None:
    """Let this process's idle threads give up their cores soon. To be called before torch is imported.

    At the end of each parallel loop, thousands in a picture, GNU's OpenMP, which torch computes with on Linux, lets the
    threads that are done spin for the last one, 300 000 rounds. Where another program wants the cores the last one
    waits for them (docs/decisions/spinning-threads.md). What the operator says in OpenMP's own variables stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


class RegistryRunner:
    """A `Runner` over a model registry."""

    def __init__(self, registry: Registry, device_name: str) -> None:
        self._registry = registry
        self._device_name = device_name

    @property
    def device(self) -> str:
        """The name of what computes here, as a profile's seconds were taken on it."""
        return processor() if self._registry.device == "cpu" else self._device_name

    def catalogue(self) -> Catalogue:
        rows = {row["name"]: row for row in self._registry.describe()}
        return Catalogue(
            models={name: _info(row, self._registry.profile(name, self.device)) for name, row in rows.items()},
            default=self._registry.default,
            default_flux=self._registry.default_flux,
            unserved=self._registry.unserved,
        )

    def refresh(self) -> bool:
        return self._registry.refresh()

    def watch_loading(self, on_stage: Callable[[str, str], None]) -> None:
        self._registry.on_stage = on_stage

    def model(self, name: str) -> LoadedModel:
        return self._registry.get(name)

    def load(self, model: str, beside: str | None = None) -> None:
        used = (model,) if beside is None else (model, beside)
        loading = partial(self._registry.get, *used)
        while_exhausted(loading, partial(self._give_up_idle, used), self._registry.device)

    def warm(self, model: str) -> None:
        """A computed and a reused step, and an enlargement where there is one. Failures are left to the requests."""
        info = self.catalogue().models[model]
        strategy = DeepCache(interval=2) if info.cache == "deepcache" else FirstBlockCache()
        width, height = (side * (2 if info.render_sizes else 1) for side in info.native_size)
        params = GenerationParams(
            prompt="a", width=width, height=height, steps=2, guidance_scale=info.guidance_scale, seeds=(0,)
        )
        try:
            self.run(Job(id="warm", model=model, params=params, strategy=strategy), lambda step: None)
        except Exception as error:  # noqa: BLE001  # whatever a first picture meets, requests may ask for less
            _log.warning("the first picture of model=%s failed, and was for nobody: %r", model, error)
            lighten(error)

    def run(self, job: AnyJob, on_step: StepListener) -> JobResult:
        """One job by itself; whatever `on_step` raises passes."""
        [finish] = self.draw([job], lambda steps: on_step(steps[job.id]))
        return finish()

    def draw(self, jobs: Sequence[AnyJob], on_steps: StepsListener) -> list[Finish]:
        """See `Runner`. Jobs that could not be drawn together are drawn one after the other."""
        drawings = [job for job in jobs if isinstance(job, Job)]
        if not drawings:
            return [self._upscale(job, on_steps) for job in jobs if isinstance(job, UpscaleJob)]
        with self._lent(drawings[0]) as model:
            drawn = draw_together(model, drawings, on_steps, self._registry.device)
            return [
                partial(_finished, job, drawn[job.id] if job.id in drawn else self._alone(model, job, on_steps))
                for job in drawings
            ]

    @contextmanager
    def _lent(self, job: Job) -> Iterator[LoadedModel]:
        """The job's model, and for as long as the context lasts its refiner."""
        model, device = self._registry.get(job.model), self._registry.device
        with ExitStack() as stack:
            if job.params.refiner is not None:
                refiner = self._registry.get(job.params.refiner.model, job.model)
                give_up = partial(self._give_up_idle, job.models)
                while_exhausted(lambda: stack.enter_context(model.refined_by(refiner)), give_up, device)
            yield model

    def _upscale(self, job: UpscaleJob, on_steps: StepsListener) -> Finish:
        def on_tile(done: int, total: int) -> None:
            on_steps({job.id: Step(done - 1, total, "")})

        began, device = time.perf_counter(), self._registry.device
        attempt = partial(upscaling.enlarged, job.work, device, on_tile)
        made = while_exhausted(attempt, partial(self._give_up_idle, ()), device)
        return partial(_upscaled, job, made, time.perf_counter() - began)

    def _alone(self, model: LoadedModel, job: Job, on_steps: StepsListener) -> Generation | Exception:
        device, give_up = self._registry.device, partial(self._give_up_idle, job.models)
        try:
            return draw(model, job.params, job.strategy, lambda step: on_steps({job.id: step}), device, give_up)
        except Exception as error:  # noqa: BLE001  # it is raised again where the job is finished
            lighten(error)
            return error

    def _give_up_idle(self, used: Sequence[str], missing: int = 0) -> bool:
        name = self._registry.give_up_idle(used, missing)
        if name is not None:
            needing = used[0] if used else "an upscaler"
            _log.warning("model=%s dropped: it lay idle, and %s ran short of memory", name, needing)
        return name is not None

    def condition(self) -> Condition:
        device = self._registry.device
        return Condition(
            kind=device.split(":")[0],
            name=self._device_name,
            memory=memory_of(device),
            loaded=tuple(self._registry.loaded),
            plans=self._registry.plans,
        )


def _finished(job: Job, generation: Generation | Exception) -> JobResult:
    """Encodes the pictures."""
    if isinstance(generation, Exception):
        raise generation
    cache = summarise_stages(generation.stages) | ({} if job.chosen is None else {"chosen": dict(job.chosen)})
    params = job.params.sampled_by(generation.sampling)
    pictures = tuple(
        images.encode(image, job.output_format, text_chunks(params, seed, job.model, job.strategy.name, cache))
        for image, seed in zip(generation.images, params.seeds, strict=True)
    )
    said = [sentence for report in generation.reports for sentence in report.warnings]
    kept = [one.cache for one in generation.stages if one.kept]
    return JobResult(
        images=pictures,
        cache=cache,
        timings=generation.timings,
        batches=tuple(generation.batches),
        warnings=tuple(dict.fromkeys([*generation.warnings, *said])),
        attention=generation.attention,
        sampling=generation.sampling,
        size=generation.images[0].size if params.upscale is not None else None,
        reused_runs=len(kept),
        spared_calls=(sum(report.computed for report in kept), sum(report.reused for report in kept)),
    )


def _upscaled(job: UpscaleJob, pictures: Sequence[Image.Image], seconds: float) -> JobResult:
    """Encodes the pictures."""
    return JobResult(
        images=tuple(images.encode(picture, job.output_format) for picture in pictures),
        cache={},
        timings=Timings(text_seconds=0.0, denoise_seconds=0.0, decode_seconds=seconds),
        batches=(),
    )


def summarise(reports: Sequence[CacheReport]) -> dict[str, object]:
    """Calls are summed, the batches' decisions stand beside each other with a space between them.

    Raises ValueError for no report at all: a run always has one a batch.
    """
    if not reports:
        raise ValueError("a generation must report on its cache, once a batch")
    first = reports[0]
    whole = CacheReport(
        strategy=first.strategy,
        settings=dict(first.settings),
        decisions="".join(report.decisions for report in reports),
        reuse_cost=first.reuse_cost,
        cache_bytes=max(report.cache_bytes for report in reports),
        control_calls=sum(report.control_calls for report in reports),
        control_operations=CacheReport.control_of(reports),
        residuals=[residual for report in reports for residual in report.residuals],
        item_decisions=[letters for report in reports for letters in report.item_decisions],
    )
    summary = whole.as_dict()
    summary["decisions"] = " ".join(report.decisions for report in reports)
    return {key: _finite(value) for key, value in summary.items()}


def summarise_stages(stages: Sequence[StageReport]) -> dict[str, object]:
    """The summary of all runs; where there are others than `base`, also one a stage, by name, under `passes`.

    Raises ValueError for no run at all.
    """
    summary = summarise([one.cache for one in stages])
    if all(one.name == "base" and not one.sizes and not one.halves for one in stages):
        return summary
    summary["predicted_speedup"] = _speedup(stages)
    rows = []
    for name in dict.fromkeys(one.name for one in stages):
        runs = [one for one in stages if one.name == name]
        whole = summarise([one.cache for one in runs])
        row: dict[str, object] = {
            "name": name,
            "runs": len(runs),
            "width": runs[0].width,
            "height": runs[0].height,
            "steps": runs[0].steps,
            **{key: whole[key] for key in ("computed", "reused", "hit_rate", "decisions")},
            "predicted_speedup": _speedup(runs),
            "cache_bytes": whole["cache_bytes"],
        }
        row |= {"control": whole["control"]} if "control" in whole else {}
        if any(one.sizes for one in runs):
            row |= {"sizes": " ".join(one.sizes for one in runs), "small_share": round(runs[0].small_share, 4)}
        if any(one.halves for one in runs):
            row["halves"] = " ".join(one.halves for one in runs)
        rows.append(row)
    summary["passes"] = rows
    return summary


def _speedup(stages: Sequence[StageReport]) -> float | None:
    """Operations of these runs without a cache by those with it, a call's taken as proportional to its latents.

    Those of a call are twice as many where both halves of guidance are in it.
    """
    without = spent = 0.0
    for one in stages:
        report = one.cache
        if report.reused and report.reuse_cost is None:
            return None
        sizes = one.sizes if len(one.sizes) == len(report.decisions) else "F" * len(report.decisions)
        halves = one.halves or "B" * len(report.decisions)
        both = report.reuse_cost or 0.0
        made, due = (one.width * one.height * share for share in report.control_operations or (0.0, 0.0))
        without, spent = without + due, spent + made
        single = both * (2 if "B" in halves and report.settings.get("guidance") == "reuse" else 1)
        for decision, size, half in zip(report.decisions, sizes, halves, strict=True):
            call = one.width * one.height * (one.small_share if size == "S" else 1.0) * (1 if half == "B" else 0.5)
            without += call
            spent += call * ((both if half == "B" else single) if decision == "R" else 1.0)
    return round(without / spent, 3) if spent else 1.0


def _finite(value: object) -> object:
    """A model that overflows gives residuals that JSON has no word for: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_finite(item) for item in value] if isinstance(value, list) else value


def configured_runner(
    device: str,
    *,
    configuration: Configuration | None = None,
    checkpoints: CheckpointFolder | None = None,
    threads: int = 0,
    memory: float | None = None,
    device_memory: float | None = None,
    kept_bytes: int = 0,
) -> RegistryRunner:
    """A runner of the configured models, None: those that come with the project; and of those in `checkpoints`.

    `device` may be `auto`; 0 threads: all cores but one. `memory`: GiB for all loaded weights together, None: nine
    tenths of what the device has. `device_memory`: GiB of a GPU that this process may take, None: what is free.
    `kept_bytes`: of main memory for the finished runs of each model.
    """
    share_cores()
    if device != "cpu":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", _PINNED)
    import torch

    from models.registry import Registry

    torch.set_num_threads(threads or default_threads())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise CannotStart(f"WAVESPEED_DEVICES: torch has {torch.cuda.device_count()} CUDA devices and no {device!r}.")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    models = configuration or embedded()
    room = int(memory * 2**30) if memory is not None else total_bytes(device) * 9 // 10
    most = card_bytes(device, device_memory)
    registry = Registry(
        models.specs,
        models.default,
        models.default_flux,
        device,
        memory=room,
        device_memory=most,
        checkpoints=checkpoints,
        kept_bytes=kept_bytes,
    )
    return RegistryRunner(registry, name)


def _info(row: dict[str, Any], profile: Profile) -> ModelInfo:
    same = ("name", "family", "size_multiple", "cache", "inpaints", "steps", "guidance_scale", "error")
    return ModelInfo(
        **{name: row[name] for name in same},
        native_size=(row["native_width"], row["native_height"]),
        samplers={name: tuple(schedulers) for name, schedulers in row["samplers"].items()},
        branches=tuple(Branch(**branch) for branch in row["branches"]),
        render_sizes=tuple((width, height) for width, height in row["render_sizes"]),
        attention=row.get("attention", {}),
        compilation=row.get("compilation"),
        distilled=row.get("distilled"),
        profile=profile,
    )


def runner_arguments(settings: Settings) -> dict[str, Any]:
    """Of `configured_runner`. Raises CannotStart."""
    checkpoints = CheckpointFolder(settings.checkpoint_folder)
    checkpoints.scan()
    try:
        configuration = read(settings.models_file, checkpoints)
    except BadModelsFile as error:
        raise CannotStart(f"WAVESPEED_MODELS_FILE: {error}.") from None
    if settings.model is not None:
        served = checkpoints.models(configuration.specs)[0]
        names = [spec.name for spec in served if not FAMILIES[spec.family].needs_picture]
        if settings.model not in names:
            raise CannotStart(f"WAVESPEED_MODEL: there is no model {settings.model!r}, but {', '.join(names)}.")
        configuration = replace(configuration, default=settings.model)
    return {
        "configuration": configuration,
        "checkpoints": checkpoints,
        "threads": settings.threads,
        "memory": settings.model_memory,
        "device_memory": settings.device_memory,
        "kept_bytes": settings.resume_bytes,
    }


def runner_factory(settings: Settings) -> RunnerFactory:
    """Raises CannotStart, before anything is started."""
    return partial(configured_runner, **runner_arguments(settings))


def runner_here(settings: Settings) -> RegistryRunner:
    """In this process, on the first of the settings' devices: what the commands draw with. Raises CannotStart."""
    return configured_runner(settings.devices[0], **runner_arguments(settings))
