"""A transformer: lists of blocks that hand an image stream on, and perhaps a text stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cache import flops
from cache.errors import IncompatibleDenoiser

from .base import Call, Denoiser

IMAGE = "hidden_states"
TEXT = "encoder_hidden_states"
_AFTER = {
    "transformer_blocks": "controlnet_block_samples",
    "single_transformer_blocks": "controlnet_single_block_samples",
}
"""Of a list of blocks, the root's parameter for what is added after each; an injector fills it with one a block."""


class TransformerDenoiser(Denoiser):
    """A transformer whose root runs one or two lists of blocks in turn, over an image and perhaps a text stream.

    block_lists: the root's attributes that hold the blocks, in the order of their running; None finds them by name.
    streams: the block's results in their order, for blocks that return a tuple. One that returns a tensor returns the
    image stream. Streams have the shape (batch, tokens, channels). Where a later list takes all of them as one, they
    lie in it in that order. takes: those that a block is called with by position.
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
        streams: Sequence[str] = (TEXT, IMAGE),
        takes: Sequence[str] = (IMAGE, TEXT),
    ) -> None:
        super().__init__(root)
        usual = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
        names = usual if block_lists is None else block_lists
        self.block_lists = tuple(name for name in names if len(getattr(root, name, ())) > 0)
        self.streams = tuple(streams)
        self.takes = tuple(takes)
        if not self.block_lists or (block_lists is not None and self.block_lists != tuple(block_lists)):
            raise IncompatibleDenoiser(
                f"{type(root).__name__} has no blocks under {', '.join(names)}: name its lists in block_lists."
            )

    @property
    def blocks(self) -> list[list[nn.Module]]:
        """The blocks of each list."""
        return [list(getattr(self.root, name)) for name in self.block_lists]

    @property
    def reading(self) -> tuple[tuple[str, ...], ...]:
        """What the view takes the root's blocks for: two that agree in it see the same streams."""
        return self.block_lists, self.streams, self.takes

    def injected_after(self, injected: Mapping[str, Any], name: str) -> Sequence[Tensor] | None:
        """Of what is injected in a call, what is added to the image stream after each block of the list `name`."""
        after: Sequence[Tensor] | None = injected.get(_AFTER.get(name, name))
        return after

    def batch_of(self, call: Call) -> int:
        """How many items `call` denoises together: the image comes first among the root's arguments."""
        return len(call.args[0] if call.args else call.kwargs[next(iter(self._positions))])

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The streams that a block is called with."""
        passed = {name: kwargs.get(name) for name in (IMAGE, TEXT)} | dict(zip(self.takes, args, strict=False))
        return {name: value for name, value in passed.items() if isinstance(value, Tensor)}

    def results(self, output: Any) -> dict[str, Tensor]:
        """The streams in what a block returned."""
        if not isinstance(output, tuple):
            return {IMAGE: output}
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

    def joined(self, streams: Mapping[str, Tensor]) -> Tensor:
        """All streams as one."""
        return torch.cat([streams[name] for name in self.streams if name in streams], dim=1)

    def split(self, joined: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `joined`. like: streams of as many tokens."""
        names = [name for name in self.streams if name in like]
        return dict(zip(names, torch.split(joined, [like[name].shape[1] for name in names], dim=1), strict=True))

    def output(self, streams: Mapping[str, Tensor], packed: bool) -> Any:
        """What a block that put out `streams` would return; `packed` if the blocks return tuples."""
        return tuple(map(streams.get, self.streams)) if packed else streams[IMAGE]

    def first_block_cost(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """Operations of a call that skips all blocks but the first, by those of a full one. Raises Uncountable.

        args, kwargs: of a call, on the meta device (`flops.on_meta`). The share hardly depends on the size: the first
        call of such a network decides.
        """
        operations = flops.count_once(self.root, None, lambda: (args, kwargs))
        paths = [f"{name}.{i}" for name in self.block_lists for i in range(len(getattr(self.root, name)))]
        return 1 - sum(operations.get(path, 0) for path in paths[1:]) / operations[""]
