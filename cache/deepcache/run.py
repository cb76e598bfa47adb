"""One run of DeepCache: what each lane keeps at each size, and how a call is computed or reused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cache.flops import deepest_branch
from cache.forecast import Damped
from cache.report import CacheReport
from cache.run import Lane, Run
from cache.views.base import Call, Decision, answer_of
from cache.views.unet import UNetDenoiser

from . import guidance as guidances
from .schedule import Placement, Uniform, Window
from .settings import Settings


@dataclass(slots=True)
class Kept:
    """What a lane keeps at one size. A run that comes back to a size, as multi-scale does, goes on from there."""

    rows: int | None  # of a guided batch whose reuse calls run the second half alone; None for any other
    history: Damped  # of the branch's state (batch, channels, height, width), or of the prediction
    difference: Damped  # of the guided predictions, with text less without; empty for any other batch
    residuals: list[Damped] = field(default_factory=list)  # of what is injected into the branch's pass
    form: type = tuple  # of the network's answers
    computed: int = -1  # the last call that computed, counted in this lane and size from 0
    now: int = -1  # the last call

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in (self.history, self.difference, *self.residuals))


class DeepCacheRun(Run):
    """The state of one run."""

    denoiser: UNetDenoiser

    def __init__(self, settings: Settings, denoiser: UNetDenoiser) -> None:
        said = {**dataclasses.asdict(settings), "forecast": "damped" if settings.forecast else "none"}
        corrects = settings.forecast and settings.interval > 1
        super().__init__(denoiser, CacheReport(settings.name, said), corrects=corrects)
        self.settings = settings
        self.branch = branch = deepest_branch(denoiser.branch_costs, settings.depth)
        self.cost = 0.0 if branch is None else denoiser.branch_costs[branch]
        self.report.settings |= {"placement": None, "branch": branch}
        self.report.reuse_cost = self.cost
        self.schedule: Uniform | Placement | None = None  # known from the first call on
        self.window = Window(settings.start, settings.end)
        self.captured: Tensor | None = None
        self.outside = 0  # calls that the window excluded
        self.spared = False  # whether some calls were guided ones whose reuse runs one half
        self.branch_pass = None if branch is None else denoiser.branch_pass(branch)
        self.copies = denoiser.modifies_in_place

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context, `captured` is set by the layer whose output enters the branch's pass."""
        with super().attached():
            if self.branch is None or self.settings.interval == 1:
                yield
                return
            handle = self.denoiser.source(self.branch).register_forward_hook(self.capture)
            try:
                yield
            finally:
                handle.remove()

    def capture(self, module: object, inputs: object, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        self.captured = state.detach().clone() if self.copies else state.detach()

    def scheduled(self, first: Call) -> Uniform | Placement:
        """Where the compute calls lie in the run that begins with `first`: its length is known by then if ever."""
        settings, said = self.settings, self.report.settings
        if isinstance(settings.schedule, tuple):
            return Placement(settings.schedule, math.inf, "given")
        if settings.schedule == "auto":
            if not self.window.is_whole:
                said["placement"] = "uniform: a window is set"
            elif (placement := self.denoiser.placement(first, settings.interval, self.branch)) is None:
                said["placement"] = "uniform: the length of the run is not known"
            else:
                said["placement"] = placement.source
                return placement
        said["schedule"] = "uniform"
        return Uniform(settings.interval)

    def step(self, call: Call, lane: Lane) -> tuple[Any, Decision]:
        self.schedule = self.schedule or self.scheduled(call)
        kept = self.reusable(call, lane, self.schedule)
        try:
            output = self.compute(call, lane) if kept is None else self.reuse(call, lane, kept)
        finally:
            self.captured = None
        return output, (kept is None,)

    def reusable(self, call: Call, lane: Lane, schedule: Uniform | Placement) -> Kept | None:
        """What the call may reuse; None if it has to compute."""
        if self.settings.interval == 1:
            return None
        if not self.window.is_whole:
            timestep = self.denoiser.timestep_of(call)
            if not self.window.contains(timestep, self.denoiser.num_train_timesteps):
                self.outside += 1
                return None
        if (argument := self.denoiser.injected(call)) is not None:
            self.report.warn(f"Calls with {argument} (ControlNet, T2I-Adapter) were computed fully.")
            return None
        kept: Kept | None = lane.kept.get(lane.size)
        if kept is None or not lane.follows:
            return None
        return kept if schedule.reuses(kept.now + 1, kept.computed) else None

    def compute(self, call: Call, lane: Lane) -> Any:
        kept, time = self.continued(call, lane), lane.calls
        output = call.run()
        if self.settings.interval == 1 or self.denoiser.injected(call) is not None:
            return output
        kept.now += 1
        kept.computed = kept.now
        kept.form = type(output)
        prediction = output[0]  # of a tuple or of diffusers' output, which can be indexed as one
        if self.branch is None:
            # Callers may change a prediction in place, so that it is kept, and handed out again, as a copy.
            kept.history.add(time, prediction.detach().clone())
        elif self.captured is None:
            self.report.warn(
                "The layer before the cached branch did not report its output, so its calls were computed fully: it "
                "may have been compiled into a larger block. Compile the layers apart."
            )
            return output
        elif kept.rows is None:
            kept.history.add(time, self.captured)
        else:
            kept.history.add(time, self.captured[kept.rows // 2 :].clone())
            kept.difference.add(time, guidances.difference(prediction))
        if call.injection is not None and self.branch is not None:
            self.keep_residuals(kept, time, self.denoiser.shallow(call.injection.arguments, self.branch))
        lane.kept[lane.size] = kept
        return output

    def keep_residuals(self, kept: Kept, time: int, residuals: Sequence[Tensor]) -> None:
        """Keep what was injected into the layers that reuse calls run."""
        kept.residuals = kept.residuals or [Damped(self.settings.forecast) for _ in residuals]
        for history, residual in zip(kept.residuals, residuals, strict=True):
            history.add(time, residual if kept.rows is None else residual[kept.rows // 2 :].clone())

    def continued(self, call: Call, lane: Lane) -> Kept:
        """What a computing call adds to: that of the calls before it in its lane and size, or an empty one."""
        kept: Kept | None = lane.kept.pop(lane.size, None)
        if kept is not None:
            for one in (kept.history, kept.difference, *kept.residuals):
                one.make_room()
            return kept
        forecast = self.settings.forecast
        return Kept(self.guided_rows(call), Damped(forecast), Damped(forecast))

    def guided_rows(self, call: Call) -> int | None:
        """The rows of a guided batch whose unconditional half reuse calls are to spare."""
        rows = None
        if self.settings.guidance == "reuse" and self.branch is not None:
            rows = self.denoiser.guided_rows(call)
        if rows is not None or not self.spared:  # in a run that is guided in a part, that part's
            self.report.settings["guidance"] = "full" if rows is None else "reuse"
            self.report.reuse_cost = self.cost / (1 if rows is None else 2)
        self.spared = self.spared or rows is not None
        return rows

    def reuse(self, call: Call, lane: Lane, kept: Kept) -> Any:
        kept.now += 1
        state = kept.history.at(lane.calls)
        if state is kept.history.newest and (self.branch_pass is None or self.copies):
            state = state.clone()
        if self.branch_pass is None:
            return answer_of(kept.form, state)
        if kept.rows is not None:
            call = guidances.conditional(call, kept.rows)
        if kept.residuals:
            call = call.given(self.denoiser.injected_shallow([one.at(lane.calls) for one in kept.residuals]))
        if kept.rows is None:
            return self.branch_pass.run(call, state)
        with_text = self.branch_pass.run(call, state)[0]
        return answer_of(kept.form, guidances.both(with_text, kept.difference.at(lane.calls)))

    def explain(self) -> None:
        """Warn of whatever kept the cache from acting as asked."""
        report, interval, calls = self.report, self.settings.interval, len(self.report.decisions)
        if self.settings.guidance == "reuse" and report.reused and report.settings["guidance"] == "full":
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
