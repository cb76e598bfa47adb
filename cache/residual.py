"""One run of the first-block cache: the residuals that it keeps, and the stand-ins that run or skip the blocks.

For a call, each of the root's lists of blocks is shadowed by a single stand-in. The first one runs block 0 and decides;
then each runs the rest of its list over the batch items that compute. The root's forward is untouched around them, so
what it does between and after its lists stays its business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cost import Uncountable, first_block_cost, on_meta
from .denoiser import TransformerDenoiser
from .forecast import History
from .patching import Call, Shadow, shadowed
from .reference import Reference
from .strategy import CacheReport, IncompatibleDenoiser
from .transfer import upload

if TYPE_CHECKING:
    from .first_block import FirstBlockCache

IMAGE = "hidden_states"
Streams = dict[str, Tensor]  # by name, each (batch, tokens, channels)


@dataclass(slots=True)
class _Pass:
    """What is carried between the calls of one pass; every tensor's first dimension is the batch.

    An item's entries are those of its last computed call.
    """

    signature: tuple[Any, ...]
    reference: Reference  # for the first block's residual of the image stream
    tails: dict[str, History]  # what all blocks but the first added to each stream
    now: int = 0  # the last call, counted in this pass

    @property
    def bytes(self) -> int:
        return self.reference.bytes + sum(history.bytes for history in self.tails.values())


class ResidualRun:
    """The state of one run, and what handles its calls."""

    def __init__(self, denoiser: TransformerDenoiser, report: CacheReport, strategy: FirstBlockCache) -> None:
        self.denoiser = denoiser
        self.report = report
        self.settings = strategy
        self.blocks = denoiser.blocks
        self.passes: dict[str | None, _Pass] = {}
        self.turn: _Turn | None = None  # the call in progress
        self.stand_ins: list[Shadow] = [
            (denoiser.root, name, [partial(self.through, index)]) for index, name in enumerate(denoiser.block_lists)
        ]
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # of the first call, on the meta device
        # Whether blocks write into their inputs, so that what is subtracted later must be copied; None until seen.
        self.in_place: bool | None = None

    def handle(self, call: Call) -> Any:
        denoiser, report = self.denoiser, self.report
        argument = denoiser.injected(call)
        if argument is not None:
            report.warn(f"Calls with {argument} were computed fully: it changes what the blocks hand on.")
        if self.settings.threshold == 0 or argument is not None:
            self.passes.pop(call.pass_name, None)
            output = call.run()
            report.record("C" * denoiser.batch_of(call))
            report.residuals.append(None)
            report.item_residuals.append(())
            return output
        if self.arguments is None:
            self.arguments = on_meta(call)
        self.turn = turn = _Turn(self, call)
        try:
            with shadowed(self.stand_ins):
                output = call.run()
        except BaseException:  # also a cancel: whatever stopped the call, what it leaves is not to be reused
            self.passes.clear()
            raise
        finally:
            self.turn = None
        report.record("".join(["C" if row in turn.rows else "R" for row in range(turn.batch)]))
        report.residuals.append(turn.change)
        report.item_residuals.append(tuple(turn.changes))
        if turn.rows:
            report.hold("features", sum(entry.bytes for entry in self.passes.values()))
        return output

    def through(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """What the root gets for running its list of blocks `index`."""
        assert self.turn is not None, "a stand-in is in the root only while a call runs"
        return self.turn.through(index, args, kwargs)

    def reuse_cost(self) -> float | None:
        """Share of a full call's operations that a reuse call needs; None where nothing was reused or counted."""
        reused = any("R" in letters for letters in (self.report.decisions, *self.report.item_decisions))
        if not reused or self.arguments is None:
            return None
        try:
            return first_block_cost(self.denoiser, *self.arguments)
        except Uncountable as error:  # the pictures are made, only the prediction is missing
            self.report.warn(f"No speed-up is predicted. {error}")
            return None


class _Turn:
    """One call in progress."""

    def __init__(self, run: ResidualRun, call: Call) -> None:
        self.run = run
        self.call = call
        self.batch = 0
        self.rows: list[int] = []  # the batch items that compute
        self.index: Tensor | None = None  # those, on the device
        self.changes: list[float] = []  # what of each item was held against the threshold, if there was anything
        self.change: float | None = None  # the largest of them
        self.packed = True  # whether the blocks return a tuple
        self.head: Streams = {}  # after the first block, as it was then
        self.live: Streams = {}  # the same tensors as the first block returned them, which the next may write into
        self.writes: list[int] | None = None  # how often each of them had been written to by then

    def through(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The stand-in for the list of blocks `index`."""
        run, denoiser = self.run, self.run.denoiser
        blocks = run.blocks[index]
        if index == 0:
            streams = self.begin(args, kwargs)
            blocks = blocks[1:]
        else:
            passed = denoiser.inputs(args, kwargs)
            if missing := [name for name in self.head if name not in passed]:
                raise IncompatibleDenoiser(
                    f"{type(denoiser.root).__name__} hands its {denoiser.block_lists[index]} no {missing[0]}: it joins "
                    "its streams between its lists of blocks, and the first-block cache cannot follow. Run it uncached."
                )
            streams = {name: passed[name] for name in self.head}
        if len(self.rows) == self.batch:
            streams = self.run_blocks(blocks, streams, args, kwargs)
        elif self.rows:
            rows = self.index_of_rows()
            some_args = tuple(_items(value, rows, self.batch) for value in args)
            some_kwargs = {name: _items(value, rows, self.batch) for name, value in kwargs.items()}
            some = {name: stream[rows] for name, stream in streams.items()}
            some = self.run_blocks(blocks, some, some_args, some_kwargs)
            streams = {name: streams[name].index_copy(0, rows, stream) for name, stream in some.items()}
        if index == len(run.blocks) - 1 and self.rows:
            self.keep(streams)
        return denoiser.output(streams, self.packed)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
        """Run block 0 and decide. Returns the streams that go on, with the final values for the items that reuse."""
        run, denoiser = self.run, self.run.denoiser
        taken = denoiser.inputs(args, kwargs)
        image = taken[IMAGE]
        before = image if run.in_place is False else image.clone()
        writes = _writes({IMAGE: image})
        result = run.blocks[0][0](*args, **kwargs)
        self.packed = isinstance(result, tuple)
        self.live = denoiser.results(result)
        entry = run.passes.get(self.call.pass_name)
        if entry is not None and entry.signature != self.call.signature:
            del run.passes[self.call.pass_name]
            entry = None
        if entry is None:
            denoiser.check_order(taken, self.live)
        self.head = self.live
        if run.in_place is not False:
            self.head = {name: stream.clone() for name, stream in self.live.items()}
            run.in_place = run.in_place or writes is None or writes != _writes({IMAGE: image}) or None
            self.writes = _writes(self.live)
        self.probe = (self.head[IMAGE] - before).detach()
        self.batch = self.probe.shape[0]
        if entry is None:
            self.rows = list(range(self.batch))
            return self.live
        entry.now += 1
        ahead = self.decide(entry)
        if len(self.rows) == self.batch:
            return self.live

        streams = dict(self.head)
        # A stream that the last block no longer returns (SD3's text) is not read afterwards: it goes on as it is.
        for name, tail in entry.tails.items():
            stream = streams[name]
            streams[name] = tail.at(entry.now, stream) if ahead is None else tail.along(ahead, stream)
        if self.rows:
            rows = self.index_of_rows()
            streams = {name: s.index_copy(0, rows, self.head[name][rows]) for name, s in streams.items()}
        return streams

    def decide(self, entry: _Pass) -> list[float] | None:
        """Set which items compute. Returns how far the others have moved on, where the forecast asks for it."""
        verdict = entry.reference.judge(entry.now, self.probe)
        self.rows, self.changes = verdict.rows, verdict.changes
        for row, change in enumerate(verdict.changes):
            if not math.isfinite(change):
                for history in entry.tails.values():
                    history.forget(row)
        if all(map(math.isfinite, verdict.changes)):
            self.change = max(verdict.changes)
        else:
            self.run.report.warn("The first block's residual was zero, infinite or not a number: those calls computed.")
        return verdict.ahead

    def run_blocks(
        self, blocks: list[nn.Module], streams: Streams, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Streams:
        denoiser = self.run.denoiser
        for block in blocks:
            block_args, block_kwargs = denoiser.arguments(streams, args, kwargs)
            streams = denoiser.results(block(*block_args, **block_kwargs))
        return streams

    def keep(self, streams: Streams) -> None:
        """Keep what the items that computed may reuse; `streams` are those after the last block."""
        run = self.run
        if any(stream.shape != self.head[name].shape for name, stream in streams.items()):
            raise IncompatibleDenoiser(
                f"{type(run.denoiser.root).__name__} changes a stream's shape between its lists of blocks: name only "
                "lists that hand the same streams on in block_lists."
            )
        if run.in_place is None:
            run.in_place = self.writes != _writes(self.live)
        entry = run.passes.get(self.call.pass_name)
        rows: list[int] | None = None
        index: Tensor | None = None
        if entry is None:
            tails = {name: History(run.settings.forecast, self.batch) for name in streams}
            entry = _Pass(self.call.signature, Reference(run.settings, self.probe), tails)
            run.passes[self.call.pass_name] = entry
        else:
            if len(self.rows) < self.batch:
                rows, index = self.rows, self.index_of_rows()
            entry.reference.keep(entry.now, self.probe, rows, index)
        for name, stream in streams.items():
            tail = (stream - self.head[name]).detach()
            entry.tails[name].add(entry.now, tail if index is None else tail[index], rows, index)

    def index_of_rows(self) -> Tensor:
        if self.index is None:
            self.index = upload(torch.tensor(self.rows), self.probe.device)
        return self.index


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
