"""What the parts of a file make of a layer's weight W: the kinds of change, each as ΔW.

LoRA (Hu et al. 2021), LoCon and the kinds of LyCORIS (Yeh et al. 2024): LoHa, LoKr, diagonal OFT and BOFT, whole
differences; DoRA (Liu et al. 2024) on top of each. Parts are named as in `names.split`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, "Tensor"]
_DOWN, _UP = "lora_down.weight", "lora_up.weight"


def reads_weight(parts: Parts) -> bool:
    """Whether ΔW depends on what W is."""
    return "dora_scale" in parts or "oft_blocks" in parts


def factors(parts: Parts, alpha: float | None) -> tuple[Tensor, Tensor] | None:
    """down (rank, in, …) and up (out, rank, …), the scale in it, where ΔW is their product and nothing else."""
    if _DOWN not in parts or "lora_mid.weight" in parts or reads_weight(parts):
        return None
    down, up = parts[_DOWN], parts[_UP]
    return down, up * _scale(alpha, len(down))


def delta(parts: Parts, alpha: float | None, weight: Tensor) -> Tensor:
    """ΔW, of the shape of `weight`.

    Raises KeyError for a part that is missing; RuntimeError, ValueError or TypeError for shapes that misfit.
    """
    import torch

    plain: Tensor = _plain(parts, alpha, weight)
    if len(plain) != len(weight):
        raise ValueError(f"{len(plain)} outputs for {len(weight)}")
    change = plain.reshape(weight.shape)
    if (magnitude := parts.get("dora_scale")) is None:
        return change
    changed = weight + change
    by_output = len(magnitude) == len(weight)  # else by input, as the older LyCORIS has it: (1, in, …)
    axes = [axis for axis in range(weight.dim()) if axis != (0 if by_output else 1)]
    norm = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
    decomposed: Tensor = changed * (magnitude.reshape(norm.shape) / norm.clamp(min=1e-12))
    return decomposed - weight


def bias(parts: Parts) -> Tensor | None:
    """Δb (out,)"""
    return next((parts[name] for name in ("diff_b", "b_norm", "lora_up.bias") if name in parts), None)


def _plain(parts: Parts, alpha: float | None, weight: Tensor) -> Tensor:
    import torch

    if "hada_w1_a" in parts:
        one, other = (_product(parts, f"hada_w{number}", f"hada_t{number}") for number in "12")
        return one * other * _scale(alpha, parts["hada_w1_b"].shape[0])
    if any(part.startswith("lokr_") for part in parts):
        one, other = (
            parts[f"lokr_w{number}"]
            if f"lokr_w{number}" in parts
            else _product(parts, f"lokr_w{number}", f"lokr_t{number}")
            for number in "12"
        )
        ranks = [parts[f"lokr_w{number}_b"].shape[0] for number in "12" if f"lokr_w{number}_b" in parts]
        one = one.reshape(*one.shape, *[1] * (other.dim() - one.dim()))
        return torch.kron(one, other) * (_scale(alpha, ranks[-1]) if ranks else 1.0)
    if "oft_blocks" in parts:
        return _rotated(parts["oft_blocks"], alpha or 0.0, weight) * parts.get("rescale", 1.0) - weight
    for part in ("diff", "w_norm"):
        if part in parts:
            return parts[part]
    if _DOWN not in parts and (alone := bias(parts)) is not None:
        return alone.new_zeros(weight.shape)
    down, up = parts[_DOWN], parts[_UP]
    if (middle := parts.get("lora_mid.weight")) is not None:  # (rank, rank, height, width)
        product = torch.einsum("oi,ij...,jn->on...", up.flatten(1), middle, down.flatten(1))
    else:
        product = up.flatten(1) @ down.flatten(1)
    return product * _scale(alpha, len(down))


def _product(parts: Parts, name: str, tucker: str = "") -> Tensor:
    """a @ b, or with a core tensor (rank, rank, height, width) between them."""
    import torch

    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    if tucker in parts:
        return torch.einsum("ij...,jr,ip->pr...", parts[tucker], second, first).contiguous()
    return first @ second


def _rotated(blocks: Tensor, constraint: float, weight: Tensor) -> Tensor:
    """Output channels, turned block by block: (blocks, size, size) once, (times, blocks, size, size) as a butterfly."""
    import torch

    skewed = blocks - blocks.transpose(-1, -2)
    if constraint > 0:
        longest = constraint * len(weight)
        skewed = skewed * (longest / (torch.linalg.vector_norm(skewed) + 1e-8)).clamp(max=1.0)
    identity = torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype)
    rotations = (identity + skewed) @ torch.linalg.inv(identity - skewed)  # Cayley's
    if blocks.dim() == 3:
        rows = weight.reshape(*blocks.shape[:2], *weight.shape[1:])
        return torch.einsum("knm,kn...->km...", rotations, rows).reshape(weight.shape)
    half, columns = blocks.shape[-1] // 2, weight.shape[1:]
    for level, rotation in enumerate(rotations):
        stride = 2**level * half
        rows = weight.reshape(-1, 2, stride, *columns).transpose(1, 2).reshape(-1, 2 * half, *columns)
        turned = torch.einsum("bij,bj...->bi...", rotation, rows)
        weight = turned.reshape(-1, stride, 2, *columns).transpose(1, 2).reshape(-1, *columns)
    return weight


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank
