"""How a family's latents lie: as its pipelines hand them about, in its denoiser's arguments, and as a picture's grid.

A grid is (batch, channels, height, width), the height and width a picture's divided by the autoencoder's factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from cache.deepcache.guidance import second_half

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a denoiser's call: by position and by name."""
Items = Any
"""A tensor whose first dimension is the batch, or a list of tensors."""


class Layout(Protocol):
    multiple: int
    """What both sides of a grid must be multiples of."""

    def grid(self, latents: Items, height: int, width: int) -> Tensor:
        """The grid, height × width latents, in latents or in a prediction."""
        ...

    def flat(self, grid: Tensor) -> Items:
        """The inverse of `grid`."""
        ...

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Items, float]:
        """A call's latents, and the timestep as the denoiser takes it (that of the first item)."""
        ...

    def with_text(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments of a call of both halves of guidance in one batch, for the half with text alone."""
        ...

    def with_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], grid: Tensor, timestep: float) -> Arguments:
        """The call's arguments with another grid, perhaps of another size, and timestep in them.

        What is made of numbers alone lies on the CPU, as a run's timesteps do (`PipelineModel.run`).
        """
        ...


class _InHalves:
    """Of a guided batch, the second half has the text."""

    def with_text(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        rows = len(self.input_of(args, kwargs)[0])
        return second_half(args, rows), second_half(dict(kwargs), rows)

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, float]:
        raise NotImplementedError


class Spatial(_InHalves):
    """The grid itself, first by position or by name; a timestep, by default of those that a UNet was trained on.

    sample: what the denoiser calls the grid. patch: latents of a token's side, in a transformer. trained: how many
    timesteps it was trained on, where noise is told as a share of them (flow matching: t from 1 to 0).
    """

    def __init__(self, sample: str = "sample", patch: int = 1, trained: int = 1) -> None:
        self.multiple = patch
        self._names = (sample, "timestep")
        self._trained = trained

    def grid(self, latents: Tensor, height: int, width: int) -> Tensor:
        return latents

    def flat(self, grid: Tensor) -> Tensor:
        return grid

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, float]:
        sample, timestep = self._names
        named = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        return named[sample], _number(named[timestep]) / self._trained

    def with_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], grid: Tensor, timestep: float) -> Arguments:
        sample, told = self._names
        changed = {sample: grid, told: torch.full((len(grid),), timestep * self._trained)}
        by_position = [changed.pop(name) for name, _ in zip(self._names, args, strict=False)]
        return (*by_position, *args[len(self._names) :]), {**kwargs, **changed}


class Packed(_InHalves):
    """Flux's: two by two latents a token, (batch, tokens, 4 · channels); t from 1 to 0.

    Where the tokens lie is told by a position for each, or by the grid's shape. A mask is the text's, and shows all of
    the picture.
    """

    multiple = 2

    def grid(self, latents: Tensor, height: int, width: int) -> Tensor:
        batch, _, channels = latents.shape
        tiles = latents.view(batch, height // 2, width // 2, channels // 4, 2, 2)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)

    def flat(self, grid: Tensor) -> Tensor:
        batch, channels, height, width = grid.shape
        tiles = grid.reshape(batch, channels, height // 2, 2, width // 2, 2)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, float]:
        return kwargs["hidden_states"], _number(kwargs["timestep"])

    def with_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], grid: Tensor, timestep: float) -> Arguments:
        items, rows, columns = len(grid), grid.shape[-2] // 2, grid.shape[-1] // 2
        changed: dict[str, Any] = {
            "hidden_states": self.flat(grid),
            "timestep": kwargs["timestep"].new_full((items,), timestep),
        }
        if "img_ids" in kwargs:
            changed["img_ids"] = self.positions(items, rows, columns).to(kwargs["img_ids"].dtype)
        if "img_shapes" in kwargs:
            changed["img_shapes"] = [[(1, rows, columns)]] * items
        if (mask := kwargs.get("attention_mask")) is not None:
            text = mask[:, : kwargs["encoder_hidden_states"].shape[1]]
            changed["attention_mask"] = torch.cat([text, text.new_ones(items, rows * columns)], dim=1)
        return args, {**kwargs, **changed}

    def positions(self, items: int, rows: int, columns: int) -> Tensor:
        """One for each token."""
        from diffusers import FluxPipeline

        positions: Tensor = FluxPipeline._prepare_latent_image_ids(items, rows, columns, "cpu", torch.float32)
        return positions


class PackedInTime(Packed):
    """FLUX.2's: each item's tokens have positions of their own, four numbers with time as the first."""

    def positions(self, items: int, rows: int, columns: int) -> Tensor:
        from diffusers import Flux2KleinPipeline

        positions: Tensor = Flux2KleinPipeline._prepare_latent_ids(torch.empty(items, 1, rows, columns))
        return positions


class Listed:
    """Z-Image's: a list of items (channels, 1 frame, height, width), then t from 0 to 1, then a list of texts.

    Of a guided batch, the first half has the text.
    """

    multiple = 2

    def grid(self, latents: Items, height: int, width: int) -> Tensor:
        return torch.stack(latents)[:, :, 0] if isinstance(latents, list) else latents

    def flat(self, grid: Tensor) -> list[Tensor]:
        return list(grid[:, :, None].unbind())

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], float]:
        return args[0], _number(args[1])

    def with_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], grid: Tensor, timestep: float) -> Arguments:
        return (self.flat(grid), args[1].new_full((len(grid),), timestep), *args[2:]), dict(kwargs)

    def with_text(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        items = len(args[0]) // 2
        return tuple(each[:items] for each in args), dict(kwargs)


def _number(timestep: Any) -> float:
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
