"""Attention kernels: which ones a machine has, which one a run gets, and the swap inside that run.

Both kernels quantise, so that their pictures are near those of PyTorch's own attention, not equal to them.
SageAttention: Zhang et al. 2025, arXiv:2410.02367 and 2411.10958. SpargeAttn: Zhang et al. 2025, arXiv:2502.18137.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from models.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

SDPA = "sdpa"
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *, "
    "float? scale=None, bool enable_gqa=False) -> Tensor"
)


class AttentionUnavailable(ModelError):
    """The kernel is not installed, or cannot run this model on this device."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Arguments of `scaled_dot_product_attention`; tensors are (batch, heads, tokens, head size)."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def softmax_scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5 if self.scale is None else self.scale)

    @property
    def plain(self) -> bool:
        """Nothing that the kernels lack: a mask, dropout, causality, grouped or unbatched heads."""
        odd = self.attn_mask is not None or self.dropout_p > 0 or self.is_causal or self.enable_gqa
        return not odd and self.query.dim() == 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A package with an attention function.

    `distribution`: its name when installed; `module`, `function`: where it is called. `capability`: the least CUDA
    compute capability. `takes` says whether it can compute a call, `run` calls the function. The conditions are those
    that the packages' sources check (sageattention 2.2, spas_sage_attn 0.1).
    """

    title: str
    distribution: str
    module: str
    function: str
    install: str
    capability: tuple[int, int]
    takes: Callable[[AttentionCall], bool]
    run: Callable[[Callable[..., Any], AttentionCall], Tensor]
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[str, ...] = ("float16", "bfloat16")


def _sage_takes(call: AttentionCall) -> bool:
    return call.plain and call.query.shape[-1] <= 128


def _sage(function: Callable[..., Any], call: AttentionCall) -> Any:
    tensors = (tensor.contiguous() for tensor in (call.query, call.key, call.value))
    return function(*tensors, tensor_layout="HND", is_causal=False, sm_scale=call.softmax_scale)


def _sparge_takes(call: AttentionCall) -> bool:
    """It skips blocks of 128 queries by 64 keys; text's 77 keys leave nothing to skip."""
    return call.plain and call.query.shape[-1] <= 128 and min(call.query.shape[-2], call.key.shape[-2]) >= 128


def _sparge(function: Callable[..., Any], call: AttentionCall) -> Any:
    """Heads are padded to the two sizes that it knows, and the softmax keeps the scale of their own."""
    from torch.nn.functional import pad

    size = call.query.shape[-1]
    missing = (64 if size <= 64 else 128) - size
    query, key, value = (pad(tensor, (0, missing)) for tensor in (call.query, call.key, call.value))
    return function(query, key, value, topk=0.5, is_causal=False, scale=call.softmax_scale)[..., :size]


# In the order in which `auto` tries them: Sage computes all of the attention, Sparge leaves out half of its blocks.
KERNELS: Mapping[str, Kernel] = {
    "sage": Kernel(
        title="SageAttention",
        distribution="sageattention",
        module="sageattention",
        function="sageattn",
        install="pip install --no-build-isolation sageattention (it compiles with the CUDA toolkit)",
        capability=(8, 0),
        takes=_sage_takes,
        run=_sage,
    ),
    "sparge": Kernel(
        title="SpargeAttn",
        distribution="spas_sage_attn",
        module="spas_sage_attn",
        function="spas_sage2_attn_meansim_topk_cuda",
        install="pip install --no-build-isolation git+https://github.com/thu-ml/SpargeAttn (it compiles with the CUDA "
        "toolkit)",
        capability=(8, 9),
        takes=_sparge_takes,
        run=_sparge,
    ),
}


def unavailable(name: str, device: str, dtype: str) -> str | None:
    """Why the kernel `name` cannot run at that device and dtype, with the remedy; None if it can.

    Looks for the package without importing it.
    """
    kernel = KERNELS[name]
    reasons = []
    kind = device.split(":")[0]
    if not installed(kernel):
        reasons.append(f"it is not installed: {kernel.install}")
    if kind not in kernel.devices:
        reasons.append(f"it runs on {' or '.join(kernel.devices)} alone and this server's device is {kind}")
    elif kind == "cuda":
        import torch

        if (found := torch.cuda.get_device_capability(device)) < kernel.capability:
            needed = ".".join(map(str, kernel.capability))
            reasons.append(f"it needs compute capability {needed} and this GPU has {'.'.join(map(str, found))}")
    if dtype not in kernel.dtypes:
        reasons.append(f"it computes in {' or '.join(kernel.dtypes)} and this model is in {dtype}")
    if not reasons:
        return None
    return f"{kernel.title} cannot run here: {'; '.join(reasons)}. Use attention 'auto' or 'sdpa'."


def installed(kernel: Kernel) -> bool:
    try:
        version(kernel.distribution)
    except PackageNotFoundError:
        return False
    return True


class Attention:
    """What a run's attention is computed with. `swapped` and `left` count its calls by who computed them."""

    def __init__(self, kernel: str | None, function: Callable[..., Any] | None = None) -> None:
        self.kernel = kernel
        self.swapped = 0
        self.left = 0
        self.warnings: list[str] = []
        self._function = function

    def attend(self, call: AttentionCall) -> Tensor:
        """By the kernel if it takes the call, else by PyTorch."""
        from torch.nn.functional import scaled_dot_product_attention

        if self._function is not None and KERNELS[str(self.kernel)].takes(call):
            self.swapped += 1
            return KERNELS[str(self.kernel)].run(self._function, call)
        self.left += 1
        return scaled_dot_product_attention(**{one.name: getattr(call, one.name) for one in fields(call)})

    @property
    def name(self) -> str:
        """`sage` or `sparge` if it computed any call, else `sdpa`."""
        return self.kernel if self.kernel is not None and self.swapped else SDPA

    def explain(self, asked: str) -> None:
        """Warn of calls that the kernel which was `asked` for by name did not take."""
        if asked in KERNELS and self.left:
            self.warnings.append(
                f"{KERNELS[asked].title} computed {self.swapped} of {self.swapped + self.left} attention calls; the "
                "others have a head size, a mask or too few tokens for it and ran on PyTorch's own."
            )


_running: ContextVar[Attention] = ContextVar("attention")


@contextmanager
def attending(asked: str, device: str, dtype: str) -> Iterator[Attention]:
    """Within the context and this thread, attention runs on the kernel that is `asked` for: a name or `auto`.

    Every network calls `torch.nn.functional.scaled_dot_product_attention`, by whatever processor, and torch lets a mode
    take a function's calls over; nothing is patched, so that nothing has to be restored. Raises AttentionUnavailable.
    """
    chosen = _choose(asked, device, dtype)
    if chosen is None:
        yield Attention(None)
        return
    attention = Attention(*chosen)
    token = _running.set(attention)
    try:
        with _swap()():
            yield attention
    finally:
        _running.reset(token)
    attention.explain(asked)


def _choose(asked: str, device: str, dtype: str) -> tuple[str, Callable[..., Any]] | None:
    """The kernel's name and its function; None for PyTorch's own."""
    names = {SDPA: (), "auto": tuple(KERNELS)}.get(asked, (asked,))
    for name in names:
        reason = unavailable(name, device, dtype)
        if reason is None:
            kernel = KERNELS[name]
            try:
                return name, getattr(importlib.import_module(kernel.module), kernel.function)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:  # built for another torch or CUDA
                reason = f"{kernel.title} is installed but cannot be imported ({error}). Build it again for this torch."
        if asked != "auto":
            raise AttentionUnavailable(reason)
    return None


@cache
def _swap() -> type[Any]:
    """A mode that hands attention over to one operator, whose insides a compiler does not look into.

    So layers are compiled once for all runs: neither this run's kernel nor its counts become part of what is compiled.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    @torch.library.custom_op("wavespeed::attention", mutates_args=(), schema=_SCHEMA)
    def attend(*call: Any, **named: Any) -> Any:
        with torch._C.DisableTorchFunction():  # compiled layers come here with the mode still in force
            return _running.get().attend(AttentionCall(*call, **named)).contiguous()

    @attend.register_fake
    def _(query: Any, key: Any, value: Any, *_: Any, **named: Any) -> Any:
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    class Swap(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is scaled_dot_product_attention:
                return attend(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    return Swap
