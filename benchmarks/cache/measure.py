"""One setting's figures: quality with every operation counted, then time without counting."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file
from skimage.metrics import structural_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from benchmarks.cache.peers import slot_of
from benchmarks.cache.settings import PLAIN, Point, Setting
from benchmarks.report import interval
from cache import CacheReport, CacheStrategy, Denoiser
from models.base import GenerationParams
from models.embedded import FOLDER
from models.embedded.recipe.autoencoder import to_tensor
from models.embedded.recipe.judges import Judge
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

Pictures = NDArray[np.uint8]  # (pictures, height, width, 3)


def ssim(reference: ArrayLike, picture: ArrayLike) -> float:
    """Mean structural similarity of the lumas of two 8-bit pictures (height, width, 3), as Wang et al. 2004 take it."""
    x, y = (np.asarray(image, float) @ (0.299, 0.587, 0.114) for image in (reference, picture))  # ITU-R BT.601
    window: Any = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(x, y, data_range=PEAK, **window))


def agreement(reference: Pictures, pictures: Pictures) -> float:
    """Share of pictures that show the same weather, place and time as their references.

    So the embedded models' own classifiers say, which saw no generated picture.
    """
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(FOLDER / "judges.safetensors").items()})
    judge.eval()
    with torch.no_grad():
        heads = [judge(to_tensor(images).cpu()) for images in (reference, pictures)]
    seen = [torch.stack([head.argmax(-1) for head in found]) for found in heads]  # (3, pictures)
    return float((seen[0] == seen[1]).all(0).float().mean())


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

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
        """Share of the calls that ran less than the whole network, from what was counted: a run's first call is whole.

        Where the items of a batch decided apart, from what our report says of each: such calls are neither.
        """
        items = [letters for report in self.reports for letters in report.item_decisions]
        if items:
            return statistics.mean(letter == "R" for letters in items for letter in letters)
        return statistics.mean(call < REUSED_BELOW * max(calls) for calls in self.runs for call in calls)

    @property
    def predicted_speedup(self) -> float | None:
        """By the reports: calls of an uncached run by calls, reused ones at their share; None if one did not count."""
        costs = [report.reuse_cost for report in self.reports if report.reuse_cost is not None]
        if self.hit_rate == 0 or not costs:
            return 1.0 if self.hit_rate == 0 else None
        return 1 / (1 - self.hit_rate * (1 - statistics.mean(costs)))

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
        operations, totals = Operations(), []  # before and after each call

        def count(*_: Any) -> None:
            totals.append(operations.total)

        hooks = [network.register_forward_pre_hook(count), network.register_forward_hook(count)]
        try:
            with operations:
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
    identical: int = 0
    agreement: float | None = None  # share of pictures judged to show what the uncached one shows
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
        names = ("speedup", "operations_speedup", "predicted_speedup", "hit_rate", "agreement")
        rounded = {name: value and round(value, 3) for name in names for value in [getattr(self, name)]}
        return {
            "denoise_seconds": round(statistics.median(self.seconds), 4),
            **rounded,
            "psnr_db": round(self.mean_psnr, 2),
            "psnr_interval": [round(bound, 2) for bound in interval(self.psnr_db)],
            "ssim": round(statistics.mean(self.ssim), 4),
            "identical": self.identical,
        }


@dataclass(slots=True)
class Bench:
    """A loaded model, the pictures to draw, and the uncached ones that everything is held against.

    batch: how many pictures are denoised together where quality is measured, unless a setting is to run alone.
    """

    model: Any  # models.pipeline.PipelineModel
    params: GenerationParams
    pairs: Sequence[tuple[str, int]]  # prompt and seed of each picture
    batch: int = 1
    references: dict[int, tuple[Pictures, Watched]] = field(default_factory=dict)

    def reference(self, batch: int) -> tuple[Pictures, Watched]:
        """The uncached pictures in batches of that size, which changes their last bits, and what ran for them."""
        if batch not in self.references:
            self.references[batch] = self._pictures(PLAIN, batch)
        return self.references[batch]

    def quality(self, setting: Setting) -> Result:
        """Draw every pair and compare."""
        batch = 1 if setting.alone else self.batch
        reference, plain = self.reference(batch)
        pictures, watched = (reference, plain) if setting == PLAIN else self._pictures(setting, batch)
        couples = list(zip(reference, pictures, strict=True))
        named = {one.name: getattr(setting, one.name) for one in fields(Point)}
        return Result(
            **(named | {"steps": setting.steps or self.params.steps}),
            psnr_db=[psnr(*couple) for couple in couples],
            ssim=[ssim(*couple) for couple in couples],
            identical=sum(np.array_equal(*couple) for couple in couples),
            agreement=agreement(reference, pictures),
            hit_rate=watched.hit_rate,
            operations=watched.operations,
            operations_speedup=plain.operations / watched.operations,
            predicted_speedup=watched.predicted_speedup if setting.ours else None,
        )

    def timing(self, result: Result, setting: Setting, repeats: int) -> None:
        """Add `repeats` runs to `result`, each with an uncached one beside it."""
        seconds, watched = self.paired(setting, PLAIN, repeats)
        result.seconds += [own for own, _ in seconds]
        result.uncached_seconds += [base for _, base in seconds]
        if setting.ours:
            result.cache_bytes = max(report.cache_bytes for report in watched.reports)

    def arguments(self) -> dict[str, Any]:
        """What the pipeline calls its denoiser with in the first picture's first step, by name."""
        seen: list[dict[str, Any]] = []
        network: torch.nn.Module = self.model.denoiser.root
        hook = network.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
        try:
            self._draw(replace(PLAIN, steps=1), self._watched(PLAIN), *self.pairs[0])
        finally:
            hook.remove()
        return seen[0]

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

    def _watched(self, setting: Setting, counting: bool = False) -> Watched:
        pipeline = self.model.pipeline
        return Watched(setting.make(pipeline, setting.steps or self.params.steps), pipeline, counting)

    def _draw(self, setting: Setting, watched: Watched, prompt: str, *seeds: int) -> list[Any]:
        given: Any = {"prompt": prompt, "seeds": seeds, "batch_size": len(seeds)}
        params = replace(self.params, steps=setting.steps or self.params.steps, **given)
        images: list[Any] = self.model.generate(params, watched, lambda step: None).images
        return images

    def _pictures(self, setting: Setting, batch: int) -> tuple[Pictures, Watched]:
        watched = self._watched(setting, counting=True)
        images: list[Any] = []
        for prompt, seeds in grouped(self.pairs, batch):
            images += self._draw(setting, watched, prompt, *seeds)
        return np.stack([np.asarray(image) for image in images]), watched


def pairs(number: int) -> list[tuple[str, int]]:
    """`number` prompts with seeds: the prompts in turn, each time with a new seed, equal prompts side by side."""
    return sorted(((PROMPTS[i % len(PROMPTS)], i) for i in range(number)), key=lambda pair: PROMPTS.index(pair[0]))


def grouped(all_pairs: Iterable[tuple[str, int]], batch: int) -> Iterator[tuple[str, list[int]]]:
    """Runs of up to `batch` seeds of one prompt."""
    for prompt, same in itertools.groupby(all_pairs, key=lambda pair: pair[0]):
        seeds = [seed for _, seed in same]
        yield from ((prompt, seeds[at : at + batch]) for at in range(0, len(seeds), batch))


def difference(ours: Result, other: Result) -> tuple[float, float, float]:
    """Mean gain of `ours` in PSNR over the same pictures, dB, with its 95 % confidence interval."""
    gains = [a - b for a, b in zip(ours.psnr_db, other.psnr_db, strict=True)]
    return (statistics.mean(gains), *interval(gains))
