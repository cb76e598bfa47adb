"""DeepCache: most of a UNet's deep features are reused between denoising steps (Ma et al. 2023, arXiv:2312.00858).

A compute call is the whole UNet and keeps one tensor, the hidden state that enters the outermost up-path layers at one
skip branch. A reuse call runs only what lies outside of that branch, on a forecast of that state. Without a forecast,
branch b is bit-equal to the published helper's `cache_branch_id=b`; the helper keeps every layer's output, this keeps
the one that is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from . import forecast as forecasts
from . import guidance as guidances
from . import schedule as schedules
from .schedule import WHOLE_SCHEDULE, Placement, Uniform, Window
from .strategy import CacheReport, IncompatibleDenoiser

if TYPE_CHECKING:
    from torch import Tensor

    from .denoiser import Denoiser, UNetDenoiser
    from .patching import Call

DEEPEST = 12  # of `depth`


@dataclass(frozen=True, slots=True)
class DeepCache:
    """Compute one call in `interval`; run the others outside of a branch that `depth` chooses.

    interval: 1 or more; ⌈calls / interval⌉ calls of a run compute, at 1 all of them.
    depth: 0 to 12, higher is cheaper: a reuse call costs at most 1 / (depth + 2) of a full one, counted at the UNet's
        native size (`cost.deepest_branch`). Where no branch is that cheap, the prediction itself is kept.
    start, end: reuse is allowed at 1000 - timestep within them: 0 is pure noise, 1000 finished. Reading the timestep
        synchronises with a GPU once a call; with 0 and 1000 it is not read.
    forecast: what a reuse call takes for the kept tensor: `none` its last value, `linear` and `quadratic` a polynomial
        through its last two or three, `damped` a line whose slope is trusted as far as the last one held
        (`cache/forecast.py`); each order costs a multiply-add and a kept tensor.
    schedule: where the compute calls lie. `uniform`: every `interval`-th. `auto`: as many, where the denoiser's view
        places them, if it knows the run and no window is set; else uniform. A tuple: those very calls, the first being
        0, whatever the interval.
    guidance: `full` runs both halves of a guided batch in reuse calls. `reuse` runs the half with text alone, at half
        the cost, and takes the other from the guidance difference, which is kept and forecast (`cache/guidance.py`).
        It needs a view that knows guided calls; where it cannot act, the report says `full`.
    correction: whether a computed call also repays what the reused ones before it got wrong (`cache/correction.py`),
        for a sampler that the view knows; None: with any forecast but `none`.
    """

    name: ClassVar[str] = "deepcache"

    interval: int = 3
    depth: int = 2
    start: int = 0
    end: int = WHOLE_SCHEDULE
    forecast: forecasts.Forecast = "damped"
    schedule: schedules.Schedule = "auto"
    guidance: guidances.Guidance = "full"
    correction: bool | None = None

    def __post_init__(self) -> None:
        for setting, least, most in (
            ("interval", 1, None),
            ("depth", 0, DEEPEST),
            ("start", 0, WHOLE_SCHEDULE),
            ("end", 0, WHOLE_SCHEDULE),
        ):
            value = getattr(self, setting)
            if type(value) is not int or value < least or (most is not None and value > most):
                bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
                raise ValueError(f"{setting} must be a whole number {bounds}, not {value!r}.")
        if self.start > self.end:
            raise ValueError(f"start ({self.start}) must not lie behind end ({self.end}): exchange them.")
        if self.forecast == "probe":
            raise ValueError(
                "forecast probe asks a transformer's first block, and DeepCache has none: use damped, or another of "
                f"{', '.join(forecasts.WITHOUT_WITNESS)}."
            )
        forecasts.check(self.forecast, forecasts.WITHOUT_WITNESS)
        schedules.check(self.schedule)
        guidances.check(self.guidance)

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """One run of `denoiser`, which must be a UNet's view. Raises IncompatibleDenoiser and AlreadyAttached."""
        from .correction import Correction, wanted
        from .cost import deepest_branch  # torch, where it is needed
        from .denoiser import UNetDenoiser

        if not isinstance(denoiser, UNetDenoiser):
            raise IncompatibleDenoiser(
                f"DeepCache needs a UNet, and {type(denoiser.root).__name__} is none: use FirstBlockCache for it."
            )
        run = _Run(self, denoiser, deepest_branch(denoiser.branch_costs, self.depth))
        correction = Correction(denoiser, run.report)
        corrects = wanted(self.correction, self.forecast) and self.interval > 1
        handle = correction.around(run.handle) if corrects else run.handle
        with denoiser.intercepted(handle), run.watching():
            try:
                yield run.report
                correction.explain(self.correction is True)
                run.explain()
            finally:
                run.passes.clear()


_Slot = tuple[str | None, tuple[Any, ...]]  # a pass by name, and the signature of its calls


@dataclass(slots=True)
class _Pass:
    """What is carried between the calls of one pass (conditional, unconditional, or both at once) at one size.

    A run that leaves a size and comes back to it, as multi-scale does, goes on from that size's history.
    """

    rows: int | None  # of a guided batch whose reuse calls run the second half alone; None for any other
    history: forecasts.History  # of the branch's state (batch, channels, height, width), or of the prediction
    difference: forecasts.History  # of the guided predictions, with text less without; empty for any other batch
    form: type = tuple  # of the network's answers
    computed: int = -1  # the last call that computed, counted in this pass and size from 0
    now: int = -1  # the last call

    @property
    def bytes(self) -> int:
        return self.history.bytes + self.difference.bytes


class _Run:
    """The state of one run."""

    def __init__(self, strategy: DeepCache, denoiser: UNetDenoiser, branch: int | None) -> None:
        self.denoiser = denoiser
        self.branch = branch
        self.strategy = strategy
        self.schedule: Uniform | Placement | None = None  # known from the first call on
        self.window = Window(strategy.start, strategy.end)
        self.passes: dict[_Slot, _Pass] = {}
        self.latest: dict[str | None, _Slot] = {}  # of the last call of each pass
        self.calls: Counter[str | None] = Counter()  # of each pass, at all sizes: the time that forecasts go by
        self.captured: Tensor | None = None
        self.outside = 0  # calls that the window excluded
        self.branch_pass = None if branch is None else denoiser.branch_pass(branch)
        self.copies = denoiser.modifies_in_place
        self.report = CacheReport(
            strategy.name,
            settings={**dataclasses.asdict(strategy), "correction": False, "placement": None, "branch": branch},
            reuse_cost=0.0 if branch is None else denoiser.branch_costs[branch],
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, `captured` is set by the layer whose output enters the branch's pass."""
        if self.branch is None or self.strategy.interval == 1:
            yield
            return

        def capture(module: object, inputs: object, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            self.captured = state.detach().clone() if self.copies else state.detach()

        handle = self.denoiser.source(self.branch).register_forward_hook(capture)
        try:
            yield
        finally:
            handle.remove()

    def scheduled(self, first: Call) -> Uniform | Placement:
        """Where the compute calls lie in the run that begins with `first`: its length is known by then if ever."""
        strategy, settings = self.strategy, self.report.settings
        if isinstance(strategy.schedule, tuple):
            return Placement(strategy.schedule, math.inf, "given")
        if strategy.schedule == "auto":
            if not self.window.is_whole:
                settings["placement"] = "uniform: a window is set"
            elif (placement := self.denoiser.placement(first, strategy.interval, self.branch)) is None:
                settings["placement"] = "uniform: the length of the run is not known"
            else:
                settings["placement"] = placement.source
                return placement
        settings["schedule"] = "uniform"
        return Uniform(strategy.interval)

    def handle(self, call: Call) -> Any:
        self.schedule = self.schedule or self.scheduled(call)
        slot = (call.pass_name, call.signature)
        try:
            entry = self.reusable(call, slot, self.schedule)
            output = self.compute(call, slot) if entry is None else self.reuse(call, entry)
        except BaseException:  # also a cancel: whatever stopped the call, what it leaves is not to be reused
            self.passes.clear()
            raise
        finally:
            self.captured = None
            self.latest[call.pass_name] = slot
            self.calls[call.pass_name] += 1
        self.report.record("C" if entry is None else "R")
        return output

    def reusable(self, call: Call, slot: _Slot, schedule: Uniform | Placement) -> _Pass | None:
        """What the call may reuse; None if it has to compute."""
        if self.strategy.interval == 1:
            return None
        if not self.window.is_whole:
            timestep = self.denoiser.timestep_of(call)
            if not self.window.contains(timestep, self.denoiser.num_train_timesteps):
                self.outside += 1
                return None
        if (argument := self.denoiser.injected(call)) is not None:
            self.report.warn(f"Calls with {argument} (ControlNet, T2I-Adapter) were computed fully.")
            return None
        entry = self.passes.get(slot)
        if entry is None or self.latest.get(call.pass_name) != slot:
            return None
        return entry if schedule.reuses(entry.now + 1, entry.computed) else None

    def compute(self, call: Call, slot: _Slot) -> Any:
        entry, time = self.continued(call, slot), self.calls[call.pass_name]
        output = call.run()
        if self.strategy.interval == 1 or self.denoiser.injected(call) is not None:
            return output
        entry.now += 1
        entry.computed = entry.now
        entry.form = type(output)
        prediction = output[0]  # of a tuple or of diffusers' output, which can be indexed as one
        if self.branch is None:
            # Callers may change a prediction in place, so that it is kept, and handed out again, as a copy.
            entry.history.add(time, prediction.detach().clone())
        elif self.captured is None:
            self.report.warn(
                "The layer before the cached branch did not report its output, so its calls were computed fully: it "
                "may have been compiled into a larger block. Compile the layers apart."
            )
            return output
        elif entry.rows is None:
            entry.history.add(time, self.captured)
        else:
            entry.history.add(time, self.captured[entry.rows // 2 :].clone())
            entry.difference.add(time, guidances.difference(prediction))
        self.passes[slot] = entry
        self.report.hold("features", sum(one.bytes for one in self.passes.values()))
        return output

    def continued(self, call: Call, slot: _Slot) -> _Pass:
        """What a computing call adds to: that of the calls before it in its pass and size, or an empty one."""
        entry = self.passes.pop(slot, None)
        if entry is not None:
            entry.history.make_room()
            entry.difference.make_room()
            return entry
        state, difference = (forecasts.History(self.strategy.forecast) for _ in range(2))
        return _Pass(self.guided_rows(call), state, difference)

    def guided_rows(self, call: Call) -> int | None:
        """The rows of a guided batch whose unconditional half reuse calls are to spare."""
        rows = None
        if self.strategy.guidance == "reuse" and self.branch is not None:
            rows = self.denoiser.guided_rows(call)
        self.report.settings["guidance"] = "full" if rows is None else "reuse"
        if self.branch is not None:
            self.report.reuse_cost = self.denoiser.branch_costs[self.branch] / (1 if rows is None else 2)
        return rows

    def reuse(self, call: Call, entry: _Pass) -> Any:
        from .patching import answer_of  # torch, where it is needed

        entry.now += 1
        kept = entry.history.at(self.calls[call.pass_name])
        if kept is entry.history.newest and (self.branch_pass is None or self.copies):
            kept = kept.clone()
        if self.branch_pass is None:
            return answer_of(entry.form, kept)
        if entry.rows is None:
            return self.branch_pass.run(call, kept)
        with_text = self.branch_pass.run(guidances.conditional(call, entry.rows), kept)[0]
        difference = entry.difference.at(self.calls[call.pass_name])
        return answer_of(entry.form, guidances.both(with_text, difference))

    def explain(self) -> None:
        """Warn of whatever kept the cache from acting as asked."""
        report, interval, calls = self.report, self.strategy.interval, len(self.report.decisions)
        if self.strategy.guidance == "reuse" and report.reused and report.settings["guidance"] == "full":
            report.warn(
                "DeepCache ran both halves of guidance in reused calls: the run does not call with every picture twice "
                "in one batch, or no layer runs at this depth. A guidance scale above 1 and a lower depth would do."
            )
        if interval == 1:
            report.warn("DeepCache with interval 1 computes every call: use an interval of 2 or more.")
        elif calls < 2:
            report.warn(f"DeepCache had nothing to reuse in a run of {calls} denoiser calls: use more steps.")
        elif report.reused == 0 and self.outside:
            report.warn(
                f"DeepCache reused nothing: between start {self.window.start} and end {self.window.end} (progress "
                "along the noise schedule) no call had a computed one to follow. Widen the window."
            )
        elif report.reused == 0 and not report.warnings:
            report.warn("DeepCache reused nothing: the inputs changed their shape at every call.")
        elif interval > calls:
            report.warn(
                f"DeepCache's interval {interval} exceeds the run's {calls} calls: only the first one computed."
            )
