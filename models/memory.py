"""How much a decode, or a denoising step, holds at once: the peak of live tensors, counted without computing any."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .autoencoder import channels, decoded
from .libraries import quiet
from .loading.plan import Work

Shape = tuple[type, str, torch.dtype]
"""What a count follows from: a network's class and configuration, and the precision that it runs in."""

_LATENT_SIDE = 16  # the count is linear in the pixels; this size is counted and the others follow
_STEP_SIDES = (64, 128)
_SLACK = 1.05  # beside what the network itself holds, a step has latents, predictions and the sampler's own
_FIXED = 2**26  # bytes: the texts that are remembered, and small change
_DECODE_BYTES: dict[Shape, float] = {}
_STEP_BYTES: dict[Shape, tuple[float, float]] = {}
_UNPACKED_BYTES: dict[int, float] = {}  # by GGML type: for each byte of the weight
_BLOCKS = 4096  # whose unpacking is counted

Inputs = Callable[[int, int], Mapping[str, Any]]
"""Height and width of a grid of latents → a denoiser's arguments for one picture, on the meta device."""


def decode_bytes(vae: Any, pixels: int, dtype: torch.dtype | None = None) -> int:
    """Least bytes, beside the weights, to decode so many `pixels` at once by one of diffusers' autoencoders.

    dtype: that the decode runs in; None: that of the parameters. A wider one takes the network's weights along: what
    they grow by is counted. The decoder's last levels hold several maps of 256 channels at the picture's own
    size: in Stable Diffusion and Flux more than a denoising step holds, see docs/decisions/memory-admission.md.
    """
    dtype = dtype or vae.dtype
    shape = _shape(vae, dtype)
    if shape not in _DECODE_BYTES:
        _DECODE_BYTES[shape] = _count(vae, dtype)
    lying = sum(parameter.numel() for parameter in vae.parameters() if not parameter.is_meta)  # else layer by layer
    grown: int = (dtype.itemsize - vae.dtype.itemsize) * lying
    return round(_DECODE_BYTES[shape] * pixels) + grown


def _shape(network: Any, dtype: torch.dtype) -> Shape:
    return type(network), repr(sorted(network.config.items())), dtype


def _count(vae: Any, dtype: torch.dtype) -> float:
    """Bytes a pixel."""
    with torch.device("meta"), quiet():
        skeleton = type(vae).from_config(vae.config).eval().to(dtype=dtype)
        latents = torch.empty(1, channels(vae), _LATENT_SIDE, _LATENT_SIDE, dtype=dtype)
    drawn: list[Tensor] = []
    peak = peak_bytes(lambda: drawn.append(decoded(skeleton, latents)))
    return peak / (drawn[0].shape[-1] * drawn[0].shape[-2])


def step_bytes(network: Any, dtype: torch.dtype, inputs: Inputs, cells: int) -> int:
    """Bytes, beside the weights, of a call of a denoiser for one picture, or one half of guidance, of so many `cells`.

    cells: height times width of the latents. The count is a line through those of two sizes: attention keeps no scores,
    and what is left grows with the cells but for the text.
    """
    shape = _shape(network, dtype)
    if shape not in _STEP_BYTES:
        with torch.device("meta"), quiet():
            skeleton = type(network).from_config(network.config).eval().to(dtype=dtype)
            small, large = (peak_bytes(lambda side=side: skeleton(**inputs(side, side))) for side in _STEP_SIDES)
        slope = (large - small) / (_STEP_SIDES[1] ** 2 - _STEP_SIDES[0] ** 2)
        _STEP_BYTES[shape] = small - slope * _STEP_SIDES[0] ** 2, slope
    fixed, slope = _STEP_BYTES[shape]
    return round(fixed + slope * cells)


class Countable(Protocol):
    """What the count needs of a model (`PipelineModel`)."""

    pipeline: Any
    denoiser: Any
    longest_read: int

    @property
    def kept_cells(self) -> int: ...

    def inputs(self, height: int, width: int) -> Mapping[str, Any]: ...

    def rows(self, *, guided: bool) -> int: ...

    def decode_bytes(self, width: int, height: int, images: int, *, tiled: bool = False) -> int: ...


def work(model: Countable, width: int, height: int, images: int, *, guided: bool) -> Work:
    """What a request needs beside the weights, for a plan: never less than it takes, but for kernels' workspaces."""
    pipeline, root = model.pipeline, model.denoiser.root
    cells, dtype = height * width // pipeline.vae_scale_factor**2, pipeline.vae.dtype
    step = step_bytes(root, dtype, model.inputs, cells) + model.kept_cells * cells * dtype.itemsize
    unpacked = max(map(unpacked_bytes, root.parameters()), default=0)
    encoders = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part}
    tokenizers = [getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in encoders]
    return Work(
        text=_FIXED + max(map(partial(_reading_bytes, model.longest_read), encoders.values(), tokenizers)),
        denoise=round(_SLACK * images * model.rows(guided=guided) * step) + _FIXED + unpacked,
        decode=_FIXED + model.decode_bytes(width, height, images),
        tiled=_FIXED + model.decode_bytes(width, height, images, tiled=True),
    )


def unpacked_bytes(weight: Tensor) -> int:
    """Of what a layer makes of a small weight while it runs: 16 bit of fp8, and of a GGUF file's blocks in steps."""
    if (kind := getattr(weight, "quant_type", None)) is None:
        return 2 * weight.numel() if weight.element_size() == 1 else 0
    if kind not in _UNPACKED_BYTES:
        from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, GGUFParameter, dequantize_gguf_tensor

        with torch.device("meta"):
            blocks = GGUFParameter(torch.empty(_BLOCKS, GGML_QUANT_SIZES[kind][1], dtype=torch.uint8), quant_type=kind)
        peak = peak_bytes(lambda: dequantize_gguf_tensor(blocks).to(torch.bfloat16))
        _UNPACKED_BYTES[kind] = peak / blocks.nbytes
    return round(_UNPACKED_BYTES[kind] * weight.nbytes)


def _reading_bytes(longest: int, encoder: Any, tokenizer: Any) -> int:
    """Of one text, of so many tokens at most: its scores, and what else an encoder makes of it.

    A language model keeps what each of its layers made, and says a word for each token.
    """
    config = encoder.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    width = getattr(config, "intermediate_size", None) or config.d_ff
    tokens = min(int(tokenizer.model_max_length), longest)
    words = encoder.get_output_embeddings()
    layers = (config.num_hidden_layers + 1) * config.hidden_size if hasattr(config, "num_key_value_heads") else 0
    kept = (layers + (0 if words is None else words.out_features)) * encoder.dtype.itemsize
    return int(tokens * (tokens * heads * 6 + width * 8 + kept))


def peak_bytes(call: Any) -> int:
    """Most bytes that the tensors made by `call()`, on the meta device, hold at one time.

    The fused attention kernels keep no matrix of scores, and none is counted.
    """
    live = _Live()
    with torch.no_grad(), live, _FusedAttention():
        call()
    return live.peak


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Follows each storage from the operator that makes it to the death of the last tensor that views it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._held = 0
        self._views: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        weights = {key for key in given if not self._views[key]}  # made by nobody here: also the inputs
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in weights:
                size = tensor.untyped_storage().nbytes()
                self._held += size if not self._views[key] else 0
                self._views[key] += 1
                weakref.finalize(tensor, self._drop, key, size)
        self.peak = max(self.peak, self._held)
        return result

    def _drop(self, key: int, size: int) -> None:
        self._views[key] -= 1
        self._held -= size if not self._views[key] else 0


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, _, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **kwargs)
