"""Floating-point operations: what a reuse call costs, and the rule that turns a depth into a branch.

Operations are counted on a copy of the network without weights (meta device), once for each network; matrix products
and convolutions count, as in every published figure. The batch cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .strategy import IncompatibleDenoiser

if TYPE_CHECKING:
    from .denoiser import TransformerDenoiser, UNetDenoiser
    from .patching import Call

TEXT_TOKENS = 77  # CLIP's context length, at which SD1.5 to SDXL are counted

# What was counted, by network and size: counting takes some tenths of a second and its result never changes.
_BRANCH_COSTS: WeakKeyDictionary[nn.Module, dict[tuple[int, int], tuple[float, ...]]] = WeakKeyDictionary()
_FIRST_BLOCK_COSTS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
# And of UNets by class, size and configuration, which is all that the skeleton is built from: a model that is loaded
# again is not counted again.
_OPERATIONS: dict[tuple[Any, ...], dict[str, int]] = {}
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


def count(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Operations of one call by module path ("" for the whole). `args` and `kwargs` hold tensors on the meta device.

    Raises Uncountable.
    """
    kind: Any = type(root)
    if not hasattr(kind, "from_config"):
        raise Uncountable(
            f"{kind.__name__} cannot be built from its config, so that its operations cannot be counted: "
            "derive it from diffusers' ModelMixin and ConfigMixin."
        )
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


def branch_costs(unet: UNetDenoiser) -> tuple[float, ...]:
    """For each branch, the operations of its pass by those of a full call, at the view's native size."""
    size = unet.native_size or _sample_size(unet.root)
    costs = _BRANCH_COSTS.setdefault(unet.root, {})
    if size not in costs:
        costs[size] = _count_branches(unet, size)
    return costs[size]


def _count_branches(unet: UNetDenoiser, size: tuple[int, int]) -> tuple[float, ...]:
    config: Any = unet.root.config
    settings = sorted((name, repr(value)) for name, value in config.items() if not name.startswith("_"))
    key = (type(unet.root), size, *settings)
    if key not in _OPERATIONS:
        if len(_OPERATIONS) == _REMEMBERED:
            _OPERATIONS.clear()
        _OPERATIONS[key] = count(unet.root, (), _unet_inputs(unet, size))
    operations = _OPERATIONS[key]

    def of(paths: Sequence[str]) -> int:
        return sum(operations.get(path, 0) for path in paths)

    total = operations[""]
    n = len(unet.up_layers)
    ratios = []
    for branch in range(unet.branches):
        skipped = [*unet.down_entries[branch + 1 :], *unet.up_layers[: n - 1 - branch], ("mid_block",)]
        ratios.append(1 - sum(of(paths) for paths in skipped) / total)
    return tuple(ratios)


def _sample_size(root: nn.Module) -> tuple[int, int]:
    size: Any = getattr(root.config, "sample_size", None)
    if size is None:
        raise IncompatibleDenoiser(
            f"This {type(root).__name__}'s config names no sample_size: give the view its native_size."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _unet_inputs(unet: UNetDenoiser, size: tuple[int, int]) -> dict[str, Any]:
    """One call's arguments on the meta device, as the UNet's config describes them."""
    config: Any = unet.root.config

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs: dict[str, Any] = {"sample": tensor(1, config.in_channels, *size), "timestep": tensor(1)}
    if config.get("cross_attention_dim") is not None:
        dim = config.get("encoder_hid_dim") or config.cross_attention_dim
        inputs["encoder_hidden_states"] = tensor(1, TEXT_TOKENS, dim if isinstance(dim, int) else max(dim))
    if config.get("class_embed_type") in ("projection", "simple_projection"):
        inputs["class_labels"] = tensor(1, config.projection_class_embeddings_input_dim)
    elif config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        inputs["class_labels"] = tensor(1, dtype=torch.long)
    match config.get("addition_embed_type"):
        case None | "text":
            pass
        case "text_time":  # SDXL: a pooled text embedding and six sizes
            time_ids = 6
            text = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": tensor(1, text), "time_ids": tensor(1, time_ids)}
        case other:
            raise IncompatibleDenoiser(
                f"A UNet with addition_embed_type {other!r} is not supported: use text_time or none."
            )
    return inputs


def on_meta(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `call` without their data, to be counted later without holding on to them."""

    def empty(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype  # that of a copy without weights
        return torch.empty(tensor.shape, dtype=dtype, device="meta")

    args, kwargs = tree_map_only(Tensor, empty, (tuple(call.args), dict(call.kwargs)))
    return args, kwargs


def first_block_cost(transformer: TransformerDenoiser, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Operations of a call that skips all blocks but the first, by those of the full one, for arguments `on_meta`.

    Counted once for each network: the share hardly depends on the size, and the first run's decides.
    """
    if transformer.root not in _FIRST_BLOCK_COSTS:
        operations = count(transformer.root, args, kwargs)
        blocks = [
            f"{name}.{i}"
            for name, blocks in zip(transformer.block_lists, transformer.blocks, strict=True)
            for i in range(len(blocks))
        ]
        skipped = sum(operations.get(path, 0) for path in blocks[1:])
        _FIRST_BLOCK_COSTS[transformer.root] = 1 - skipped / operations[""]
    return _FIRST_BLOCK_COSTS[transformer.root]
