"""Strategies that compute every call and remember what a cache would have decided from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache.errors import IncompatibleDenoiser
from cache.flops import on_meta
from cache.patching import shadowed
from cache.report import CacheReport
from cache.solver import steps_of
from cache.strategy import CacheStrategy
from cache.views.base import Call, Denoiser
from cache.views.transformer import IMAGE, TransformerDenoiser
from cache.views.unet import UNetDenoiser


@dataclass(slots=True)
class BranchRecorder:
    """A strategy under which every call computes, and what a branch would have kept of it is remembered.

    branch: as in `UNetDenoiser`; None for the prediction itself.
    """

    name: ClassVar[str] = "recorder"

    branch: int | None
    runs: list[Tensor] = field(default_factory=list)  # of each run: (batch entries, calls, calls), see `embedded`
    timesteps: list[float] = field(default_factory=list)  # of the last run's calls

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """Raises IncompatibleDenoiser and AlreadyAttached."""
        if not isinstance(denoiser, UNetDenoiser):
            raise IncompatibleDenoiser(f"{type(denoiser.root).__name__} is no UNet: there are no branches to record.")
        report = CacheReport(self.name, settings={"branch": self.branch})
        states: list[Tensor] = []
        self.timesteps = []

        def keep(module: object, inputs: object, output: Any) -> None:
            state = output if isinstance(output, Tensor) else output[0]  # of a tuple or of diffusers' output
            states.append(state.detach().flatten(1).half().cpu())

        def handle(call: Call) -> Any:
            output = call.run()
            self.timesteps.append(denoiser.timestep_of(call))
            report.record((True,))
            return output

        source = denoiser.root if self.branch is None else denoiser.source(self.branch)
        hook = source.register_forward_hook(keep)
        try:
            with denoiser.intercepted(handle):
                yield report
        finally:
            hook.remove()
        self.runs.append(embedded(torch.stack(states, dim=1)))


def embedded(states: Tensor) -> Tensor:
    """(batch, calls, size) → (batch, calls, calls) in float64: vectors with the same inner products."""
    products = torch.stack([entry.float() @ entry.float().T for entry in states]).double()
    values, vectors = torch.linalg.eigh(products)
    short: Tensor = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return short


@dataclass(slots=True)
class PredictionRecorder:
    """Another strategy, of whose runs what the sampler is told is remembered, and what it makes of that.

    scheduler: that of the run which begins, a diffusers scheduler.
    """

    name: ClassVar[str] = "recorder"

    strategy: CacheStrategy
    scheduler: Callable[[], Any]
    runs: list[Tensor] = field(default_factory=list)  # of each run: (calls, …), float32 on the CPU
    moves: Tensor | None = None  # of the last run, as `steps_of` gives them

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """As the strategy's own."""
        scheduler = self.scheduler()
        step, told = scheduler.step, list[Tensor]()

        def stepping(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not told:
                self.moves = steps_of(scheduler)
            told.append(prediction.detach().float().cpu())
            return step(prediction, *args, **kwargs)

        with shadowed([(scheduler, "step", stepping)]), self.strategy.attach(denoiser) as report:
            yield report
        self.runs.append(torch.stack(told))


class ResidualRecorder:
    """A strategy that computes every call and keeps the first block's residuals, on the CPU.

    `lanes` has an entry a lane of each run: its residuals (items, tokens, channels), call by call. `reuse_cost` is the
    share of a full call's operations that a reuse call would need. `ends` is whether a run knows its last call.
    """

    name: ClassVar[str] = "none"

    def __init__(self) -> None:
        self.lanes: list[list[Tensor]] = []
        self.reuse_cost: float | None = None
        self.ends = False

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """One run of `denoiser`, a transformer's view. Raises IncompatibleDenoiser and AlreadyAttached."""
        if not isinstance(denoiser, TransformerDenoiser):
            raise IncompatibleDenoiser(
                f"A threshold is found for transformers, and {type(denoiser.root).__name__} is a UNet: DeepCache's "
                "speed-up follows from its interval and depth."
            )
        report = CacheReport(self.name)
        lanes: dict[str | None, list[Tensor]] = {}
        before: list[Tensor] = []

        def entering(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before.append(denoiser.inputs(args, kwargs)[IMAGE].clone())  # the block may write into it

        def leaving(block: Any, args: tuple[Any, ...], output: Any) -> None:
            residual = denoiser.results(output)[IMAGE] - before.pop()
            residuals.append(residual.detach().cpu())

        residuals: list[Tensor] = []

        def handle(call: Call) -> Any:
            nonlocal residuals
            if self.reuse_cost is None:
                self.reuse_cost = denoiser.first_block_cost(*on_meta(call.args, call.kwargs))
            residuals = lanes.setdefault(call.lane, [])
            output = call.run()
            if not report.decisions:
                self.ends = denoiser.responses() is not None
            report.record((True,) * denoiser.batch_of(call))
            return output

        first = denoiser.blocks[0][0]
        hooks = [first.register_forward_pre_hook(entering, with_kwargs=True), first.register_forward_hook(leaving)]
        try:
            with denoiser.intercepted(handle):
                yield report
            self.lanes += lanes.values()
        finally:
            for hook in hooks:
                hook.remove()
