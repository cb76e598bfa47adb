"""A plan carried out: networks that come to the device when they are called, whole or block by block.

accelerate and diffusers have hooks for both. Those of accelerate copy a network back to main memory, where it has never
changed; those of diffusers wait for each block and do not live with a cache (docs/decisions/plan.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from .plan import VAE, Plan, Sizes, streamed

_ALIGNED = 256  # bytes: where a tensor may begin within a slot
_UNET = {"mid_block": 1, "up_blocks": 2}  # parts that run after the others
_SHARE = 32  # a block is at most such a share of its network, if it can be taken apart

Place = tuple[dict[str, Any], str]  # a module's table of parameters or buffers, and the name in it


class Residence:
    """The networks of a pipeline on `device`, or on their way there. copied: bytes brought there so far."""

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device) -> None:
        self.networks = dict(networks)
        self.device = device
        self.plan = Plan(offload="none")
        self.copied = 0
        self._guests: dict[str, Guest] = {}
        self._blocks = {name: blocks_of(network) for name, network in networks.items() if name != VAE}
        self.sizes = Sizes(
            {name: bytes_of(network) for name, network in networks.items()},
            {name: _own_bytes(networks[name], blocks) for name, blocks in self._blocks.items()},
            frozenset(name for name, network in networks.items() if not _is_plain(network)),
        )

    @property
    def held(self) -> int:
        """Bytes of weights that lie on the device now."""
        here = (name for name in self.networks if name not in self._guests or self._guests[name].here)
        return sum(self.sizes.present(name, self.plan.kept.get(name)) for name in here)

    def settle(self, plan: Plan) -> None:
        """Put each network where `plan` wants it; what it was settled for before is undone."""
        self._dismiss()
        self.plan = plan
        for name in sorted(self.networks, key=lambda name: name not in plan.moved):  # first what makes room
            network = self.networks[name]
            if name in plan.moved:
                blocks = self._blocks.get(name, ())
                away = streamed(blocks, plan.kept[name]) if name in plan.kept else []
                self._guests[name] = Guest(network.to("cpu"), self.device, away, self._make_room, self._count)
            else:
                network.to(self.device)

    def _dismiss(self) -> None:
        """Leave the networks where they are, those that were moved in main memory."""
        for guest in self._guests.values():
            guest.leave()
            guest.dismiss()
        self._guests = {}

    @contextmanager
    def beside(self, other: Residence) -> Iterator[Residence]:
        """Within the context one residence has the networks of both, to be settled; afterwards each lies as before.

        Those of `other`, a refiner's, are named so. Its autoencoder is left out, and waits in main memory.
        """
        networks = {f"refiner_{name}": network for name, network in other.networks.items() if name != VAE}
        joint = Residence({**self.networks, **networks}, self.device)
        try:
            for one in (self, other):
                one._dismiss()
            other.networks[VAE].to("cpu")
            yield joint
        finally:
            joint._dismiss()
            for one in sorted((other, self), key=lambda one: not one.plan.moved):  # first what makes room
                one.settle(one.plan)

    def bring(self, name: str) -> None:
        """As a call of the network would."""
        if name in self._guests:
            self._guests[name].pre_forward(self.networks[name])

    def send_away(self, names: Iterable[str]) -> None:
        """Those of them that are moved: they are not needed any more."""
        for name in names:
            if name in self._guests:
                self._guests[name].leave()

    def _make_room(self) -> None:
        self.send_away(self._guests)

    def _count(self, size: int) -> None:
        self.copied += size


class Guest(ModelHook):
    """A network whose weights lie in main memory, and are copied to the device when it is called.

    `streamed`: its blocks that are copied each before it runs. make_room: called before it comes; count: hears how
    many bytes were copied. Nothing is copied back: what is sent away is forgotten, but for what a request added to it.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        streamed: Sequence[nn.Module],
        make_room: Callable[[], None],
        count: Callable[[int], None],
    ) -> None:
        self.execution_device = device  # where diffusers' pipelines look for it
        self.here = False
        self._network, self._make_room, self._count = network, make_room, count
        self._stream = Stream(streamed, _shared(network), device, count) if streamed else None
        self._host = {(id(table), key): (table[key], table[key].data) for table, key in _places(network)}
        add_hook_to_module(network, self)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.here:
            self._make_room()
            self.here = True
            try:
                self._come()
            except BaseException:  # no memory is left: what has come so far would take it from whoever is next
                self.leave()
                raise
        return args, kwargs

    def leave(self) -> None:
        """Free the device's memory."""
        if not self.here:
            return
        if self._stream is not None:
            self._stream.end()
        known: dict[int, Any] = {}
        for table, key in _places(self._network):
            if (waiting := self._host.get((id(table), key))) is not None:
                table[key], data = waiting
                table[key].data = data  # whatever it was cast to since
            else:
                tensor = table[key]
                if id(tensor) not in known:
                    known[id(tensor)] = _like(tensor, tensor.data.to("cpu"))
                table[key] = known[id(tensor)]
        self.here = False

    def dismiss(self) -> None:
        """Take the hooks off the network, which lies in main memory."""
        remove_hook_from_module(self._network)
        if self._stream is not None:
            self._stream.close()

    def _come(self) -> None:
        places = self._stream.places if self._stream is not None else frozenset()
        known: dict[int, Any] = {}  # two modules may share a parameter
        for table, key in _places(self._network):
            tensor = table[key]
            if (id(table), key) in places or tensor.device.type == self.execution_device.type:
                continue
            if id(tensor) not in known:
                known[id(tensor)] = _like(tensor, tensor.data.to(self.execution_device))
                self._count(tensor.nbytes)
            table[key] = known[id(tensor)]
        if self._stream is not None:
            self._stream.begin()


class Stream:
    """Blocks that share two slots of the device's memory: while one computes, the next is copied into the other.

    Their parameters are views of the slots, but for `shared` ones. On CUDA copies run in a stream of their own and the
    host waits for none; a call that skips blocks finds the next one's copy where it was.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], shared: frozenset[int], device: torch.device, count: Callable[[int], None]
    ) -> None:
        self._device, self._count = device, count
        rows = ([place for place in _places(one) if id(place[0][place[1]]) not in shared] for one in blocks)
        self._rows = [[(table, key, _pinned(table, key, device)) for table, key in row] for row in rows]
        self.places = frozenset((id(table), key) for row in self._rows for table, key, _ in row)
        self._casts = any(hasattr(part, "_diffusers_hook") for block in blocks for part in block.modules())
        self._bytes = [sum(_room(tensor) for *_, tensor in row) for row in self._rows]
        self._views: list[list[Tensor]] = []
        self._holds: list[int | None] = []
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ready: list[torch.cuda.Event] = []
        self._used: list[torch.cuda.Event] = []
        self._handles = [
            handle
            for index, block in enumerate(blocks)
            for handle in (
                block.register_forward_pre_hook(lambda *_, index=index: self._before(index)),
                block.register_forward_hook(lambda *_, index=index: self._after(index)),
            )
        ]

    def begin(self) -> None:
        """Take the slots, and have the first block copied."""
        count = min(2, len(self._rows))
        slots = [torch.empty(max(self._bytes), dtype=torch.uint8, device=self._device) for _ in range(count)]
        self._views = [list(_views(slots[index % count], row)) for index, row in enumerate(self._rows)]
        for index in range(len(self._rows)):
            self._bind(index)
        self._holds = [None] * count
        if self._aside is not None:
            self._ready, self._used = ([torch.cuda.Event() for _ in slots] for _ in range(2))  # type: ignore[no-untyped-call]
            for event in self._used:
                event.record(torch.cuda.current_stream(self._device))
        self._copy(0)

    def end(self) -> None:
        """Give the slots back."""
        for event in self._ready:  # a copy may still be under way
            torch.cuda.current_stream(self._device).wait_event(event)
        self._views, self._ready, self._used = [], [], []

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, index: int) -> None:
        slot, following = index % len(self._holds), (index + 1) % len(self._rows)
        self._copy(index)
        if self._ready:
            torch.cuda.current_stream(self._device).wait_event(self._ready[slot])
        if following % len(self._holds) != slot:
            self._copy(following)

    def _after(self, index: int) -> None:
        slot, following = index % len(self._holds), (index + 1) % len(self._rows)
        if self._used:
            self._used[slot].record(torch.cuda.current_stream(self._device))
        if self._casts:  # layer by layer, from what the weights are stored in: each is a tensor of its own by now
            self._bind(index)
        if following % len(self._holds) == slot:  # the first one after the last of an odd number
            self._copy(following)

    def _bind(self, index: int) -> None:
        """Let the block's weights be its slot's."""
        for (table, key, _), view in zip(self._rows[index], self._views[index], strict=True):
            table[key] = _like(table[key], view)

    def _copy(self, index: int) -> None:
        """Have the block's weights in its slot, in time for whatever the host asks of the device next."""
        slot = index % len(self._holds)
        if self._holds[slot] == index:
            return
        self._holds[slot] = None
        with self._beside(slot):
            for (*_, waiting), view in zip(self._rows[index], self._views[index], strict=True):
                view.copy_(waiting, non_blocking=True)
                self._count(waiting.nbytes)
        self._holds[slot] = index

    @contextmanager
    def _beside(self, slot: int) -> Iterator[None]:
        """Within the context copies go beside the computing, once that has done with the slot."""
        if self._aside is None:
            yield
            return
        self._aside.wait_event(self._used[slot])
        with torch.cuda.stream(self._aside):
            yield
        self._ready[slot].record(self._aside)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The modules that are called one after the other, in that order, none larger than a share of the network.

    What lies in no list of modules is left out.
    """
    most = bytes_of(network) // _SHARE
    return [block for root in _listed(network) for block in _apart(root, most)]


def _apart(module: nn.Module, most: int) -> list[nn.Module]:
    inner = _listed(module) if bytes_of(module) > most else []
    return [part for one in inner for part in _apart(one, most)] or [module]


def _listed(module: nn.Module) -> list[nn.Module]:
    """The elements of the module's outermost lists, in the order of their running: a UNet has it not by its names."""
    children = dict(module.named_children())
    if "resnets" in children and "attentions" in children:
        pairs = zip_longest(children.pop("resnets"), children.pop("attentions"))  # type: ignore[call-overload]
        found: list[nn.Module] = [layer for pair in pairs for layer in pair if layer is not None]
    else:
        found = []
    for name in sorted(children, key=lambda name: _UNET.get(name, 0)):
        child = children[name]
        found += child if isinstance(child, nn.ModuleList) else _listed(child)
    return found


def bytes_of(module: nn.Module) -> int:
    """Of its parameters and buffers, one that is shared counted once."""
    return sum({id(tensor): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}.values())


def _own_bytes(network: nn.Module, blocks: Iterable[nn.Module]) -> list[int]:
    """Of each of its blocks, what comes and goes with it."""
    shared = _shared(network)
    places = ((table[key] for table, key in _places(block)) for block in blocks)
    return [sum(tensor.nbytes for tensor in tensors if id(tensor) not in shared) for tensors in places]


def _shared(network: nn.Module) -> frozenset[int]:
    """Ids of the tensors that lie in several places of it. They belong to no block, and stay with the network."""
    parameters = network.named_parameters(remove_duplicate=False)
    found = Counter(id(tensor) for _, tensor in chain(parameters, network.named_buffers(remove_duplicate=False)))
    return frozenset(tensor for tensor, times in found.items() if times > 1)


def _is_plain(network: nn.Module) -> bool:
    """Whether all weights are tensors that a copy is as good as, GGUF's blocks included."""
    return {type(parameter).__name__ for parameter in network.parameters()} <= {"Parameter", "GGUFParameter"}


def _places(network: nn.Module) -> Iterator[Place]:
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            yield from ((table, key) for key, tensor in table.items() if tensor is not None)


def _like(tensor: Any, data: Tensor) -> Any:
    """`data` in the place of `tensor`: a parameter of its class and with its attributes, where that is one."""
    if not isinstance(tensor, nn.Parameter):
        return data
    made = Tensor._make_subclass(type(tensor), data)
    made.__dict__.update(tensor.__dict__)
    return made


def _pinned(table: dict[str, Any], key: str, device: torch.device) -> Tensor:
    """The tensor's numbers where the device can fetch them by itself; they lie nowhere else any more."""
    data: Tensor = table[key].data
    if device.type not in ("cpu", "mps"):
        data = data.pin_memory()
        table[key] = _like(table[key], data)
    return data


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def _views(slot: Tensor, row: Sequence[tuple[Any, str, Tensor]]) -> Iterator[Tensor]:
    """A view of the slot for each of the block's tensors, laid out as that one is."""
    start = 0
    for *_, tensor in row:
        strides = torch.empty_like(tensor, device="meta").stride()
        flat = slot[start : start + tensor.nbytes].view(tensor.dtype)
        yield flat.as_strided(tensor.shape, strides)
        start += _room(tensor)
