"""What a cache did in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

PERCENTILES = (5, 25, 50, 75, 95)  # of the first-block cache's residual differences


@dataclass(slots=True)
class CacheReport:
    """What a cache did in one run; filled while the run goes on.

    `decisions` has one letter for each finished denoiser call: C computed, R reused. `reuse_cost` is the share of a
    full call's floating-point operations that a reuse call needs, None where it was not counted. `cache_bytes` is the
    peak of what was kept between calls. `settings` holds what the strategy was told and what followed from it.
    `control_calls`: how often ControlNets were run. `control_operations`: of those runs, and of those of an uncached
    run, in full calls of the denoiser alone; None where there were none, or they were not counted.

    First-block cache only: `residuals` holds for each call the relative change of the first block's residual that was
    held against the threshold (the largest of the batch; None where there was nothing to compare with),
    `residual_percentiles` how they are spread, and `item_decisions`, for a batch of several, the letters of each item;
    there a call's letter is R if every item reused. `item_residuals` are each call's changes of every item, empty where
    there was nothing to compare with.
    """

    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)
    decisions: str = ""
    reuse_cost: float | None = None
    cache_bytes: int = 0
    control_calls: int = 0
    control_operations: tuple[float, float] | None = None
    warnings: list[str] = field(default_factory=list)
    residuals: list[float | None] = field(default_factory=list)
    item_decisions: list[str] = field(default_factory=list)
    item_residuals: list[tuple[float, ...]] = field(default_factory=list)
    _explain: Callable[[CacheReport], None] | None = field(default=None, repr=False, compare=False)
    _noted: int = field(default=0, repr=False, compare=False)  # warnings before it

    @property
    def computed(self) -> int:
        return self.decisions.count("C")

    @property
    def reused(self) -> int:
        return self.decisions.count("R")

    @property
    def hit_rate(self) -> float:
        """Reused calls by all calls; 0 for a run without calls."""
        return self.reused / len(self.decisions) if self.decisions else 0.0

    @property
    def predicted_speedup(self) -> float | None:
        """Operations of an uncached run by those of this one, ControlNets included, from the decisions made."""
        if self.reused == 0:
            return 1.0
        if self.reuse_cost is None or (self.control_calls and self.control_operations is None):
            return None
        made, due = self.control_operations or (0.0, 0.0)
        return (len(self.decisions) + due) / (self.computed + self.reused * self.reuse_cost + made)

    @property
    def control_share(self) -> float | None:
        """The ControlNets' part of the run's operations; None where it is not known."""
        if self.control_operations is None or (self.reused and self.reuse_cost is None):
            return None
        made = self.control_operations[0]
        return made / (self.computed + self.reused * (self.reuse_cost or 0.0) + made)

    @staticmethod
    def control_of(reports: Sequence[CacheReport]) -> tuple[float, float] | None:
        """`control_operations` of several runs together; None where one with ControlNets has none."""
        counted = [report.control_operations for report in reports if report.control_calls]
        known = [one for one in counted if one is not None]
        if not known or len(known) < len(counted):
            return None
        return sum(made for made, _ in known), sum(due for _, due in known)

    @property
    def residual_percentiles(self) -> dict[str, float]:
        """p5, p25, p50, p75 and p95 of the finite `residuals`, interpolated linearly; empty without any."""
        known = sorted(value for value in self.residuals if value is not None and math.isfinite(value))
        if not known:
            return {}

        def at(share: float) -> float:
            place = share * (len(known) - 1)
            below, beyond = known[int(place)], known[min(int(place) + 1, len(known) - 1)]
            return below + (place - int(place)) * (beyond - below)

        return {f"p{percent}": at(percent / 100) for percent in PERCENTILES}

    def record(self, computed: Sequence[bool]) -> None:
        """Note a finished call: whether it computed, or whether each of its batch items did."""
        items = ["C" if one else "R" for one in computed]
        if len(items) > 1 and not self.decisions:
            self.item_decisions = [""] * len(items)
        if len(self.item_decisions) == len(items):
            self.item_decisions = [so_far + letter for so_far, letter in zip(self.item_decisions, items, strict=True)]
        else:
            self.item_decisions = []  # the batch has changed its size: its items are other ones
        self.decisions += "C" if any(computed) else "R"

    def decisions_of(self, items: slice) -> str:
        """The letters of these batch items alone."""
        rows = self.item_decisions[items]
        return "".join("C" if "C" in call else "R" for call in zip(*rows, strict=True)) if rows else self.decisions

    def of_items(self, items: slice, batch: int) -> CacheReport:
        """The report of these items of a batch of so many, as if they had run by themselves; bytes are their share."""
        rows = self.item_decisions[items]
        changes = [each[items] for each in self.item_residuals]
        part = replace(
            self,
            settings=dict(self.settings),
            decisions=self.decisions_of(items),
            cache_bytes=round(self.cache_bytes * len(range(batch)[items]) / batch),
            warnings=self.warnings[: self._noted] if self._explain else list(self.warnings),
            residuals=[max(call) if call and all(map(math.isfinite, call)) else None for call in changes],
            item_decisions=rows if len(rows) > 1 else [],
            item_residuals=changes,
        )
        if self._explain is not None:
            self._explain(part)
        return part

    def conclude(self, explain: Callable[[CacheReport], None]) -> None:
        """Let `explain` warn of what the finished run, or later a part of its batch, shows."""
        self._explain, self._noted = explain, len(self.warnings)
        explain(self)

    def warn(self, sentence: str) -> None:
        """Add `sentence` for the user, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def as_dict(self) -> dict[str, Any]:
        """The `cache` object of an answer: JSON types only, floats rounded. The warnings travel beside it."""
        speedup = self.predicted_speedup
        report: dict[str, Any] = {
            "strategy": self.strategy,
            "computed": self.computed,
            "reused": self.reused,
            "hit_rate": round(self.hit_rate, 4),
            "decisions": self.decisions,
            **self.settings,
            "reuse_cost": None if self.reuse_cost is None else round(self.reuse_cost, 4),
            "predicted_speedup": None if speedup is None else round(speedup, 3),
            "cache_bytes": self.cache_bytes,
        }
        if self.control_calls:
            share = self.control_share
            report["control"] = {"calls": self.control_calls, "share": None if share is None else round(share, 4)}
        if self.residuals:
            report["residuals"] = [None if value is None else round(value, 5) for value in self.residuals]
        if percentiles := self.residual_percentiles:
            report["residual_percentiles"] = {name: round(value, 5) for name, value in percentiles.items()}
        if self.item_decisions:
            report["item_decisions"] = list(self.item_decisions)
        return report

    def __str__(self) -> str:
        speedup = self.predicted_speedup
        prediction = "" if speedup is None else f", predicted {speedup:.2f}×"
        return (
            f"{self.strategy}: {self.decisions or 'no calls'} "
            f"({self.computed} computed, {self.reused} reused, hit rate {self.hit_rate:.2f}{prediction})"
        )
