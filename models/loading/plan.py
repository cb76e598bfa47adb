"""Where a model's networks lie while requests are drawn: the cheapest plan in time under which they fit a device.

Arithmetic alone: bytes go in, a plan comes out. `residence` carries it out; docs/decisions/plan.md has the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from models.base import Offload

RESERVE = 0.05  # of the memory: the workspaces of kernels and the allocator's fragments, which no count sees
VAE = "vae"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the weights, by network; and of each network's blocks in the order of their running.

    What of a network is in no block stays with it. One without blocks cannot be streamed; those that are `fixed` cannot
    be moved: their weights are no plain tensors.
    """

    weights: Mapping[str, int]
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    @property
    def texts(self) -> frozenset[str]:
        return frozenset(name for name in self.weights if "text_encoder" in name)

    @property
    def denoisers(self) -> tuple[str, ...]:
        """One, or two where a refiner goes on with what a model has begun."""
        return tuple(name for name in self.weights if name != VAE and name not in self.texts)

    def present(self, name: str, kept: int | None) -> int:
        """Bytes of a network on the device: all, or with so many blocks `kept` and the others streamed."""
        if kept is None:
            return self.weights[name]
        away: list[int] = streamed(self.blocks[name], kept)
        return self.weights[name] - sum(away) + min(2, len(away)) * max(away, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Bytes beside the weights that a request needs in each phase. tiled: of a decode in tiles."""

    text: int
    denoise: int
    decode: int
    tiled: int

    def with_more(self, size: int) -> Work:
        """With so many bytes more from the denoising on, as of ControlNets."""
        denoise, decode, tiled = (phase + size for phase in (self.denoise, self.decode, self.tiled))
        return replace(self, denoise=denoise, decode=decode, tiled=tiled)

    def beside(self, other: Work) -> Work:
        """Of both models, where `other` belongs to a refiner, which decodes nothing."""
        return replace(self, text=max(self.text, other.text), denoise=max(self.denoise, other.denoise))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """moved: networks that lie in main memory; calling one brings it, and sends away whichever of them is there.

    kept: of those that come block by block, how many blocks come and go with the network; the others are streamed, two
    at a time. tiled: pictures are decoded in tiles.
    """

    offload: Offload
    moved: frozenset[str] = frozenset()
    kept: Mapping[str, int] = field(default_factory=dict)
    tiled: bool = False

    def peaks(self, sizes: Sizes, work: Work) -> dict[str, int]:
        """Bytes on the device at most, by phase."""

        def called(name: str) -> int:
            return sizes.present(name, self.kept.get(name)) if name in self.moved else 0

        here = sum(size for name, size in sizes.weights.items() if name not in self.moved)
        denoiser = max(map(called, sizes.denoisers))
        return {
            "text": here + max(map(called, sizes.texts), default=0) + work.text,
            "denoise": here + denoiser + work.denoise,
            "decode": here + (called(VAE) or denoiser) + (work.tiled if self.tiled else work.decode),
        }

    def need(self, sizes: Sizes, work: Work) -> int:
        return max(self.peaks(sizes, work).values())

    def copied_each_step(self, sizes: Sizes) -> int:
        """Bytes at most, while a denoiser computes all of its blocks."""
        names = (name for name in sizes.denoisers if name in self.kept)
        return max((sum(streamed(sizes.blocks[name], self.kept[name])) for name in names), default=0)

    def words(self, sizes: Sizes) -> str:
        """For people: one or more sentences."""
        texts = "text encoder" if len(sizes.texts) == 1 else "text encoders"
        match self.offload:
            case "none":
                said = "All networks lie on the device."
            case "text":
                said = f"The {texts} wait in main memory and come to the device to read a prompt; all else stays there."
            case _:
                turns = ", ".join(f"the {name}" for name in (texts, *sizes.denoisers))
                turns += " and the autoencoder" if VAE in self.moved else ""
                said = f"The networks take turns on the device, and wait in main memory: {turns}."
        for name, kept in sorted(self.kept.items()):
            away = streamed(sizes.blocks[name], kept)
            said += (
                f" Of the {len(sizes.blocks[name])} blocks of {name} {len(away)} are streamed while it runs: "
                f"{sum(away) / 1e9:.1f} GB a call."
            )
        return said + (" Pictures are decoded in tiles, which blend." if self.tiled else "")

    def row(self, sizes: Sizes, work: Work, memory: int | None) -> dict[str, Any]:
        """Ready for JSON. memory: bytes that it was made for.

        `networks`: bytes of the weights, and where they lie. `streamed_bytes`: copied while the denoiser computes all.
        """

        def where(name: str) -> str:
            return "streamed" if name in self.kept else "moved" if name in self.moved else "device"

        return {
            "offload": self.offload,
            "tiles": self.tiled,
            "streamed_bytes": self.copied_each_step(sizes),
            "networks": {name: {"bytes": size, "where": where(name)} for name, size in sizes.weights.items()},
            "peak_bytes": self.peaks(sizes, work),
            "memory_bytes": memory,
            "words": self.words(sizes),
        }


def choose(sizes: Sizes, work: Work, memory: int, offload: Offload | None = None) -> Plan:
    """The first plan that fits into `memory` bytes but for the reserve, in the order of the time that they cost.

    Networks are moved once a request at most, blocks are streamed at each step, and tiles are decoded twice where they
    overlap: those come last. offload: the operator's choice, None leaves it to the arithmetic. Where nothing fits, the
    plan that needs least: each request is looked at again before it is drawn.
    """
    room = int(memory * (1 - RESERVE))
    least: Plan | None = None
    for tiled in (False, True) if work.tiled < work.decode else (False,):
        for kind, moved in _levels(sizes):
            if offload in (None, kind):
                plan = Plan(offload=kind, moved=moved - sizes.fixed, tiled=tiled)
                plan = _streaming(plan, sizes, work, room) if kind == "group" else plan
                if plan.need(sizes, work) <= room:
                    return plan
                least = min(least or plan, plan, key=lambda one: one.need(sizes, work))
    if least is None:
        raise ValueError(f"{offload!r} is nothing that a plan can choose")
    return least


def _levels(sizes: Sizes) -> Iterator[tuple[Offload, frozenset[str]]]:
    denoisers = frozenset(sizes.denoisers)
    yield "none", frozenset()
    yield "text", sizes.texts
    yield "model", sizes.texts | denoisers  # one goes when the other, or a new prompt, comes
    yield "model", sizes.texts | denoisers | {VAE}  # and for each decode
    yield "group", sizes.texts | denoisers | {VAE}


def _streaming(plan: Plan, sizes: Sizes, work: Work, room: int) -> Plan:
    """With those networks streamed that are too large to come whole, as many of their blocks kept as there is room."""
    kept = {}
    here = sum(size for name, size in sizes.weights.items() if name not in plan.moved)
    for name in plan.moved:
        left = room - here - (work.text if name in sizes.texts else work.denoise)
        if sizes.weights[name] > left and (count := len(sizes.blocks.get(name, ()))):
            fitting = (number for number in range(count - 1, 0, -1) if sizes.present(name, number) <= left)
            kept[name] = next(fitting, 0)
    return Plan(offload=plan.offload, moved=plan.moved, kept=kept, tiled=plan.tiled)


def streamed(blocks: Sequence[Any], kept: int) -> list[Any]:
    """Those of the blocks that are not among the `kept`.

    Kept ones are taken from both ends: calls that a cache shortens run those, and then nothing is copied.
    """
    return list(blocks[(kept + 1) // 2 : len(blocks) - kept // 2])
