"""Models of full size with random weights on a device: seconds a step, bytes, host waits, launches; a JSON line a row.

python -m benchmarks.gpu.measure sd15 flux-dev --device cuda
"""

from __future__ import annotations

import gc
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cache.peers import cache_dit, diffusers_hook, published_deepcache
from benchmarks.geometries import ALL, SMALL, Geometry, random
from cache import CacheReport, CacheStrategy, DeepCache, Denoiser, FirstBlockCache, NoCache
from models.base import GenerationParams

GEOMETRIES = {geometry.name: geometry for geometry in (*ALL, *SMALL)}
STEPS = 10
COUNTED = 4  # steps of the run whose waits and launches are counted, and of all runs of a small model
REPEATS = 2  # timed runs of one image, after a first one
PACE = 3  # calls of which one is computed
ALWAYS = 1e9  # a threshold that every residual stays below
KERNELS = ("sage", "sparge")


def ignore(_: object) -> None:
    """A step hook that wants nothing."""


def request(geometry: Geometry, steps: int, images: int = 1, **changes: Any) -> GenerationParams:
    size = {"width": geometry.width, "height": geometry.height, "guidance_scale": geometry.guidance_scale}
    usual: dict[str, Any] = {"prompt": "a cat", "sampler": "euler", "attention": "sdpa", **size}
    return GenerationParams(steps=steps, seeds=tuple(range(images)), batch_size=images, **{**usual, **changes})


@dataclass(frozen=True, slots=True)
class Setting:
    """A row. changes: of the request."""

    name: str
    make: Callable[[], CacheStrategy]
    images: int = 1
    changes: dict[str, Any] = field(default_factory=dict)


def cached(geometry: Geometry) -> CacheStrategy:
    """Ours, at the pace of the others as far as random weights let it."""
    flux = geometry.is_transformer
    return FirstBlockCache(threshold=1.0, max_consecutive=PACE - 1) if flux else DeepCache(interval=PACE)


def settings(geometry: Geometry, model: Any) -> Iterator[Setting]:
    """What is measured, the most telling first."""
    both: dict[str, Callable[[], CacheStrategy]] = {"uncached": NoCache, "ours": partial(cached, geometry)}
    yield from (Setting(name, make) for name, make in both.items())
    yield from peers(geometry, model)
    yield from (Setting(f"uncached, {kernel}", NoCache, changes={"attention": kernel}) for kernel in KERNELS)
    batches = (2,) if geometry in SMALL else (2, 4)
    yield from (Setting(name, make, images) for images in batches for name, make in both.items())


def compiled(geometry: Geometry, model: Any) -> Iterator[Setting]:
    for name, make in (("uncached", NoCache), ("ours", partial(cached, geometry))):
        yield Setting(f"{name}, compiled", make, changes={"compiled": True})


def peers(geometry: Geometry, model: Any) -> Iterator[Setting]:
    host, steps = model.pipeline, COUNTED if geometry in SMALL else STEPS
    if geometry.is_transformer:
        from diffusers import FirstBlockCacheConfig

        config = FirstBlockCacheConfig(threshold=ALWAYS)  # it knows no pace
        yield Setting("diffusers' hook", partial(diffusers_hook, host, steps, config=config))
        pace: dict[str, Any] = {"residual_diff_threshold": ALWAYS, "max_warmup_steps": 1, "Fn_compute_blocks": 1}
        pace["max_continuous_cached_steps"] = PACE - 1
        yield Setting("cache-dit", partial(cache_dit, host, steps, settings=pace))
        return
    with cached(geometry).attach(model.denoiser) as report:
        branch: Any = report.settings["branch"]
    yield Setting("DeepCache package", partial(published_deepcache, host, steps, interval=PACE, branch=branch))


@dataclass(frozen=True, slots=True)
class Within:
    """`strategy`, and `span` around its run, which is the denoising alone."""

    strategy: CacheStrategy
    span: Callable[[], AbstractContextManager[object]]
    name: ClassVar[str] = "within"

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        with self.strategy.attach(denoiser) as report, self.span():
            yield report


@dataclass
class Gauge:
    """What one device tells of a span: seconds, the most bytes that lay there; waits by line, kernels and copies."""

    device: str
    seconds: float = 0.0
    peak: int | None = None
    waits: Counter[str] | None = None
    launches: int | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def most(self) -> int | None:
        """Bytes, since the last timed span began; None where nobody counts them."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else None

    @contextmanager
    def timed(self) -> Iterator[None]:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds, self.peak = time.perf_counter() - started, self.most()

    @contextmanager
    def counted(self) -> Iterator[None]:
        warn_of_waits = torch.cuda.set_sync_debug_mode if self.on_gpu else ignore
        kind = ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU
        with warnings.catch_warnings(record=True) as said, profile(activities=[kind]) as profiler:
            warnings.simplefilter("always")
            warn_of_waits("warn")
            try:
                yield
            finally:
                warn_of_waits("default")
        if self.on_gpu:
            self.waits = waits_in(said)
            self.launches = events_on(DeviceType.CUDA, profiler)


def waits_in(said: Iterable[warnings.WarningMessage]) -> Counter[str]:
    """By line, from what torch says of each; it also says, once, that it may miss some."""
    waits = (one for one in said if str(one.message).startswith("called a synchronizing"))
    return Counter(f"{'/'.join(one.filename.split('/')[-2:])}:{one.lineno}" for one in waits)


def events_on(place: DeviceType, profiler: profile) -> int:
    return sum(event.device_type == place for event in profiler.events() or ())


def release(device: str) -> None:
    """Give back what no tensor uses."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()


def measured(model: Any, geometry: Geometry, setting: Setting, device: str) -> dict[str, Any]:
    gauge, strategy = Gauge(device), setting.make()
    steps, repeats = (COUNTED, 1) if geometry in SMALL else (STEPS, REPEATS)

    def draw(steps: int, span: Callable[[], AbstractContextManager[None]]) -> CacheReport:
        params = request(geometry, steps, setting.images, **setting.changes)
        report: CacheReport = model.generate(params, Within(strategy, span), ignore).reports[0]
        return report

    report = draw(steps, gauge.timed)
    first, seconds = gauge.seconds, []
    for _ in range(repeats if setting.images == 1 else 1):
        draw(steps, gauge.timed)
        seconds.append(gauge.seconds / steps)
    most = gauge.most()
    if setting.images == 1:
        draw(COUNTED, gauge.counted)
    return {
        "seconds_per_step": round(statistics.median(seconds), 5),
        "first_seconds": round(first, 3),
        "hit_rate": round(report.hit_rate, 3) if report.decisions else None,  # a peer's report is empty
        "peak_bytes": gauge.peak,
        "most_bytes": most,
        "waits": None if gauge.waits is None else sum(gauge.waits.values()),
        "waits_at": gauge.waits and dict(gauge.waits.most_common(5)),
        "launches": gauge.launches,
    }


def rows(geometry: Geometry, device: str, choose: Callable[[Geometry, Any], Iterator[Setting]]) -> Iterator[Any]:
    """First what is to come, then a row a setting."""
    release(device)  # the model before it
    model: Any = geometry.load(device, random(device))
    if geometry in SMALL:
        model.compile_backend = "eager"
    chosen = list(choose(geometry, model))
    weights = torch.cuda.memory_allocated() if device.startswith("cuda") else None
    yield {"model": geometry.name, "weights_bytes": weights, "planned": [[one.name, one.images] for one in chosen]}
    for setting in chosen:
        try:
            row = measured(model, geometry, setting, device)
        except Exception as error:  # noqa: BLE001  # no package, no kernel, no memory: the other rows can be had
            row = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]}
        yield {"model": geometry.name, "setting": setting.name, "images": setting.images, **row}
        release(device)


def main(
    names: list[str],
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda",
    layers: Annotated[bool, typer.Option("--compiled", help="Compiled layers alone.")] = False,
) -> None:
    """Each of NAMES is one of benchmarks.geometries."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    for name in names:
        for row in rows(GEOMETRIES[name], device, compiled if layers else settings):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(main)
