"""A tensor of the simulated device, its storage, and what may go together with it in one operation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

NAME = "simulated"
SMALL = 4096  # numbers: tensors up to that many have values
ROOT = str(Path(__file__).resolve().parents[2])  # whose own name is no place
PLACES = ("/cache/", "/models/", "/diffusers/", "/transformers/", "/torchsde/", "/accelerate/")
"""Folders whose lines a wait is charged to: the innermost one of them on the stack."""

aten = torch.ops.aten
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}


class DeviceTensor(Tensor):
    """twin: on the meta device, of the same shape and strides. values: on the CPU, if known."""

    twin: Tensor
    block: Block
    _values: Tensor | None

    @staticmethod
    def __new__(cls, twin: Tensor, block: Any = None, values: Any = None, *, requires_grad: bool = False) -> Any:
        if block is None:  # accelerate makes a parameter anew by the class of the one that was there
            return nn.Parameter(twin, requires_grad=requires_grad)
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            twin.shape,
            strides=twin.stride(),
            storage_offset=twin.storage_offset(),
            dtype=twin.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, twin: Tensor, block: Any = None, values: Any = None, *, requires_grad: bool = False) -> None:
        if block is not None:
            self.twin, self.block, self._values = twin, block, values

    @property
    def values(self) -> Tensor | None:
        return self._values if self.block.known else None

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

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

    def __init__(self, device: Any, storage: Any) -> None:
        self.device, self.storage, self.key = device, storage, storage._cdata
        self.bytes, self.known = storage.nbytes(), True
        device.live += self.bytes
        for counts in device._counting:
            counts.peak = max(counts.peak, device.live)

    def __del__(self) -> None:
        self.device.live -= self.bytes


def known_values(one: Any) -> Any:
    if isinstance(one, DeviceTensor):
        if one.values is None:
            raise NotImplementedError("the result's shape depends on values that the simulated device does not have")
        return one.values
    return one


def twin_of(one: Any) -> Any:
    if isinstance(one, DeviceTensor):
        return one.twin
    if isinstance(one, tuple | list):
        return type(one)(map(twin_of, one))
    return one.to("meta") if isinstance(one, Tensor) and one.dim() else one


def key_of(one: Any) -> Any:
    """What the shape and type of an operation's results follow from."""
    if isinstance(one, Tensor):
        return (one.shape, one.stride(), one.dtype, one.device.type)
    return tuple(map(key_of, one)) if isinstance(one, tuple | list) else (type(one), one)  # 1, 1.0 and True are equal


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
