"""One run of the first-block cache: the residuals that it keeps, and the stand-ins that run or skip the blocks.

For a call, each block in the root's lists is shadowed by a stand-in. The first one runs its block and decides; each
further one runs its own over the batch items that compute, and hands on the others' streams, which are final by then.
The root's forward is untouched around them: what it hands each block beside the streams, and what it does before and
after its lists, stays its business. In a run's first call the stand-ins see that it does nothing to the streams.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cache.errors import IncompatibleDenoiser
from cache.flops import Uncountable, on_meta
from cache.forecast import Line
from cache.patching import Shadow, shadowed
from cache.report import CacheReport
from cache.run import Lane, Run
from cache.transfer import upload
from cache.views.base import Call, Decision, Injection
from cache.views.transformer import IMAGE, TransformerDenoiser

from .rule import Reference
from .settings import Settings

_FOLLOWED: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""Roots seen to hand on what blocks return, by how they were looked at: to compare, the host waits."""
Streams = dict[str, Tensor]  # by name, each (batch, tokens, channels)
Place = tuple[int, int]  # of a block: its list, and its number there


@dataclass(slots=True)
class Kept:
    """What a lane keeps. Every tensor's first dimension is the batch; an item's part is of its last computed call."""

    reference: Reference  # for the first block's residual of the image stream
    tails: dict[str, Line]  # what all blocks but the first added to each stream

    @property
    def bytes(self) -> int:
        return self.reference.bytes + sum(history.bytes for history in self.tails.values())


class FirstBlockRun(Run):
    """The state of one run."""

    denoiser: TransformerDenoiser

    def __init__(self, settings: Settings, denoiser: TransformerDenoiser) -> None:
        said = {**dataclasses.asdict(settings), "forecast": "probe" if settings.forecast else "none"}
        corrects = settings.forecast and settings.threshold > 0
        super().__init__(denoiser, CacheReport(settings.name, said), corrects=corrects)
        self.settings = settings
        self.blocks = denoiser.blocks
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # of the first call, on the meta device
        # Whether blocks write into their inputs, so that what is subtracted later must be copied; None until seen.
        self.in_place: bool | None = None
        self.packed: dict[Place, bool] = {}  # whether a block returns a tuple, once it has run
        self.joins = False  # whether the root joins its streams before its last list of blocks

    @property
    def last(self) -> Place:
        return len(self.blocks) - 1, len(self.blocks[-1]) - 1

    def step(self, call: Call, lane: Lane) -> tuple[Any, Decision]:
        denoiser, report = self.denoiser, self.report
        argument = denoiser.injected(call)
        if argument is not None:
            report.warn(f"Calls with {argument} were computed fully: it changes what the blocks hand on.")
        if not lane.follows or argument is not None:
            lane.kept.clear()  # of other sizes
        if self.settings.threshold == 0 or argument is not None:
            output = call.run()
            report.residuals.append(None)
            report.item_residuals.append(())
            return output, (True,) * denoiser.batch_of(call)
        turn = Turn(self, lane, call.injection, checking=self.arguments is None)
        self.arguments = self.arguments or on_meta(call.args, call.kwargs)
        with shadowed(turn.stand_ins()):
            output = call.given({}).run()
        _FOLLOWED.setdefault(denoiser.root, set()).add(denoiser.reading)
        report.residuals.append(turn.change)
        report.item_residuals.append(denoiser.of_pictures(turn.changes, _larger))
        return output, tuple(row in turn.rows for row in range(turn.batch))

    def reuse_cost(self) -> float | None:
        """Share of a full call's operations that a reuse call needs; None where nothing was reused or counted."""
        reused = any("R" in letters for letters in (self.report.decisions, *self.report.item_decisions))
        if not reused or self.arguments is None:
            return None
        try:
            return self.denoiser.first_block_cost(*self.arguments)
        except Uncountable as error:  # the pictures are made, only the prediction is missing
            self.report.warn(f"No speed-up is predicted. {error}")
            return None

    def conclude(self) -> None:
        """Complete the report."""
        self.report.reuse_cost = self.reuse_cost()
        self.report.conclude(partial(_explain, self.settings.threshold, sum(map(len, self.blocks))))


class Turn:
    """One call in progress."""

    def __init__(self, run: FirstBlockRun, lane: Lane, injection: Injection | None, *, checking: bool) -> None:
        self.run, self.denoiser, self.lane, self.checking = run, run.denoiser, lane, checking
        self.injection = injection
        self.batch = 0
        self.rows: list[int] = []  # the batch items that compute
        self.changes: list[float] = []  # what of each item was held against the threshold, if there was anything
        self.change: float | None = None  # the largest of them
        self.head: Streams = {}  # after the first block, as it was then
        self.live: Streams = {}  # the same tensors as the first block returned them, which the next may write into
        self.writes: list[int] | None = None  # how often each of them had been written to by then
        self.handed: Streams = {}  # by the block before

    def stand_ins(self) -> list[Shadow]:
        """What the root gets for its lists of blocks."""
        return [
            (self.denoiser.root, name, [partial(self.block, (index, number)) for number in range(len(blocks))])
            for index, (name, blocks) in enumerate(zip(self.denoiser.block_lists, self.run.blocks, strict=True))
        ]

    def block(self, at: Place, *args: Any, **kwargs: Any) -> Any:
        """What the root gets for running the block `at`."""
        run, denoiser = self.run, self.denoiser
        block = run.blocks[at[0]][at[1]]
        if at == (0, 0):
            streams = self.begin(block, args, kwargs)
        else:
            if self.checking:
                self.check(at, args, kwargs)
            streams = self.go_on(block, at, args, kwargs)
        streams = self.injected(at, streams)
        if self.rows and at == run.last:
            self.keep(denoiser.split(streams[IMAGE], self.head) if run.joins else streams)
        self.handed = streams
        return denoiser.output(streams, run.packed[at])

    def go_on(self, block: nn.Module, at: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """The streams after a further block, which runs over the items that compute."""
        run, denoiser = self.run, self.denoiser
        some = len(self.rows) < self.batch
        given = {name: stream for name, stream in denoiser.inputs(args, kwargs).items() if name in self.head}
        if not self.rows:
            return given
        if some:
            args = tuple(_items(value, self.index, self.batch) for value in args)
            kwargs = {name: _items(value, self.index, self.batch) for name, value in kwargs.items()}
        result = block(*args, **kwargs)
        run.packed[at] = isinstance(result, tuple)
        streams = denoiser.results(result)
        return {name: given[name].index_copy(0, self.index, s) for name, s in streams.items()} if some else streams

    def check(self, at: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See that the root hands on what the block before has returned, from list to list perhaps as one stream.

        It may hand each block something of its own beside that. Raises IncompatibleDenoiser.
        """
        denoiser = self.denoiser
        passed, blocks = denoiser.inputs(args, kwargs), denoiser.block_lists[at[0]]
        expected, followed = self.handed, denoiser.reading in _FOLLOWED.get(denoiser.root, ())
        if at[1] == 0 and any(name not in passed for name in expected):
            expected = {IMAGE: denoiser.joined(expected)}
            self.run.joins = True
        for name, stream in expected.items():
            known = followed and name in passed and passed[name].shape == stream.shape
            if name not in passed or not (known or _same(passed[name], stream)):
                raise IncompatibleDenoiser(
                    f"{type(denoiser.root).__name__} changes {name} on its way to block {at[1]} of {blocks}, and the "
                    "first-block cache cannot follow: it hands on what blocks have returned. Run it uncached."
                )

    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """Run the first block and decide. Returns the streams that go on, final ones for the items that reuse."""
        run, denoiser = self.run, self.denoiser
        taken = denoiser.inputs(args, kwargs)
        image = taken[IMAGE]
        before = image if run.in_place is False else image.clone()
        writes = _writes({IMAGE: image})
        result = block(*args, **kwargs)
        run.packed[0, 0] = isinstance(result, tuple)
        self.live = denoiser.results(result)
        kept: Kept | None = self.lane.kept.get(self.lane.size)
        if kept is None:
            denoiser.check_order(taken, self.live)
        self.head = self.live
        if run.in_place is not False:
            self.head = {name: stream.clone() for name, stream in self.live.items()}
            run.in_place = run.in_place or writes is None or writes != _writes({IMAGE: image}) or None
            self.writes = _writes(self.live)
        self.probe = (self.head[IMAGE] - before).detach()
        self.batch = self.probe.shape[0]
        if kept is None:
            self.rows = list(range(self.batch))
            return self.live
        ahead = self.decide(kept)
        if len(self.rows) == self.batch:
            return self.live
        # A stream that the last block no longer returns (SD3's text) is not read afterwards: it goes on as it is.
        streams = self.head | {name: tail.along(ahead, self.head[name]) for name, tail in kept.tails.items()}
        if self.rows:
            rows = self.index
            streams = {name: s.index_copy(0, rows, self.head[name][rows]) for name, s in streams.items()}
        return streams

    def decide(self, kept: Kept) -> list[float]:
        """Set which items compute. Returns how many calls each has moved on."""
        verdict = kept.reference.judge(self.lane.calls, self.probe, last=self.run.ends(self.lane))
        self.rows, self.changes = verdict.rows, verdict.changes
        for row, change in enumerate(verdict.changes):
            if not math.isfinite(change):
                for history in kept.tails.values():
                    history.forget(row)
        if all(map(math.isfinite, verdict.changes)):
            self.change = max(verdict.changes)
        else:
            self.run.report.warn("The first block's residual was zero, infinite or not a number: those calls computed.")
        return verdict.ahead

    def injected(self, at: Place, streams: Streams) -> Streams:
        """The streams with what is injected behind the block `at`, in the items that compute."""
        if self.injection is None or not self.rows:
            return streams
        after = self.denoiser.injected_after(self.injection.arguments, self.denoiser.block_lists[at[0]])
        if after is None:
            return streams
        image, added = streams[IMAGE], after[at[1]]
        if len(self.rows) == self.batch:
            return streams | {IMAGE: image + added}
        return streams | {IMAGE: image.index_copy(0, self.index, image[self.index] + added[self.index])}

    def keep(self, streams: Streams) -> None:
        """Keep what the items that computed may reuse; `streams` are those after the last block."""
        run, call = self.run, self.lane.calls
        if any(stream.shape != self.head[name].shape for name, stream in streams.items()):
            raise IncompatibleDenoiser(
                f"{type(self.denoiser.root).__name__} changes a stream's shape between its lists of blocks: name only "
                "lists that hand the same streams on in block_lists."
            )
        if run.in_place is None and self.injection is None:  # else the next block is given a sum, not what it was
            run.in_place = self.writes != _writes(self.live)
        kept: Kept | None = self.lane.kept.get(self.lane.size)
        rows, index = (self.rows, self.index) if len(self.rows) < self.batch else (None, None)
        if kept is None:
            tails = {name: Line(self.batch, run.settings.forecast) for name in streams}
            kept = self.lane.kept[self.lane.size] = Kept(Reference(run.settings, call, self.probe), tails)
        else:
            kept.reference.keep(call, self.probe, rows, index)
        for name, stream in streams.items():
            tail = (stream - self.head[name]).detach()
            kept.tails[name].add(call, tail if index is None else tail[index], rows, index)

    @cached_property
    def index(self) -> Tensor:
        """`rows` on the device."""
        return upload(torch.tensor(self.rows), self.probe.device)


def _larger(one: float, other: float) -> float:
    return max(one, other, key=lambda change: change if math.isfinite(change) else math.inf)


def _writes(streams: Streams) -> list[int] | None:
    """How often each tensor has been written to, which PyTorch counts; None in inference mode, where it does not."""
    if any(stream.is_inference() for stream in streams.values()):
        return None
    return [stream._version for stream in streams.values()]


def _items(value: Any, rows: Tensor, batch: int) -> Any:
    """The batch items `rows` of an argument that has a batch dimension; position ids and the like have none."""
    match value:
        case Tensor() if value.dim() > 0 and value.shape[0] == batch:
            return value[rows]
        case dict():
            return {name: _items(item, rows, batch) for name, item in value.items()}
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal; tensors are compared only if they are not the same one."""
    match one, other:
        case _ if one is other:
            return True
        case Tensor(), Tensor():
            return one.shape == other.shape and torch.equal(one, other)
        case (tuple() | list(), tuple() | list()):
            return len(one) == len(other) and all(map(_same, one, other))
        case dict(), dict():
            return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)


def _explain(threshold: float, blocks: int, report: CacheReport) -> None:
    """Warn of whatever kept the cache from acting as asked."""
    calls = len(report.decisions)
    changes = [change for change in report.residuals if change is not None and math.isfinite(change)]
    if threshold == 0:
        report.warn("The first-block cache with threshold 0 computes every call: use a threshold above 0.")
    elif blocks < 2:
        report.warn("The transformer has a single block, so the first-block cache has nothing to skip.")
    elif calls < 2:
        report.warn(f"The first-block cache had nothing to reuse in a run of {calls} denoiser calls: use more steps.")
    elif report.reused == 0 and changes:
        report.warn(
            f"The first-block cache reused nothing: the first block's residual changed by {min(changes):.3f} or "
            f"more at every call, not below the threshold {threshold}. A higher threshold would reuse."
        )
    elif report.reused == 0 and not report.warnings:
        report.warn("The first-block cache reused nothing: the inputs changed their shape at every call.")
