"""What operations do to arguments of certain forms: found once on the meta device, whose kernels are slow."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tensor import DeviceTensor, Form

_MADE_WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
_RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "normal", "normal_", "uniform_", "bernoulli"}
_CHANGES_SHAPE = {"resize_", "set_", "transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_"}
_ON_META: dict[Any, tuple[Any, list[tuple[Any, ...]]]] = {}  # by operation and forms: how its results lie


class Result(NamedTuple):
    """A tensor that an operation answers with. block: whose storage it lies in, by the number of that argument among
    those on the device; None: in one of its own, of so many bytes. same: it is that argument."""

    form: Form
    block: int | None
    same: bool
    bytes: int


class Made(NamedTuple):
    """What an operation does to arguments of certain forms. kind: of what its results stand in; None: there is one.

    computes: values, if those of all arguments are known.
    """

    results: list[Result | None]
    kind: type | None
    launches: bool
    changes: bool
    computes: bool
    made_here: bool


def learn(func: Any, name: str, args: Any, kwargs: Any, ours: list[DeviceTensor], made_here: bool) -> Made:
    """What the operation does, found on the meta device."""
    changes = func._schema.is_mutable
    if changes and name in _CHANGES_SHAPE:
        raise NotImplementedError(f"{name} would change the shape of a tensor of the simulated device")
    twins: dict[int, Tensor] = {}
    on_meta = {**kwargs, "device": "meta"} if made_here else kwargs
    out = func(*with_twins(args, twins), **{name: with_twins(one, twins) for name, one in on_meta.items()})
    same = {id(twins[id(one)]): number for number, one in reversed([*enumerate(ours)])}
    held = {one.block.storage._cdata: number for number, one in reversed([*enumerate(ours)])}
    results: list[Result | None] = []
    for one in out if isinstance(out, tuple | list) else [out]:
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            number = held.get(storage._cdata)
            results.append(Result(Form.of(one), number, id(one) in same, storage.nbytes()))
        else:
            results.append(None)
    found = [one for one in results if one is not None]
    new = any(one.block is None for one in found)
    return Made(
        results=results,
        kind=type(out) if isinstance(out, tuple | list) else None,
        launches=name not in _MADE_WITHOUT_KERNEL and (changes or new),
        changes=changes,
        computes=name not in _RANDOM and (changes or all(one.form.small for one in found)),
        made_here=made_here,
    )


def with_twins(one: Any, twins: dict[int, Tensor]) -> Any:
    """An operation's arguments on the meta device. twins: by the tensors' ids."""
    if isinstance(one, DeviceTensor):
        return twins.setdefault(id(one), one.twin())
    if isinstance(one, tuple | list):
        return type(one)([with_twins(part, twins) for part in one])
    return one.to("meta") if isinstance(one, Tensor) and one.dim() else one


def on_meta(func: Any, args: Any, kwargs: Any, key: Any, tensors: list[Tensor]) -> Any:
    """The server counts there, at full size: those operations are remembered too."""
    if (known := _ON_META.get(key)) is not None:
        kind, laid = known
        made = [torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype in laid]
        return made[0] if kind is None else kind(made)
    out = func(*args, **kwargs)
    results = out if isinstance(out, tuple | list) else [out]
    held = {one.untyped_storage()._cdata for one in tensors}
    if not func._schema.is_mutable and all(
        isinstance(one, Tensor) and one.untyped_storage()._cdata not in held for one in results
    ):
        kind = None if isinstance(out, Tensor) else type(out)
        _ON_META[key] = kind, [(one.shape, one.stride(), one.dtype) for one in results]
    return out
