"""A tensor of the simulated device, its storage, and what may go together with it in one operation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.quantizers.gguf.utils import GGUFParameter
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

NAME = "simulated"
PLACE = f"{NAME}:0"
SMALL = 4096  # numbers: tensors up to that many have values
ROOT = str(Path(__file__).resolve().parents[2])  # whose own name is no place
PLACES = ("/cache/", "/models/", "/diffusers/", "/transformers/", "/torchsde/", "/accelerate/")
"""Folders whose lines a wait is charged to: the innermost one of them on the stack."""

aten = torch.ops.aten
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}


class Form:
    """How a tensor lies in its storage. strides, offset: in numbers. There is one of each, so that it can be a key."""

    __slots__ = ("dtype", "offset", "shape", "small", "strides")
    _known: ClassVar[dict[Any, Form]] = {}

    def __init__(self, shape: torch.Size, strides: tuple[int, ...], offset: int, dtype: torch.dtype) -> None:
        self.shape, self.strides, self.offset, self.dtype = shape, strides, offset, dtype
        self.small = shape.numel() <= SMALL

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        told = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        found = cls._known.get(told)
        if found is None:
            found = cls._known[told] = cls(*told)
        return found


class DeviceTensor(Tensor):
    """values: on the CPU, if known.

    What a kind of parameter says of itself, as GGUF's, are attributes here: there is no other class on the device.
    """

    __slots__ = ("_values", "block", "form")
    form: Form
    block: Block
    _values: Tensor | None
    as_tensor = GGUFParameter.as_tensor

    @staticmethod
    def __new__(cls, form: Any, block: Any = None, values: Any = None, *, requires_grad: bool = False) -> Any:
        if block is None:  # accelerate makes a parameter anew by the class of the one that was there
            return nn.Parameter(form, requires_grad=requires_grad)
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, form.shape, strides=form.strides, storage_offset=form.offset, dtype=form.dtype, device=PLACE
        )

    def __init__(self, form: Any, block: Any = None, values: Any = None, *, requires_grad: bool = False) -> None:
        if block is not None:
            self.form, self.block, self._values = form, block, values

    @property
    def values(self) -> Tensor | None:
        return self._values if self.block.known else None

    def twin(self) -> Tensor:
        """On the meta device, where PyTorch knows the shapes of all operations' results."""
        form = self.form
        empty = torch.empty(0, dtype=form.dtype, device="meta")
        return empty.set_(self.block.storage, form.offset, form.shape, form.strides)  # type: ignore[call-overload]

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def detach(self) -> DeviceTensor:
        made: Any = super().detach()
        vars(made).update((name, told) for name, told in vars(self).items() if name != "_is_param")
        return made

    def as_subclass(self, cls: Any) -> DeviceTensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = (one for one in tree_leaves((args, kwargs)) if isinstance(one, DeviceTensor))
        return next(tensors).block.device.run(func, args, kwargs or {})


class Block:
    """A storage on the device, which all tensors that view it hold. known: whether their values are."""

    __slots__ = ("_storage", "bytes", "device", "known")

    def __init__(self, device: Any, size: int) -> None:
        self.device, self.bytes, self.known = device, size, True
        self._storage: Any = None
        device.live += size
        for counts in device._counting:
            counts.peak = max(counts.peak, device.live)

    def __del__(self) -> None:
        self.device.live -= self.bytes

    @property
    def storage(self) -> Any:
        """On the meta device; made when it is asked for."""
        if self._storage is None:
            self._storage = torch.empty(self.bytes, dtype=torch.uint8, device="meta").untyped_storage()
        return self._storage


def make_subclass(cls: Any, data: Any, requires_grad: bool = False) -> Any:
    """`Tensor._make_subclass`, which PyTorch has for tensors of its own devices alone."""
    if not isinstance(data, DeviceTensor):
        return _make_subclass(nn.Parameter if cls is DeviceTensor else cls, data, requires_grad)
    made = data.detach()
    made.__dict__ = {"_is_param": issubclass(cls, nn.Parameter)}
    return made


_make_subclass = Tensor._make_subclass


def known_values(one: Any) -> Any:
    if isinstance(one, DeviceTensor):
        if one.values is None:
            raise NotImplementedError("the result's shape depends on values that the simulated device does not have")
        return one.values
    return one


def key_of(one: Any, tensors: list[Tensor]) -> Any:
    """What the form of an operation's results follows from; the tensors in it are added to the list."""
    kind = type(one)
    if kind is DeviceTensor:
        tensors.append(one)
        return one.form
    if kind is int or one is None:
        return one
    if kind is tuple or kind is list:
        return tuple([key_of(part, tensors) for part in one])
    if isinstance(one, Tensor):
        tensors.append(one)
        return (one.shape, one.stride(), one.dtype, one.device.type)
    return (kind, one)  # 1, 1.0 and True are equal


def tensors_of(arguments: Any) -> Iterator[Tensor]:
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, tuple | list):
            yield from tensors_of(one)


def format_of(kwargs: dict[str, Any]) -> torch.memory_format:
    return kwargs.get("memory_format") or torch.preserve_format


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[DeviceTensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (one for one in tree_leaves(given) if isinstance(one, DeviceTensor))


def check_places(func: Any, tensors: list[Tensor]) -> None:
    """As CUDA: all on the device, but for numbers, which must not be written to, and for indices."""
    name = func._schema.name.removeprefix("aten::")
    for number, one in enumerate(tensors):
        if isinstance(one, DeviceTensor):
            continue
        written = number == 0 and func._schema.is_mutable
        index = name in INDEXING and number > 0 and not one.dtype.is_floating_point
        if written or one.is_meta or not (one.dim() == 0 or index):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME}:0 and {one.device} in {name}: "
                f"{', '.join(str(tuple(each.shape)) for each in tensors)}"
            )


def place_of_wait() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename.removeprefix(ROOT)
        if any(place in file for place in PLACES) and "/tests/" not in file:
            start = max(file.rfind(place) for place in PLACES if place in file)
            return f"{file[start + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def hollow(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A CPU tensor of any size in the memory of one number: for weights that wait there. It cannot be written to."""
    return torch.zeros((), dtype=dtype).expand(shape)
