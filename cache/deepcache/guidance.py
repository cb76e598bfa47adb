"""Guidance in calls that reuse: the conditional half runs, the unconditional one follows from a kept difference.

Classifier-free guidance (Ho and Salimans 2022) calls a denoiser with every picture twice, without its text and with
it, and steers by the difference of the two predictions. That difference moves less from call to call than either of
them. FasterCache (Lv et al. 2024, arXiv:2410.19355) reuses it in video transformers; here it is forecast.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cache.views.base import Call


def conditional(call: Call, batch: int) -> Call:
    """`call` with the second half of every argument that has `batch` rows."""
    return replace(call, args=second_half(call.args, batch), kwargs=second_half(call.kwargs, batch))


def difference(prediction: Tensor) -> Tensor:
    """Of a guided prediction (2 B, …), what the text changes (B, …)."""
    without, with_text = prediction.detach().chunk(2)
    return with_text - without


def both(with_text: Tensor, difference: Tensor) -> Tensor:
    """The guided prediction (2 B, …) whose second half and difference these are (B, …)."""
    return torch.cat([with_text - difference, with_text])


def second_half(value: Any, batch: int) -> Any:
    """The second half of whatever in `value` has `batch` rows."""
    match value:
        case Tensor() if value.dim() > 0 and value.shape[0] == batch:
            return value[batch // 2 :]
        case tuple() | list():
            return type(value)(second_half(item, batch) for item in value)
        case dict():
            return {name: second_half(item, batch) for name, item in value.items()}
    return value
