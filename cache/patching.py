"""Scoped changes of a module that restore it exactly.

Python looks into an instance's `__dict__` before `torch.nn.Module` looks among its registered children. An entry put
there shadows a method or a child for whoever runs the module, while `parameters()`, `state_dict()`, LoRA scaling and
offload hooks still see the registered network, and taking the entry away leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
