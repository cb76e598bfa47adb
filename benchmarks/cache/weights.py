"""What pictures lose by small weights, told apart from what they lose by the cache: tiny-flux in each kind of file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.cache.measure import Bench, interval
from benchmarks.cache.settings import OURS, PLAIN, Setting, ours
from cache import FirstBlockCache
from models.registry import Registry
from models.tuning.nearness import psnr
from tests.models.loading.quantising import TINY_WIDTH, embedded_flux, narrow_flux

COLUMNS = "weights | setting | hit rate | PSNR dB to whole weights | 95 % | to the same weights | 95 %"
THRESHOLD = 0.1
SETTINGS = (PLAIN, Setting(OURS, f"{THRESHOLD}", ours(FirstBlockCache(threshold=THRESHOLD))))


@dataclass(frozen=True, slots=True)
class Row:
    """A setting on weights of a kind. Mean PSNR in dB with its 95 % interval: `loss` to the uncached pictures of whole
    weights, `cache_loss` to those of the same weights; None where a picture would be held against itself.
    """

    weights: str
    setting: str
    hit_rate: float
    loss: tuple[float, float, float] | None
    cache_loss: tuple[float, float, float] | None

    def __str__(self) -> str:
        def told(found: tuple[float, float, float] | None) -> str:
            return "{:.1f} | {:.1f}–{:.1f}".format(*found) if found else " | "

        return f"{self.weights} | {self.setting} | {self.hit_rate:.2f} | {told(self.loss)} | {told(self.cache_loss)}"


@contextmanager
def small_flux(device: str) -> Iterator[Registry]:
    """tiny-flux by what its transformer lies in, whole weights first; the files are gone afterwards."""
    with TemporaryDirectory() as folder, narrow_flux(TINY_WIDTH):
        specs = [replace(spec, name=kind) for kind, spec in embedded_flux(Path(folder)).items()]
        yield Registry(specs, specs[0].name, specs[0].name, device)


def rows(registry: Registry, bench_of: Callable[[str], Bench]) -> Iterator[Row]:
    """Two of each kind: uncached, and with the cache."""
    whole = None
    for kind in registry.names:
        bench = bench_of(kind)
        own, _ = bench.reference
        whole = own if whole is None else whole
        for setting in SETTINGS:
            pictures, watched = bench.reference if setting == PLAIN else bench.pictures(setting)
            losses = [
                None if pictures is against else [psnr(*couple) for couple in zip(against, pictures, strict=True)]
                for against in (whole, own)
            ]
            loss, cache_loss = (found and (statistics.mean(found), *interval(found)) for found in losses)
            yield Row(kind, setting.name, watched.hit_rate, loss, cache_loss)
