"""From main memory to a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host goes on at once.

    Out of ordinary memory the driver lets the host wait until all that is queued on the device has been done. Pinned
    memory it reads by itself, and PyTorch keeps it until then. Only for a tensor on the CPU that nobody writes to.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu" or device.type in ("cpu", "meta", "mps"):  # Apple's GPUs share the memory
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def uploading(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`forward` for arguments of which some lie on the CPU."""

    def placed(value: Any) -> Any:
        return upload(value, device) if isinstance(value, Tensor) else value

    @wraps(forward)  # pipelines read the signature
    def uploaded(*args: Any, **kwargs: Any) -> Any:
        return forward(*map(placed, args), **{name: placed(value) for name, value in kwargs.items()})

    return uploaded
