"""Scoped changes of a module that restore it exactly.

Python looks into an instance's `__dict__` before `torch.nn.Module` looks among its registered children. An entry put
there shadows a method or a child for whoever runs the module, while `parameters()`, `state_dict()`, LoRA scaling and
offload hooks still see the registered network, and taking the entry away leaves no trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .strategy import AlreadyAttached

Shadow = tuple[Any, str, Any]  # module, attribute, what takes its place

_ABSENT = object()


@contextmanager
def shadowed(shadows: Iterable[Shadow]) -> Iterator[None]:
    """Within the context, each module shows the given value under the given name."""
    restore: list[Shadow] = []
    try:
        for module, name, value in shadows:
            restore.append((module, name, module.__dict__.get(name, _ABSENT)))
            module.__dict__[name] = value
        yield
    finally:
        for module, name, value in reversed(restore):
            if value is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a denoiser as its caller made it.

    `pass_name` is the name of the surrounding `root.cache_context(name)`, by which diffusers pipelines tell the
    conditional pass from the unconditional one where the two run apart; None outside of one.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    pass_name: str | None

    def run(self) -> Any:
        """The root's own forward, with whatever hooks it had."""
        return self.forward(*self.args, **self.kwargs)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Shapes, dtypes and devices of all tensors, and the flags. Calls of unequal signature share nothing."""
        return (_signature(self.args), tuple(self.kwargs), _signature(self.kwargs.values()))


def answer_of(form: type[Any], prediction: torch.Tensor) -> Any:
    """A denoiser's answer of this form, a tuple or one of diffusers' outputs."""
    return (prediction,) if issubclass(form, tuple) else form(prediction)


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple([(v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else _flags(v) for v in values])


def _flags(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, tuple | list):
        return _signature(value)
    if isinstance(value, Mapping):
        return (tuple(value), _signature(value.values()))
    return None


class _Interception:
    """Stands in for `root.forward`; its presence is the mark that a cache is attached."""

    def __init__(self, forward: Callable[..., Any], handle: Callable[[Call], Any]) -> None:
        functools.update_wrapper(self, forward)  # pipelines read the signature
        self.forward = forward
        self.handle = handle
        self.pass_name: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle(Call(self.forward, args, kwargs, self.pass_name))


def _is_intercepted(forward: Any) -> bool:
    """Whether it is an interception, or something wrapped around one."""
    return isinstance(forward, _Interception) or (
        forward is not None and _is_intercepted(getattr(forward, "__wrapped__", None))
    )


@contextmanager
def intercepted(root: nn.Module, handle: Callable[[Call], Any]) -> Iterator[None]:
    """Within the context, each call of `root` is handed to `handle`, whose result is returned to the caller.

    `root.cache_context(name)` is there within the context, whether or not the module brings one.
    Raises AlreadyAttached if the root is intercepted already.
    """
    if _is_intercepted(root.__dict__.get("forward")):
        raise AlreadyAttached(
            f"A cache is already attached to this {type(root).__name__}: leave its context before attaching another, "
            "or load a second model to run two at once."
        )
    interception = _Interception(root.forward, handle)
    own_context = getattr(root, "cache_context", None)

    @contextmanager
    def cache_context(name: str, **details: Any) -> Iterator[None]:
        outer, interception.pass_name = interception.pass_name, name
        try:
            if own_context is None:
                yield
            else:
                with own_context(name, **details):
                    yield
        finally:
            interception.pass_name = outer

    with shadowed([(root, "forward", interception), (root, "cache_context", cache_context)]):
        yield
