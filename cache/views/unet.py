"""A UNet: where its down and up path can be cut, and the pass over what lies outside of a cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cache import flops
from cache.deepcache.schedule import Placement, PlacementRule
from cache.errors import IncompatibleDenoiser
from cache.patching import Shadow, shadowed

from .base import Call, Denoiser

TEXT_TOKENS = 77  # CLIP's context length, at which SD1.5 to SDXL are counted


class _Kept:
    """Takes the middle block's place in a branch pass: answers with the kept state, whatever comes in."""

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return self.state


class BranchPass:
    """The root's own forward over the layers outside of one branch, a kept hidden state standing for the rest."""

    def __init__(self, shadows: list[Shadow], middle: _Kept) -> None:
        self._shadows = shadows
        self._middle = middle

    def run(self, call: Call, state: Tensor) -> Any:
        """`state` has the shape of what the branch's source put out: (batch, channels, height, width)."""
        self._middle.state = state
        try:
            with shadowed(self._shadows):
                return call.run()
        finally:
            self._middle.state = None


class UNetDenoiser(Denoiser):
    """A diffusers UNet with down, middle and up blocks of residual layers, with or without attentions.

    The down path has n entries, each of which one of the n up-path layers takes as its skip: `conv_in`, then each
    block's layers and its downsampler. Branch b (0 ≤ b < n, DeepCache's `cache_branch_id`) cuts before the up-path
    layer n - 1 - b: a branch pass runs `conv_in`, the b following entries and the last b + 1 up-path layers.

    native_size: height and width of the latents at which the costs are counted; None reads `config.sample_size`.
    rule: what `placement` asks; None where nothing is known of a run before it is made.
    guided: whether the run that begins calls with every picture twice, the second half of the batch with its text, as
        diffusers' pipelines do for guidance.
    """

    injections = (
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    )

    def __init__(
        self,
        root: nn.Module,
        *,
        native_size: tuple[int, int] | None = None,
        num_train_timesteps: int = 1000,
        rule: PlacementRule | None = None,
        guided: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(root)
        self.native_size = native_size
        self.num_train_timesteps = num_train_timesteps
        self._rule = rule
        self.guided = guided
        self._is_certain = False  # that `guided` speaks of the present call
        self.down_blocks: list[Any] = list(root.down_blocks)  # type: ignore[arg-type]
        self.up_blocks: list[Any] = list(root.up_blocks)  # type: ignore[arg-type]
        self.down_entries: list[tuple[str, ...]] = [("conv_in",)]
        for i, block in enumerate(self.down_blocks):
            self.down_entries += _layer_paths(block, f"down_blocks.{i}")
            if _samplers(block, "downsamplers"):
                self.down_entries.append((f"down_blocks.{i}.downsamplers.0",))
        self.up_layers: list[tuple[str, ...]] = []
        for i, block in enumerate(self.up_blocks):
            layers = _layer_paths(block, f"up_blocks.{i}")
            _check_skips(block)
            if _samplers(block, "upsamplers"):
                layers[-1] += (f"up_blocks.{i}.upsamplers.0",)
            self.up_layers += layers
        if len(self.down_entries) != len(self.up_layers):
            raise IncompatibleDenoiser(
                f"{type(root).__name__} has {len(self.down_entries)} skips for {len(self.up_layers)} up-path layers; "
                "DeepCache needs a UNet whose up-path layers take one skip each."
            )

    def placement(self, call: Call, interval: int, branch: int | None) -> Placement | None:
        """Where DeepCache's compute calls lie in the run that `call` begins; None if nobody knows how long it will be.

        Reads the timestep, once a run.
        """
        return None if self._rule is None else self._rule(self.timestep_of(call), interval, branch)

    def guided_rows(self, call: Call) -> int | None:
        """The rows of a batch that holds every picture twice, the second time with its text; None for any other.

        Compares the halves, which synchronises with a GPU, unless it is known of each call.
        """
        sample: Tensor = self.argument("sample", call)
        if not self.guided() or len(sample) % 2:
            return None
        return len(sample) if self._is_certain or torch.equal(*sample.chunk(2)) else None

    def ruled(self, rule: PlacementRule, *, guided: Callable[[], bool]) -> UNetDenoiser:
        """The same view for a run of which this much is known. guided: whether the present call is."""
        other = copy.copy(self)
        other._is_certain = True
        other._rule = rule
        other.guided = guided
        return other

    @property
    def branches(self) -> int:
        """The number of branches. Without a middle block the deepest one would skip nothing and is not counted."""
        return len(self.up_layers) - (self.root.mid_block is None)

    @property
    def branch_costs(self) -> tuple[float, ...]:
        """Share of a full call's floating-point operations that each branch's pass needs, at the native size."""
        size = self.native_size or _sample_size(self.root)
        operations = flops.count_once(self.root, size, lambda: ((), inputs_of(self.root.config, size)))

        def skipped(branch: int) -> int:
            layers = [*self.down_entries[branch + 1 :], *self.up_layers[: -1 - branch], ("mid_block",)]
            return sum(operations.get(path, 0) for paths in layers for path in paths)

        return tuple(1 - skipped(branch) / operations[""] for branch in range(self.branches))

    @property
    def modifies_in_place(self) -> bool:
        """FreeU scales the state that enters an up block in place, so what is kept must not be that very tensor."""
        return any(getattr(block, "b1", None) is not None for block in self.up_blocks)

    def source(self, branch: int) -> nn.Module:
        """The module whose output is the state that enters the first up-path layer of the branch's pass.

        That state has the shape (batch, channels, height, width) of the level it belongs to.
        """
        skipped = len(self.up_layers) - 1 - branch
        if skipped == 0:
            return self.root.mid_block  # type: ignore[return-value]
        return self.root.get_submodule(self.up_layers[skipped - 1][-1])

    def branch_pass(self, branch: int) -> BranchPass:
        """What runs `conv_in`, the `branch` following entries and the last `branch` + 1 up-path layers."""
        shadows: list[Shadow] = []
        down: list[Any] = []
        entries = branch
        for block in self.down_blocks:
            if entries == 0:
                break
            down.append(block)
            layers = len(block.resnets)
            if entries < layers + _samplers(block, "downsamplers"):
                shadows += [*_shorten(block, slice(entries)), (block, "downsamplers", None)]
                break
            entries -= layers + _samplers(block, "downsamplers")
        up: list[Any] = []
        entries = branch + 1
        for block in reversed(self.up_blocks):
            up.insert(0, block)
            layers = len(block.resnets)
            if entries <= layers:
                shadows += _shorten(block, slice(layers - entries, None))
                break
            entries -= layers
        middle = _Kept()
        shadows += [(self.root, "down_blocks", down), (self.root, "mid_block", middle), (self.root, "up_blocks", up)]
        return BranchPass(shadows, middle)


def _layer_paths(block: Any, path: str) -> list[tuple[str, ...]]:
    """The block's layers in order, each as the paths of the modules that it runs in order."""
    lists = [name for name, child in block.named_children() if isinstance(child, nn.ModuleList)]
    known = {"resnets", "attentions", "downsamplers", "upsamplers"}
    if "resnets" not in lists or not set(lists) <= known or hasattr(block, "skip_conv"):
        raise IncompatibleDenoiser(
            f"DeepCache cannot cut {type(block).__name__}: it knows blocks of residual layers, each with one or no "
            "attention and one skip."
        )
    parallel = ["resnets", *(["attentions"] if "attentions" in lists else [])]
    return [tuple(f"{path}.{name}.{i}" for name in parallel) for i in range(len(block.resnets))]


def _check_skips(block: Any) -> None:
    """Raises IncompatibleDenoiser if only the first layer of an up block takes a skip (K-diffusion's upscalers)."""
    entrances = [next((one for one in layer.modules() if isinstance(one, nn.Conv2d)), None) for layer in block.resnets]
    for before, layer in pairwise(entrances):
        if before is None or layer is None or layer.in_channels <= before.out_channels:
            raise IncompatibleDenoiser(
                f"DeepCache cannot cut {type(block).__name__}: a cut needs layers that take one skip each."
            )


def _samplers(block: Any, name: str) -> int:
    """1 if the block changes resolution at its end, else 0."""
    return int(bool(getattr(block, name, None)))


def _shorten(block: Any, part: slice) -> list[Shadow]:
    names = [name for name in ("resnets", "attentions") if hasattr(block, name)]
    return [(block, name, getattr(block, name)[part]) for name in names]


def _sample_size(root: nn.Module) -> tuple[int, int]:
    size: Any = getattr(getattr(root, "config", None), "sample_size", None)
    if size is None:
        raise IncompatibleDenoiser(
            f"This {type(root).__name__}'s config names no sample_size: give the view its native_size."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def inputs_of(config: Any, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One call's arguments on the meta device, as a UNet's config describes them: one row, latents of that size."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
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
