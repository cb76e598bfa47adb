"""Floating-point operations: of a network's parts, and what follows from them for a depth or an interval.

Operations are counted on a copy of the network without weights (meta device); matrix products and convolutions count,
as in every published figure.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .errors import IncompatibleDenoiser

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""A call's positional and keyword arguments, on the meta device."""
_OPERATIONS: dict[tuple[Any, ...], dict[str, int]] = {}  # as counted: it takes some tenths of a second
_REMEMBERED = 64  # configurations


class Uncountable(IncompatibleDenoiser):
    """A network's operations cannot be counted: it cannot be built anew, or does not run, without weights."""


def deepest_branch(costs: Sequence[float], depth: int) -> int | None:
    """The deepest branch whose pass costs at most 1 / (depth + 2) of a full call; None if none is that cheap.

    A deeper branch recomputes more and errs less, so that the depth bounds the cost and quality takes the rest.
    """
    affordable = [branch for branch, cost in enumerate(costs) if cost <= 1 / (depth + 2)]
    return max(affordable, default=None)


def interval_speedup(interval: int, reuse_cost: float) -> float:
    """Operations of `interval` full calls by those of one full and `interval` - 1 reuse calls."""
    return interval / (1 + (interval - 1) * reuse_cost)


def _buildable(root: Any) -> Any:
    """The network's class, if a copy without weights can be made of it. Raises Uncountable."""
    kind = type(root)
    if not hasattr(kind, "from_config"):
        raise Uncountable(
            f"{kind.__name__} cannot be built from its config, so that its operations cannot be counted: "
            "derive it from diffusers' ModelMixin and ConfigMixin."
        )
    return kind


def count(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Operations of one call by module path ("" for the whole). `args` and `kwargs` hold tensors on the meta device.

    Raises Uncountable.
    """
    kind = _buildable(root)
    counter = FlopCounterMode(display=False)
    try:
        with torch.device("meta"):
            skeleton = kind.from_config(root.config).eval()
        with torch.no_grad(), counter:
            skeleton(*args, **kwargs)
    except Exception as error:  # a network that needs its data may fail in any way without them
        raise Uncountable(
            f"{kind.__name__} does not run without weights, so that its operations cannot be counted: {error!r}."
        ) from error
    counted = {
        path.removeprefix(kind.__name__).removeprefix("."): sum(operations.values())
        for path, operations in counter.get_flop_counts().items()
        if path != "Global"
    }
    if not counted.get(""):
        raise Uncountable(f"{kind.__name__} multiplies no matrices of which operations could be counted.")
    return counted


def count_once(root: Any, size: Hashable, inputs: Callable[[], Call]) -> dict[str, int]:
    """`count` of a network's class, configuration and size with the arguments `inputs`, remembered.

    Those are all that the copy is built from, so that a network that is loaded again is not counted again. size: None
    where the first call's decides for all.
    """
    kind, config = _buildable(root), root.config
    settings = sorted((name, repr(value)) for name, value in config.items() if not name.startswith("_"))
    key = (kind, size, *settings)
    if key not in _OPERATIONS:
        if len(_OPERATIONS) == _REMEMBERED:
            _OPERATIONS.clear()
        _OPERATIONS[key] = count(root, *inputs())
    return _OPERATIONS[key]


def on_meta(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments without their data, to be counted later without holding on to them."""

    def empty(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype  # that of a copy without weights
        return torch.empty(tensor.shape, dtype=dtype, device="meta")

    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, empty, (args, dict(kwargs)))
    return found
