"""One setting's figures: quality with every operation counted, then time without counting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap
from skimage.metrics import structural_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from app.cli import bar
from benchmarks.cache import perceptual
from benchmarks.cache.peers import slot_of
from benchmarks.cache.settings import PLAIN, Point, Setting
from cache import CacheReport, CacheStrategy, Denoiser
from models.base import GenerationParams
from models.embedded.recipe import alexnet
from models.registry import Registry
from models.tuning.nearness import PEAK, psnr

PROMPTS = (
    "a misty forest at twilight",
    "a clear sea at noon",
    "snowy mountains at dawn",
    "a stormy island at sunset",
    "a starry desert at night",
    "misty hills at dawn",
    "a snowy forest at night",
    "clear mountains at sunset",
)
REUSED_BELOW = 0.995  # of the run's costliest call, in operations
BLOCK = 4  # settings between two uncached runs

Pictures = NDArray[np.uint8]  # (pictures, height, width, 3)


def ssim(reference: ArrayLike, picture: ArrayLike) -> float:
    """Mean structural similarity of the lumas of two 8-bit pictures (height, width, 3), as Wang et al. 2004 take it."""
    x, y = (np.asarray(image, float) @ (0.299, 0.587, 0.114) for image in (reference, picture))  # ITU-R BT.601
    window: Any = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(x, y, data_range=PEAK, **window))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean of two or more: percentile bootstrap with a fixed seed.

    Given the differences of two settings on the same pictures, it is that of their mean difference.
    """
    found = bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention that run inside it.

    As torch's FlopCounterMode, which follows the modules, too, and so makes a run three times as long.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # not in torch's own list
            self.total += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif (formula := flop_registry.get(packet)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass(slots=True)
class Watched:
    """`strategy`, seen from outside of it, in the same way for ours and for a peer.

    Attaching is not part of `seconds`: enabling a cache is done once by a peer's user. With `counting`, the operations
    of each denoiser call are counted, which slows the run.
    """

    strategy: CacheStrategy
    host: Any
    counting: bool = False
    seconds: float = 0.0  # of the last run
    runs: list[list[int]] = field(default_factory=list)  # operations of each denoiser call of each counted run
    reports: list[CacheReport] = field(default_factory=list)  # of each run; a peer's is empty

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.strategy.name

    @property
    def operations(self) -> int:
        return sum(map(sum, self.runs))

    @property
    def hit_rate(self) -> float:
        """Share of the calls that ran less than the whole network, from what was counted; a run's first is whole."""
        return statistics.mean(call < REUSED_BELOW * max(calls) for calls in self.runs for call in calls)

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        with self.strategy.attach(denoiser) as report, self._counted() if self.counting else nullcontext():
            self.reports.append(report)
            started = now()
            yield report
            self.seconds = now() - started

    @contextmanager
    def _counted(self) -> Iterator[None]:
        network: torch.nn.Module = getattr(self.host, slot_of(self.host))  # the twin, where a peer runs
        counter, totals = Operations(), []  # before and after each call

        def count(*_: Any) -> None:
            totals.append(counter.total)

        hooks = [network.register_forward_pre_hook(count), network.register_forward_hook(count)]
        try:
            with counter:
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self.runs.append([after - before for before, after in zip(totals[::2], totals[1::2], strict=True)])


def now() -> float:
    """Seconds, once the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Result(Point):
    """What was measured of one setting; lists have one entry a picture, in the same order for every setting."""

    _: KW_ONLY
    psnr_db: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)  # empty where its weights are not installed
    identical: int = 0
    hit_rate: float = 0.0  # share of the denoiser's calls that ran less than the whole network
    operations: int = 0  # of the denoiser, all pictures together
    operations_speedup: float = 1.0
    predicted_speedup: float | None = None  # by the cache's own report
    cache_bytes: int | None = None  # most that ours kept for one picture
    seconds: list[float] = field(default_factory=list)  # of one picture's denoising, unbatched
    uncached_seconds: list[float] = field(default_factory=list)  # of the run beside it

    @property
    def acts(self) -> bool:
        """Whether any work was spared: a threshold may be too low for that, and then time differs by noise alone."""
        return self.operations_speedup > 1

    @property
    def speedup(self) -> float:
        """Median over the pairs of uncached by own seconds."""
        return statistics.median(b / a for a, b in zip(self.seconds, self.uncached_seconds, strict=True))

    @property
    def mean_psnr(self) -> float:
        return statistics.mean(self.psnr_db)

    def row(self) -> dict[str, Any]:
        """The summary, ready for JSON."""
        names = ("speedup", "operations_speedup", "predicted_speedup", "hit_rate", "identical")
        return {
            **{name: getattr(self, name) for name in names},
            "denoise_seconds": statistics.median(self.seconds),
            "psnr_db": self.mean_psnr,
            "psnr_interval": interval(self.psnr_db),
            "ssim": statistics.mean(self.ssim),
            "lpips": statistics.mean(self.lpips) if self.lpips else None,
        }


@dataclass
class Bench:
    """A loaded model, the pictures to draw, and the uncached ones that everything is held against."""

    model: Any  # models.pipeline.PipelineModel
    params: GenerationParams
    pairs: Sequence[tuple[str, int]]  # prompt and seed of each picture

    @cached_property
    def reference(self) -> tuple[Pictures, Watched]:
        """The uncached pictures, and what ran for them."""
        return self.pictures(PLAIN)

    @cached_property
    def lpips(self) -> perceptual.Distance | None:
        file = alexnet.installed()
        return None if file is None else perceptual.lpips(file)

    def quality(self, setting: Setting) -> Result:
        """Draw every pair and compare."""
        reference, plain = self.reference
        pictures, watched = (reference, plain) if setting == PLAIN else self.pictures(setting)
        couples = list(zip(reference, pictures, strict=True))
        predicted = [report.predicted_speedup for report in watched.reports if report.predicted_speedup]
        return Result(
            **({one.name: getattr(setting, one.name) for one in fields(Point)} | {"steps": self._steps(setting)}),
            psnr_db=[psnr(*couple) for couple in couples],
            ssim=[ssim(*couple) for couple in couples],
            lpips=[self.lpips(*couple) for couple in couples] if self.lpips else [],
            identical=sum(np.array_equal(*couple) for couple in couples),
            hit_rate=watched.hit_rate,
            operations=watched.operations,
            operations_speedup=plain.operations / watched.operations,
            predicted_speedup=statistics.harmonic_mean(predicted) if setting.ours and predicted else None,
        )

    def timed(self, result: Result, setting: Setting, repeats: int) -> Result:
        """`result` with the seconds of so many runs, each beside an uncached one."""
        seconds, watched = self.paired(setting, PLAIN, repeats)
        own, uncached = map(list, zip(*seconds, strict=True))
        kept = max(report.cache_bytes for report in watched.reports) if setting.ours else None
        return replace(result, seconds=own, uncached_seconds=uncached, cache_bytes=kept)

    def paired(self, one: Setting, other: Setting, repeats: int) -> tuple[list[tuple[float, float]], Watched]:
        """Seconds of one picture's denoising under each of two settings, and the first one's watch.

        They run in alternating order, after a warm-up.
        """
        couple = [(setting, self._watched(setting)) for setting in (one, other)]
        for setting, watched in couple:
            self._draw(setting, watched, *self.pairs[0])
        seconds = []
        for number in range(repeats):
            picture = self.pairs[number * len(self.pairs) // repeats]
            for setting, watched in couple if number % 2 else reversed(couple):
                self._draw(setting, watched, *picture)
            seconds.append((couple[0][1].seconds, couple[1][1].seconds))
        return seconds, couple[0][1]

    def raced(self, settings: Sequence[Setting], rounds: int) -> Iterator[list[tuple[float, float]]]:
        """Seconds of one picture's denoising under each setting, and uncached beside it, round after round.

        All run in turn, each round with another picture. An uncached run stands before and behind each `BLOCK` of them,
        and their mean beside each of the block: cheaper than `paired`, where there are many.
        """
        every = [self._watched(setting) for setting in (PLAIN, *settings)]

        def seconds(number: int, picture: tuple[str, int]) -> float:
            self._draw((PLAIN, *settings)[number], every[number], *picture)
            return every[number].seconds

        seconds(0, self.pairs[0])  # warms up
        for number in range(rounds):
            picture = self.pairs[number % len(self.pairs)]
            found, before = [], seconds(0, picture)
            for first in range(1, len(every), BLOCK):
                own = [seconds(one, picture) for one in range(first, min(first + BLOCK, len(every)))]
                behind = seconds(0, picture)
                found += [(one, (before + behind) / 2) for one in own]
                before = behind
            yield found

    def _steps(self, setting: Setting) -> int:
        return setting.steps or self.params.steps

    def _watched(self, setting: Setting, counting: bool = False) -> Watched:
        pipeline = self.model.pipeline
        return Watched(setting.make(pipeline, self._steps(setting)), pipeline, counting)

    def _draw(self, setting: Setting, watched: Watched, prompt: str, seed: int) -> Any:
        params = replace(self.params, prompt=prompt, seeds=(seed,), steps=self._steps(setting))
        (image,) = self.model.generate(params, watched, lambda step: None).images
        return image

    def pictures(self, setting: Setting) -> tuple[Pictures, Watched]:
        """Of all pairs, and what ran for them."""
        watched = self._watched(setting, counting=True)
        return np.stack([np.asarray(self._draw(setting, watched, *pair)) for pair in self.pairs]), watched


def bench_of(
    registry: Registry, name: str, pictures: int, steps: int | None, size: tuple[int, int] | None = None
) -> Bench:
    """size: width and height, pixels; None for the model's own."""
    spec, family = registry.spec(name), registry.family(name)
    own = spec.render_sizes[0] if spec.render_sizes else (family.native_size, family.native_size)
    width, height = size or own
    guidance = family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale
    given: Any = {"width": width, "height": height, "guidance_scale": guidance}
    params = GenerationParams(prompt="", steps=steps or spec.steps or family.steps, **given)
    return Bench(registry.get(name), params, pairs(pictures))


def measured(bench: Bench, settings: Sequence[Setting], repeats: int) -> list[Result]:
    """Quality and, of so many runs, time of each, with a progress bar."""
    results = []
    with bar("measuring") as progress:
        progress.show(completed=0, total=len(settings))
        for setting in settings:
            progress.show(setting.name)
            results.append(bench.timed(bench.quality(setting), setting, repeats))
            progress.advance()
    return results


def pairs(number: int) -> list[tuple[str, int]]:
    """`number` prompts with seeds: the prompts in turn, each time with a new seed."""
    return [(PROMPTS[seed % len(PROMPTS)], seed) for seed in range(number)]


def difference(ours: Result, other: Result) -> tuple[float, float, float]:
    """Mean gain of `ours` in PSNR over the same pictures, dB, with its 95 % confidence interval."""
    gains = [a - b for a, b in zip(ours.psnr_db, other.psnr_db, strict=True)]
    return (statistics.mean(gains), *interval(gains))
