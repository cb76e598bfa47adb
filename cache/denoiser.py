"""The views that strategies work on: what a UNet and a transformer look like to a cache, told by structure.

A view knows where a network can be cut and how to run the rest of it; it holds no state of a run. What runs is always
the root's own `forward`, over shortened lists of its own layers (`patching.shadowed`), so that conditioning, LoRA
scales, masks, forced upsampling sizes and offload hooks are the model's business and not copied here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from . import cost
from .patching import Call, Shadow, intercepted, shadowed
from .sampling import responses, timesteps_of
from .schedule import Placement, PlacementRule, ruled
from .strategy import CacheReport, CacheStrategy, IncompatibleDenoiser

__all__ = ["BranchPass", "Denoiser", "TransformerDenoiser", "UNetDenoiser", "attach", "view_of"]


Responses = Callable[[], Sequence[float] | None]
"""Asked once in a run, after its first call; None where nobody knows the sampler."""


def _unknown() -> None:
    return None


class Denoiser:
    """A network that is called once or more a step to predict noise, velocity or sample."""

    injections: ClassVar[tuple[str, ...]] = ()
    """Arguments that change the network between its layers. A call that has one computes fully."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.responses: Responses = _unknown
        parameters = tuple(inspect.signature(type(root).forward).parameters)[1:]
        self._positions = {name: position for position, name in enumerate(parameters)}

    def argument(self, name: str, call: Call) -> Any:
        """What `call` passes for the root's parameter `name`, by keyword or position; None if it does not."""
        if name in call.kwargs:
            return call.kwargs[name]
        position = self._positions.get(name, len(call.args))
        return call.args[position] if position < len(call.args) else None

    def injected(self, call: Call) -> str | None:
        """The first of `injections` that `call` carries."""
        return next((name for name in self.injections if self.argument(name, call) is not None), None)

    def timestep_of(self, call: Call) -> float:
        """The call's timestep (that of the first batch item). Synchronises if it lies on a GPU."""
        timestep = self.argument("timestep", call)
        return float(timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep)

    def sampled(self, responses: Responses) -> Self:
        """The same view for a run of a sampler with these responses: by how much each prediction moves its result."""
        other = copy.copy(self)
        other.responses = responses
        return other

    def intercepted(self, handle: Callable[[Call], Any]) -> AbstractContextManager[None]:
        """Within the context, calls of the root go through `handle`. Raises AlreadyAttached."""
        return intercepted(self.root, handle)


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
        self._guided = guided
        self._is_certain = False  # that a guided run has no other calls
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

        Compares the halves, which synchronises with a GPU, unless it is known that all calls are guided.
        """
        sample: Tensor = self.argument("sample", call)
        if not self._guided() or len(sample) % 2:
            return None
        return len(sample) if self._is_certain or torch.equal(*sample.chunk(2)) else None

    def ruled(self, rule: PlacementRule, *, guided: bool) -> UNetDenoiser:
        """The same view for a run of which this much is known. guided: whether all its calls are."""
        other = copy.copy(self)
        other._is_certain = True
        other._rule = rule
        other._guided = lambda: guided
        return other

    @property
    def branches(self) -> int:
        """The number of branches. Without a middle block the deepest one would skip nothing and is not counted."""
        return len(self.up_layers) - (self.root.mid_block is None)

    @property
    def branch_costs(self) -> tuple[float, ...]:
        """Share of a full call's floating-point operations that each branch's pass needs, at the native size."""
        return cost.branch_costs(self)

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


_STREAM_ORDER = ("hidden_states", "encoder_hidden_states")  # of a block's positional arguments in diffusers


class TransformerDenoiser(Denoiser):
    """A transformer whose root runs one or two lists of blocks in turn, over an image and perhaps a text stream.

    block_lists: the root's attributes that hold the blocks, in the order of their running; None finds them by name.
    streams: the block's results in their order, for blocks that return a tuple. One that returns a tensor returns the
    image stream. Streams have the shape (batch, tokens, channels).
    """

    injections = (
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "block_controlnet_hidden_states",
        "skip_layers",
    )

    def __init__(
        self,
        root: nn.Module,
        *,
        block_lists: Sequence[str] | None = None,
        streams: Sequence[str] = ("encoder_hidden_states", "hidden_states"),
    ) -> None:
        super().__init__(root)
        usual = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
        names = usual if block_lists is None else block_lists
        self.block_lists = tuple(name for name in names if len(getattr(root, name, ())) > 0)
        self.streams = tuple(streams)
        if not self.block_lists or (block_lists is not None and self.block_lists != tuple(block_lists)):
            raise IncompatibleDenoiser(
                f"{type(root).__name__} has no blocks under {', '.join(names)}: name its lists in block_lists."
            )

    @property
    def blocks(self) -> list[list[nn.Module]]:
        """The blocks of each list."""
        return [list(getattr(self.root, name)) for name in self.block_lists]

    def batch_of(self, call: Call) -> int:
        """How many items `call` denoises together."""
        return len(self.argument("hidden_states", call))

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The streams that a block is called with."""
        passed = {
            name: args[position] if position < len(args) else kwargs.get(name)
            for position, name in enumerate(_STREAM_ORDER)
        }
        return {name: value for name, value in passed.items() if isinstance(value, Tensor)}

    def arguments(
        self, streams: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with other streams in them."""
        by_name = {name: streams.get(name, value) for name, value in kwargs.items()}
        named = dict(zip(_STREAM_ORDER, args, strict=False)) | dict(streams)
        return (*(named[name] for name in _STREAM_ORDER[: len(args)]), *args[len(_STREAM_ORDER) :]), by_name

    def results(self, output: Any) -> dict[str, Tensor]:
        """The streams in what a block returned."""
        if not isinstance(output, tuple):
            return {"hidden_states": output}
        return {name: stream for name, stream in zip(self.streams, output, strict=True) if stream is not None}

    def check_order(self, taken: Mapping[str, Tensor], returned: Mapping[str, Tensor]) -> None:
        """Raises IncompatibleDenoiser where a stream came out of a block in another one's shape."""
        for name, stream in returned.items():
            if name in taken and taken[name].shape != stream.shape:
                raise IncompatibleDenoiser(
                    f"The blocks of this {type(self.root).__name__} return {name} in the shape {tuple(stream.shape)}, "
                    f"having taken it in {tuple(taken[name].shape)}: give the view its streams in the order in which "
                    f"the blocks return them, which is not {', '.join(self.streams)}."
                )

    def output(self, streams: Mapping[str, Tensor], packed: bool) -> Any:
        """What a block that put out `streams` would return; `packed` if the blocks return tuples."""
        return tuple(map(streams.get, self.streams)) if packed else streams["hidden_states"]


def view_of(target: Any) -> Denoiser:
    """The view of a denoiser, of a network, or of the network in a diffusers pipeline.

    Raises IncompatibleDenoiser if the structure is not known.
    """
    if isinstance(target, Denoiser):
        return target
    root = target
    if not isinstance(target, nn.Module):
        root = getattr(target, "unet", None) or getattr(target, "transformer", None)
    if not isinstance(root, nn.Module):
        raise IncompatibleDenoiser(
            f"{type(target).__name__} has neither a unet nor a transformer: pass the network itself or a Denoiser."
        )
    scheduler = getattr(target, "scheduler", None)
    if hasattr(root, "down_blocks") and hasattr(root, "up_blocks"):
        training = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)

        def rule(timestep: float, interval: int, branch: int | None) -> Placement | None:
            timesteps = timesteps_of(target.scheduler, timestep)
            return None if timesteps is None else ruled(timesteps, interval)

        def guided() -> bool:
            return bool(getattr(target, "do_classifier_free_guidance", False))

        view: Denoiser = UNetDenoiser(
            root, num_train_timesteps=training, rule=None if scheduler is None else rule, guided=guided
        )
    else:
        view = TransformerDenoiser(root)
    return view if scheduler is None else view.sampled(lambda: responses(target.scheduler))


def attach(target: Any, strategy: CacheStrategy) -> AbstractContextManager[CacheReport]:
    """Attach `strategy` to a diffusers pipeline, a network or a Denoiser for one run.

    The context is one run: what the cache keeps is carried from call to call inside it and dropped at its end. Enter
    it anew for the next picture. A loop that calls the network for the conditional and the unconditional pass apart
    wraps each call in `root.cache_context(name)`, as diffusers' pipelines do. Raises IncompatibleDenoiser and
    AlreadyAttached.
    """
    return strategy.attach(view_of(target))
