"""A simulated accelerator: tensors with shape, data type, storage and place, but no data. CPU tensors stay real.

What it tells, at any size and within seconds:

* tensors of two devices in one operation, as CUDA refuses them (a number, that is a CPU tensor of no dimension, may go
  with any), an index on the wrong side, a generator of the wrong device, networks and inputs of unequal precision;
* where the host waits, by the line of our code or of a library's that made it: a value read (`item`, `tolist`,
  `bool`), a copy from the device, a copy to it out of ordinary memory, a result whose shape depends on values;
* launches: operations that write, each at least one kernel;
* bytes: live storages and their peak. Attention is one operation that keeps no matrix of scores.

What it cannot tell: time; values, so no picture (tensors of up to SMALL numbers carry a CPU copy, so that schedulers
compute and masks have their shape; what is read from larger ones is asked of `script`); the workspaces of kernels and
the allocator's rounding and fragments; several kernels behind one operation, or one behind several (compilation);
whether a kernel exists for a type on a certain GPU; overlap between a copy and computing.

It stands on PyTorch's PrivateUse1 device with guards written in Python (`torch.utils.backend_registration`, made for
this), a tensor subclass, the meta device, which knows the shapes of all operations' results, and a dispatch mode.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
from diffusers.utils.torch_utils import TorchDeviceBackend
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .operation import Made, learn, on_meta
from .tensor import (
    INDEXING,
    NAME,
    SMALL,
    Block,
    DeviceTensor,
    Form,
    check_places,
    format_of,
    hollow,
    key_of,
    known_values,
    make_subclass,
    place_of_wait,
    tensors_of,
    written_by,
)

Script = Callable[[torch.Size], float | Tensor]
"""What is read from a tensor of that shape whose values are not known: a number, or a tensor of that shape."""

_OF_ONE_TYPE = {"mm", "addmm", "bmm", "baddbmm", "convolution", "native_group_norm", "native_layer_norm"}
_READS = {"_local_scalar_dense", "is_nonzero", "equal", "_linalg_check_errors"}


@dataclass(slots=True)
class Counts:
    """What happened on the device while this was being counted. waits: by `kind file:line`. peak: bytes."""

    waits: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    peak: int = 0


class _Backend(backend_registration._DummyBackendModule):  # type: ignore[no-untyped-call]
    """There only within an Accelerator's context, so that nobody else's code takes it for a device of the machine."""

    def is_available(self) -> bool:
        return Accelerator.current is not None

    def empty_cache(self) -> None:
        pass


class _Hooks(backend_registration._DummyPrivateUse1Hook):  # type: ignore[no-untyped-call]
    def is_available(self) -> bool:
        return Accelerator.current is not None


@functools.cache
def _register() -> None:
    """Once a process: PyTorch's one spare device cannot be renamed back."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend(), _Hooks())  # type: ignore[no-untyped-call]


class Accelerator:
    """The device. Within its context `torch.device(NAME)` is there; its tensors live on between contexts.

    live: bytes of the storages that are alive. script: see Script; it may be exchanged at any time.
    """

    current: Accelerator | None = None
    _made: ClassVar[dict[Any, Made]] = {}  # by operation and the forms of its arguments: the meta device is slow

    def __init__(self, script: Script = lambda shape: 0.01) -> None:
        self.script = script
        self.live = 0
        self._counting: list[Counts] = []
        self._pinned: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._stack = ExitStack()

    def __enter__(self) -> Accelerator:
        if Accelerator.current is not None:
            raise RuntimeError("there is one simulated device at a time")
        _register()
        with ExitStack() as stack:
            future = torch.__future__
            stack.callback(future.set_overwrite_module_params_on_conversion, False)
            future.set_overwrite_module_params_on_conversion(True)  # a module's parameters are exchanged, not rewritten
            stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=): its copy to the device is to be seen
            stack.callback(setattr, Accelerator, "current", None)
            Accelerator.current = self
            stack.enter_context(_Dispatch(self))
            stack.enter_context(_Functions(self))
            stack.enter_context(patch.object(nn.Module, "_apply", _apply))
            stack.enter_context(patch.object(torch, "Generator", _Generator))
            stack.enter_context(patch.object(Tensor, "_make_subclass", make_subclass))
            stack.enter_context(patch.object(TorchDeviceBackend, "_detect_device_type", lambda *_: NAME))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        counts = Counts(peak=self.live)
        self._counting.append(counts)
        try:
            yield counts
        finally:
            self._counting = [one for one in self._counting if one is not counts]

    def wait(self, kind: str) -> None:
        if self._counting:
            place = f"{kind} {place_of_wait()}"
            for counts in self._counting:
                counts.waits[place] += 1

    def launch(self) -> None:
        for counts in self._counting:
            counts.launches += 1

    def new(self, like: Tensor, values: Tensor | None) -> DeviceTensor:
        """A tensor in a storage of its own, laid out as one on the meta device."""
        form = Form.of(like)
        return DeviceTensor(form, Block(self, like.untyped_storage().nbytes()), values if form.small else None)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation: `func` on arguments of which some are on the device, or with a result there."""
        tensors: list[Tensor] = []
        key = (func, key_of(args, tensors), tuple([(name, key_of(one, tensors)) for name, one in kwargs.items()]))
        made = self._made.get(key)
        if made is None:
            return self._first(func, args, kwargs, key, tensors)
        return self._again(made, func, args, kwargs, tensors)  # type: ignore[arg-type]

    def _first(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any, tensors: list[Tensor]) -> Any:
        """An operation that was not seen yet, or is of those that are looked at each time."""
        ours = [one for one in tensors if isinstance(one, DeviceTensor)]
        target = kwargs.get("device")
        made_here = target is not None and torch.device(target).type == NAME
        name = func._schema.name.removeprefix("aten::")
        if name in ("_pin_memory", "is_pinned"):
            return self._pin(name, args[0])
        if tensors and not made_here and all(one.is_meta for one in tensors):
            return on_meta(func, args, kwargs, key, tensors)
        if not ours and not made_here:
            if name in _OF_ONE_TYPE and any(one.numel() > SMALL and not any(one.stride()) for one in tensors):
                raise RuntimeError(f"{name} on the CPU, with weights that only wait there")
            return func(*args, **kwargs)
        if name in _READS:
            check_places(func, tensors)
            self.wait("read")
            if name == "equal":  # what nobody knows counts as equal
                return any(one.values is None for one in ours) or func(*(one.values for one in ours))
            return func(self._read(ours[0]), *args[1:], **kwargs)
        if name in ("_to_copy", "copy_") and (moved := self._moved(name, args, kwargs, made_here)) is not None:
            return moved
        check_places(func, tensors)
        if name in _OF_ONE_TYPE and len(types := {one.dtype for one in tensors}) > 1:
            raise RuntimeError(f"{name}: expected one data type, found {', '.join(sorted(map(str, types)))}")
        if name in INDEXING:
            args = (args[0], [each for one in args[1] for each in self._index(one, name, args[2:])], *args[2:])
            tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
            ours = [one for one in tensors if isinstance(one, DeviceTensor)]
        elif name in ("nonzero", "masked_select", "_unique2", "unique_dim"):
            self.wait("shape")
            results = func(*tree_map(known_values, args), **kwargs)
            return tree_map(lambda one: self.new(torch.empty_like(one, device="meta"), one), results)
        made = learn(func, name, args, kwargs, ours, made_here)
        if name not in INDEXING and len(ours) == len(tensors) and len(set(map(id, ours))) == len(ours):
            self._made[key] = made
        return self._again(made, func, args, kwargs, ours)

    def _again(self, made: Made, func: Any, args: Any, kwargs: Any, ours: list[DeviceTensor]) -> Any:
        if made.launches:
            self.launch()
        values: Any = None
        if made.computes and all(one.values is not None for one in ours):
            on_cpu = {**kwargs, "device": "cpu"} if made.made_here else kwargs
            real_args, real_kwargs = tree_map(
                lambda one: one.values if isinstance(one, DeviceTensor) else one, (args, on_cpu)
            )
            values = func(*real_args, **real_kwargs)
        elif made.changes:
            for one in written_by(func, args, kwargs):
                one.block.known = False
        results = []
        for number, result in enumerate(made.results):
            if result is None:
                results.append(None)
            elif result.same:
                results.append(ours[result.block])
            else:
                block = Block(self, result.bytes) if result.block is None else ours[result.block].block
                value = None if values is None else values if made.kind is None else values[number]
                results.append(DeviceTensor(result.form, block, value if result.form.small else None))
        return results[0] if made.kind is None else made.kind(results)

    def _moved(self, name: str, args: Any, kwargs: Any, made_here: bool) -> Tensor | None:
        """A copy between the device and the host; None if it is none."""
        if name == "copy_":
            target, source = args[:2]
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if isinstance(target, DeviceTensor) == isinstance(source, DeviceTensor):
                return None
            if isinstance(target, DeviceTensor):
                self._upload(source, non_blocking)
                target.block.known = target.block.known and target.values is not None
                if target.values is not None:
                    target.values.copy_(source)
                return target
            self.wait("from device")
            return target.copy_(self._read(source))
        source, device, dtype = args[0], kwargs.get("device"), kwargs.get("dtype") or args[0].dtype
        if not isinstance(source, DeviceTensor):
            self._upload(source, kwargs.get("non_blocking", False))
            like = torch.empty_like(source, device="meta", dtype=dtype, memory_format=format_of(kwargs))
            return self.new(like, source.to(dtype, copy=True) if source.numel() <= SMALL else None)
        if made_here or device is None:
            return None
        if torch.device(device).type == "meta":
            return torch.empty_like(source.twin(), dtype=dtype)
        self.wait("from device")
        if isinstance(source, nn.Parameter):  # weights that are put aside: nobody reads them there
            return hollow(source.shape, dtype)
        return self._read(source).to(dtype, copy=True)

    def _upload(self, source: Tensor, non_blocking: bool) -> None:
        if source.is_meta:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        self.launch()
        if not (non_blocking and id(source) in self._pinned):  # else the driver waits for the stream
            self.wait("to device")

    def _pin(self, name: str, tensor: Tensor) -> Any:
        if name == "is_pinned":
            return id(tensor) in self._pinned
        waits_only = tensor.numel() > SMALL and not any(tensor.stride())
        copy = hollow(tensor.shape, tensor.dtype) if waits_only else tensor.clone()
        self._pinned[id(copy)] = copy
        return copy

    def _read(self, tensor: DeviceTensor) -> Tensor:
        """On the CPU: the values that are known, or what the script says."""
        if tensor.values is not None:
            return tensor.values
        said = self.script(tensor.shape)
        return torch.as_tensor(said).to(tensor.dtype).expand(tensor.shape).contiguous()

    def _index(self, index: Any, name: str, rest: tuple[Any, ...]) -> list[Any]:
        """An index as positions on the device, a mask as those of each of its dimensions."""
        if not isinstance(index, Tensor):
            return [index]
        if index.dtype in (torch.bool, torch.uint8):
            if name.startswith("index_put") and rest and rest[0].numel() == 1:
                return [index]  # a fill under a mask
            self.wait("shape")
            found = known_values(index).nonzero(as_tuple=True)
            return [self.new(torch.empty_like(positions, device="meta"), positions) for positions in found]
        if not isinstance(index, DeviceTensor):
            self._upload(index, False)
            return [self.new(torch.empty_like(index, device="meta"), index)]
        return [index]


_apply_to_each = nn.Module._apply


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`; a parameter that modules share is exchanged once, for one that they share."""
    first: dict[int, tuple[Any, str]] = {}
    further: list[tuple[Any, str, Any, str]] = []
    for part in module.modules():
        table: Any = part._parameters
        for key, parameter in table.items():
            if id(parameter) in first:
                further.append((table, key, *first[id(parameter)]))
            elif parameter is not None:
                first[id(parameter)] = (table, key)
    for table, key, *_ in further:
        table[key] = None
    try:
        return _apply_to_each(module, function, recurse)
    finally:
        for table, key, origin, name in further:
            table[key] = origin[name]


class _Dispatch(TorchDispatchMode):
    def __init__(self, device: Accelerator) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.run(func, args, kwargs or {})


class _Generator(torch.Generator):
    """PyTorch's own cannot be made for a device without a backend in C++."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)

    def __init__(self, device: Any = "cpu") -> None:
        self.place = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.place


class _Functions(TorchFunctionMode):
    """Attention as the fused kernels of a GPU do it: no scores are kept, the heads of a token lie side by side in the
    result. And a look at generators, of which a dispatch mode sees copies."""

    def __init__(self, device: Accelerator) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if given["query"].device.type == NAME:
                return self._attention(*(given.get(name) for name in names))
        if (generator := kwargs.get("generator")) is not None:
            place = kwargs.get("device") or (args[0].device if args and isinstance(args[0], Tensor) else "cpu")
            if torch.device(place).type != generator.device.type:
                raise RuntimeError(f"Expected a {place} generator but found one of {generator.device}")
        if func is Tensor.pin_memory:  # of a class of its own, it is made anew around what the dispatch mode pinned
            copy = func(*args, **kwargs)
            self._device._pinned[id(copy)] = copy
            return copy
        return func(*args, **kwargs)

    def _attention(self, query: Any, key: Any, value: Any, mask: Any) -> Tensor:
        operands = [one for one in (query, key, value, mask) if one is not None]
        check_places(torch.ops.aten.add.Tensor, operands)
        if not query.dtype == key.dtype == value.dtype:
            raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
        *batch, heads, tokens, _ = query.shape
        like = torch.empty((*batch, tokens, heads, value.shape[-1]), dtype=query.dtype, device="meta")
        self._device.launch()
        return self._device.new(like, None).transpose(-3, -2)
