"""Compiled layers: `torch.compile` on each layer of a UNet or block of a transformer, so that caches still find them.

Why layers and not the whole network, and why no CUDA graphs: docs/decisions/compilation.md.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from models.base import Offload, Quantization
from models.errors import ModelError

if TYPE_CHECKING:
    from cache import Denoiser

SHAPES = 64  # input shapes that one region may be compiled for, before further ones run uncompiled
_COMPILERS = ("g++", "clang++", "c++")


class CompilationFailed(ModelError):
    """The compiler gave up on a layer."""


def unavailable(device: str, offload: Offload | None, quantization: Quantization | None = None) -> str | None:
    """Why a model cannot be compiled for `device`, with the remedy; None if it can."""
    if quantization == "fp8":
        return "A model that is kept in fp8 is cast layer by layer as it runs, and cannot be compiled. Leave it out."
    if offload in ("sequential", "group"):
        return "A model that is offloaded layer by layer or block by block cannot be compiled. Leave it out."
    if device.startswith("cuda") and find_spec("triton") is None:
        return "Compiling makes Triton kernels, and triton is not installed: pip install triton."
    if shutil.which(os.environ.get("CXX", "")) is None and not any(map(shutil.which, _COMPILERS)):
        return "Compiling needs a C++ compiler on the server, and there is none: install g++ or name one in CXX."
    return None


def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """The forward, a region of its own with static shapes.

    Layers of one class share their code, and torch bounds what it keeps for one code. After a second shape torch would
    compile for any, and a picture would depend on the requests before it.
    """
    import torch

    options: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": SHAPES}  # which the overloads lack
    return torch.compile(forward, backend=backend, dynamic=False, **options)


class CompiledLayers:
    """A denoiser's layers compiled, each on its first call; kept with the model, in force inside `attached` alone.

    A transformer's blocks of one class are alike and share a region: their weights are its arguments. A UNet's layers
    differ, and each is a region. backend: of `torch.compile`.
    """

    def __init__(self, denoiser: Denoiser, backend: str = "inductor") -> None:
        from cache import TransformerDenoiser, UNetDenoiser

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch, about its own modules
            match denoiser:
                case UNetDenoiser():
                    paths = [path for entry in (*denoiser.down_entries, *denoiser.up_layers) for path in entry]
                    layers = [denoiser.root.get_submodule(path) for path in paths if path != "conv_in"]
                    if denoiser.root.mid_block is not None:
                        layers.append(denoiser.root.mid_block)  # type: ignore[arg-type]
                    self._forwards = [(layer, _compiled(layer.forward, backend)) for layer in layers]
                case TransformerDenoiser():
                    blocks = [block for blocks in denoiser.blocks for block in blocks]
                    shared = {cls: _compiled(cls.forward, backend) for cls in {type(block) for block in blocks}}
                    self._forwards = [(block, partial(shared[type(block)], block)) for block in blocks]

    def __len__(self) -> int:
        return len(self._forwards)

    @contextmanager
    def attached(self) -> Iterator[Compilation]:
        """Within the context the layers run compiled; hooks, names and parameters are as they were."""
        import torch
        from torch._dynamo.exc import BackendCompilerFailed

        from cache.patching import shadowed

        compilation = Compilation()
        limit = SHAPES * len(self._forwards)
        try:
            with (
                torch._dynamo.config.patch(accumulated_recompile_limit=limit),
                compilation.watching(),
                shadowed([(layer, "forward", compiled) for layer, compiled in self._forwards]),
            ):
                yield compilation
        except BackendCompilerFailed as error:
            raise CompilationFailed("This model could not be compiled here. Leave it out.") from error


class Compilation:
    """How long compiling took in one run: 0 where all that it needed was there already."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        from torch._dynamo.callback import callback_handler

        started = callback_handler.register_start_callback(self._start)
        ended = callback_handler.register_end_callback(self._end)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(started)
            callback_handler.remove_end_callback(ended)

    def _start(self, _: object) -> None:
        self._started = time.perf_counter()

    def _end(self, _: object) -> None:
        self.seconds += time.perf_counter() - self._started
