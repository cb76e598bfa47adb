"""NaN and infinities: seen where a network hands on, and traced to what made them, before they are a black picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


class NotFinite(ModelError):
    """A network answered with numbers that are not finite. The message names it, and what holds them."""


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Waits for the device, once a tensor."""
    wide = (tensor.float() if tensor.element_size() == 1 else tensor for tensor in tensors)  # fp8 cannot be asked
    return all(bool(tensor.isfinite().all()) for tensor in wide)


def check(tensors: Iterable[Tensor], result: str, pipeline: Any, parts: Iterable[str]) -> None:
    """Raise NotFinite unless all of `tensors` are finite.

    result: what they are, for the message. parts: the pipeline's networks that made them.
    """
    if is_finite(tensors):
        return
    networks = {part: network for part in parts if (network := getattr(pipeline, part, None)) is not None}
    named = " and ".join(networks)
    for part, network in networks.items():
        for path, weights in _weights(network):
            if not is_finite([weights]):
                raise NotFinite(
                    f"{result} not finite: the {part} holds weights that are not ({path}). "
                    "Take another file of the model, or leave the embeddings out."
                )
    dtypes = {str(network.dtype).removeprefix("torch.") for network in networks.values()}
    remedy = " or ".join(sorted({"bfloat16", "float32"} - dtypes)) if "float16" in dtypes else "float32"
    raise NotFinite(
        f"{result} not finite, though the weights of {named} are: they overflowed in {' and '.join(sorted(dtypes))}. "
        f"Set the model's dtype to {remedy}, or lower the weights of prompt and LoRAs."
    )


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that hold numbers here: offloaded ones lie on the meta device."""
    for tensors in (network.named_parameters(), network.named_buffers()):
        yield from ((path, tensor) for path, tensor in tensors if tensor.is_floating_point() and not tensor.is_meta)
