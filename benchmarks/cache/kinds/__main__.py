"""The defaults on small models of other kinds: over the published rule, no correction and fewer steps.

python -m benchmarks.cache.kinds                        every model; about five minutes of one processor
python -m benchmarks.cache.kinds --model v-unet         one of them
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import typer

from app.cli import bar
from benchmarks.cache.front import Axis, in_operations, matched
from benchmarks.cache.kinds.networks import KINDS, Kind, draw
from benchmarks.cache.measure import Pictures, Result, difference
from benchmarks.cache.settings import FEWER, OURS, PLAIN_REUSE
from benchmarks.report import conditions, machine, show, table
from cache import CacheReport, CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.tuning.nearness import psnr

THRESHOLDS = (0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
INTERVALS = (2, 3, 4, 5)
HELD = (0.3, 0.8)  # hit rates
ALONE = f"{OURS}, not corrected"
AGAINST: dict[str, Axis] = {
    ALONE: lambda one: one.hit_rate,
    PLAIN_REUSE: lambda one: one.hit_rate,
    FEWER: in_operations,
}
COLUMNS = f"model | sampler | setting | hit rate | PSNR dB | over {' | over '.join(AGAINST)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The default at a setting. gains: over each of AGAINST where it was as fast, mean and 95 % interval in dB."""

    model: str
    sampler: str
    setting: str
    hit_rate: float
    psnr_db: float
    gains: dict[str, tuple[float, float, float] | None]

    @property
    def below(self) -> list[str]:
        """What the default is below of by more than the interval."""
        return [name for name, gain in self.gains.items() if gain is not None and gain[2] < 0]

    def __str__(self) -> str:
        told = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain) if gain else "" for gain in self.gains.values()]
        return " | ".join(
            [self.model, self.sampler, self.setting, f"{self.hit_rate:.2f}", f"{self.psnr_db:.1f}", *told]
        )


def strategies(kind: Kind) -> dict[str, CacheStrategy]:
    """By label, the defaults of the kind's cache."""
    if kind.prediction == "flow":
        return {f"threshold {threshold:g}": FirstBlockCache(threshold=threshold) for threshold in THRESHOLDS}
    return {f"N = {number}": DeepCache(interval=number) for number in INTERVALS}


def result(method: str, label: str, steps: int, found: tuple[Pictures, CacheReport], reference: Pictures) -> Result:
    pictures, report = found
    letters = "".join(report.item_decisions or [report.decisions])
    hit_rate = letters.count("R") / len(letters)
    return Result(
        method,
        label,
        steps=steps,
        psnr_db=[psnr(*couple) for couple in zip(reference, pictures, strict=True)],
        hit_rate=hit_rate,
        operations_speedup=1 / (1 - hit_rate * (1 - (report.reuse_cost or 0.0))),
    )


def results(kind: Kind, sampler: str, pictures: int) -> Iterator[Result]:
    """Of all settings, in pictures of one batch."""
    network = kind.load()

    def drawn(strategy: CacheStrategy, steps: int, **said: Any) -> tuple[Pictures, CacheReport]:
        return draw(kind, network, strategy, pictures=pictures, steps=steps, sampler=sampler, **said)

    reference, _ = drawn(NoCache(), kind.steps)
    for steps in range(3, kind.steps, 2):
        short, report = drawn(NoCache(), steps)
        shorter = result(FEWER, f"{steps}", steps, (short, report), reference)
        yield dataclasses.replace(shorter, operations_speedup=kind.steps / steps)
    for label, strategy in strategies(kind).items():
        plain = dataclasses.replace(strategy, forecast=False)  # type: ignore[type-var]
        yield result(OURS, label, kind.steps, drawn(strategy, kind.steps), reference)
        yield result(ALONE, label, kind.steps, drawn(strategy, kind.steps, known=False), reference)
        yield result(PLAIN_REUSE, label, kind.steps, drawn(plain, kind.steps), reference)


def rows(kind: Kind, sampler: str, found: Sequence[Result]) -> Iterator[Row]:
    """A row for each of our settings whose hit rate is among those that are looked at."""
    for one in found:
        if one.method != OURS or not HELD[0] <= round(one.hit_rate, 2) <= HELD[1]:
            continue
        gains = {}
        for method, axis in AGAINST.items():
            other = matched(found, method, axis, axis(one))
            gains[method] = other and difference(one, other)
        yield Row(kind.name, sampler, one.label, one.hit_rate, float(np.mean(one.psnr_db)), gains)


def main(
    model: Annotated[list[str] | None, typer.Option(help="Name of a model; repeat for several. Default: all.")] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Seeds, each with a scene of its own.")] = 16,
) -> None:
    """Measure the defaults on each model; print a table and, last, one JSON line."""
    if unknown := [name for name in model or () if name not in KINDS]:
        raise typer.BadParameter(f"there is no {unknown[0]}: take {', '.join(KINDS)}.", param_hint="--model")
    couples = [(KINDS[name], sampler) for name in model or KINDS for sampler in KINDS[name].samplers]
    found: list[Row] = []
    with bar("measuring") as progress:
        progress.show(completed=0, total=len(couples))
        for kind, sampler in couples:
            progress.show(f"{kind.name} {sampler}")
            found += rows(kind, sampler, list(results(kind, sampler, pictures)))
            progress.advance()
    lost = [f"{row.model}, {row.sampler}, {row.setting}: below {', '.join(row.below)}" for row in found if row.below]
    show([*table(COLUMNS, map(str, found)), "", *lost, conditions(machine())])
    print(json.dumps({"benchmark": "cache, kinds", "pictures": pictures, "rows": list(map(dataclasses.asdict, found))}))


if __name__ == "__main__":
    typer.run(main)
