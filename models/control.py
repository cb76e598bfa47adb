"""ControlNets in a model's runs: which are loaded, the maps that they are shown, what they add in a call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from cache import Injector
from cache.transfer import upload, uploading

from .base import Control
from .guidance import WITHOUT_TEXT
from .loading.checkpoints import stamp_of
from .loading.controlnet import find, load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cache import Denoiser
    from cache.flops import Call as MetaCall
    from cache.views.base import Call, Injection

LOW, HIGH = 100, 200  # Canny's thresholds, those that the published ControlNets were shown


class ControlNets:
    """One model's, on its device: those that the last request named, so that a row of requests loads them once."""

    def __init__(self, denoiser: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._denoiser, self._dtype, self._device = denoiser, dtype, device
        self._loaded: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._loaded)

    def ready(self, controls: Sequence[Control]) -> None:
        """Load those that are named, and let go of the others. Raises ControlFailed."""
        wanted = {_key(one): one for one in controls if one.weight}
        self._loaded = {key: network for key, network in self._loaded.items() if key in wanted}
        for key, one in wanted.items():
            if key not in self._loaded:
                self._loaded[key] = load(find(one), self._denoiser, self._dtype, self._device)

    def of(self, controls: Sequence[Control]) -> list[Any]:
        """The networks of controls that are ready."""
        return [self._loaded[_key(one)] for one in controls]

    def missing_bytes(self, controls: Sequence[Control]) -> int:
        """Of the weights of those that are not loaded. Raises ControlFailed."""
        missing = {key: one for one in controls if one.weight and (key := _key(one)) not in self._loaded}
        return sum(find(one).numbers for one in missing.values()) * self._dtype.itemsize


def _key(control: Control) -> Any:
    return control.path, stamp_of(control.path)


def edges(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of a picture (height, width, 3), its edges (height, width): 255 on them, 0 beside (Canny 1986)."""
    import cv2
    import numpy as np

    return np.asarray(cv2.Canny(picture, LOW, HIGH), np.uint8)


def map_of(control: Control, width: int, height: int) -> Tensor:
    """What the ControlNet is shown at that size, (1, 3, height, width) float32 of 0 … 1 on the CPU."""
    import numpy as np
    from PIL import Image

    picture = control.image.convert("RGB")
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    levels = np.asarray(picture, np.uint8)
    if control.edges:
        levels = np.stack([edges(levels)] * 3, axis=2)
    return torch.from_numpy(levels.astype(np.float32) / 255).permute(2, 0, 1)[None]


class Steering(Injector):
    """The ControlNets of one run. controls: with the pictures that lie under this run's, of its size.

    scale: pixels of a side of a latent. The maps stay what they are while the run goes on; `begin` comes first.
    """

    def __init__(
        self, controls: Sequence[Control], networks: Sequence[Any], denoiser: Denoiser, device: torch.device, scale: int
    ) -> None:
        super().__init__(networks)
        self.controls, self._view, self._device, self._scale = controls, denoiser, device, scale
        self._forwards = [uploading(network.forward, device) for network in networks]
        self._maps: dict[Any, Tensor] = {}
        self._place: Callable[[], tuple[int, int]] = lambda: (0, 1)

    def begin(self, place: Callable[[], tuple[int, int]], generators: Sequence[torch.Generator]) -> None:
        """place: how many calls of the pipeline's loop are done, and of how many."""
        self._place = place

    def acting(self) -> tuple[int, ...]:
        """By diffusers' rule: a call acts that lies within start and end as a whole."""
        index, calls = self._place()
        return tuple(
            number
            for number, one in enumerate(self.controls)
            if index / calls >= one.start and (index + 1) / calls <= one.end
        )

    def compute(self, call: Call, acting: tuple[int, ...]) -> Mapping[str, Any]:
        """The sums of what they add, in the order of the request, as diffusers' pipelines of several add them."""
        summed: dict[str, list[Tensor]] = {}
        for number in acting:
            for name, added in self._added(number, call).items():
                before = summed.get(name)
                summed[name] = added if before is None else [a + b for a, b in zip(before, added, strict=True)]
        return self._passed(summed)

    @abstractmethod
    def _added(self, number: int, call: Call) -> dict[str, list[Tensor]]:
        """By one of the networks, by the denoiser's parameters for it."""

    def _passed(self, summed: dict[str, list[Tensor]]) -> Mapping[str, Any]:
        return summed

    def _pixels(self, number: int, width: int, height: int, rows: int) -> Tensor:
        """Its map in so many rows, on the device; kept, at each of a run's sizes."""
        key = number, width, height, rows
        if key not in self._maps:
            pixels = map_of(self.controls[number], width, height).to(self.networks[number].dtype)
            self._maps[key] = upload(pixels, self._device).repeat_interleave(rows, dim=0)
        return self._maps[key]


class UNetSteering(Steering):
    """Stable Diffusion's: residuals of each skip connection and of the middle block."""

    def _added(self, number: int, call: Call) -> dict[str, list[Tensor]]:
        view, network = self._view, self.networks[number]
        sample: Tensor = view.argument("sample", call)
        rows, _, height, width = sample.shape
        down, middle = self._forwards[number](
            sample[:, : network.config.in_channels],  # a mask and the masked picture may lie behind the latents
            view.argument("timestep", call),
            encoder_hidden_states=view.argument("encoder_hidden_states", call),
            controlnet_cond=self._pixels(number, self._scale * width, self._scale * height, rows),
            conditioning_scale=self.controls[number].weight,
            added_cond_kwargs=view.argument("added_cond_kwargs", call),
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": [middle]}

    def _passed(self, summed: dict[str, list[Tensor]]) -> Mapping[str, Any]:
        return {name: added[0] if name.startswith("mid") else tuple(added) for name, added in summed.items()}

    def inputs(self, number: int, call: MetaCall) -> MetaCall:
        config, given = self.networks[number].config, dict(call[1])
        sample = given.pop("sample")
        sides = [self._scale * side for side in sample.shape[-2:]]
        hint = sample.new_empty((len(sample), config.conditioning_channels, *sides))
        return (sample[:, : config.in_channels],), {**given, "controlnet_cond": hint}


class FluxSteering(Steering):
    """Flux's: what is added to the image stream after each block.

    Its map is encoded as pictures are, unless it has layers of its own for that. Guidance in two calls adds in both
    what it computes with text, as diffusers' pipeline does.
    """

    def __init__(self, *given: Any, pipeline: Any, guidance_scale: float) -> None:
        super().__init__(*given)
        self._pipeline, self._guidance_scale = pipeline, guidance_scale
        transformer = pipeline.transformer  # whose blocks a cache hides while it computes
        self._blocks = {
            "controlnet_block_samples": len(transformer.transformer_blocks),
            "controlnet_single_block_samples": len(transformer.single_transformer_blocks),
        }
        self._with_text: Injection | None = None
        self._grid = (0, 0)  # height and width of the latents
        self._latents: dict[int, Tensor] = {}  # by network: (B, channels, height, width)

    def begin(self, place: Callable[[], tuple[int, int]], generators: Sequence[torch.Generator]) -> None:
        """The maps' latents are drawn from the generators before the run's own noise, as diffusers' pipelines do it."""
        from diffusers.pipelines.flux.pipeline_flux_controlnet import retrieve_latents

        super().begin(place, generators)
        vae = self._pipeline.vae
        for number, (one, network) in enumerate(zip(self.controls, self.networks, strict=True)):
            width, height = one.image.size
            self._grid = height // self._scale, width // self._scale
            if network.input_hint_block is None:
                pixels = 2 * self._pixels(number, width, height, len(generators)) - 1
                encoded = retrieve_latents(vae.encode(pixels.to(vae.dtype)), generator=list(generators))
                self._latents[number] = (encoded - vae.config.shift_factor) * vae.config.scaling_factor

    def injection(self, call: Call) -> Injection | None:
        if call.lane != WITHOUT_TEXT:
            self._with_text = super().injection(call)
        return self._with_text

    def _hint(self, number: int, call: Call) -> Tensor:
        tokens: Tensor = call.kwargs["hidden_states"]
        rows, (height, width) = len(tokens), self._grid
        if tokens.shape[1] != height * width // 4:  # a smaller size, whose positions multi-scale has just made
            height, width = (2 * (int(side) + 1) for side in call.kwargs["img_ids"].amax(0)[1:])
        if number not in self._latents:
            return 2 * self._pixels(number, self._scale * width, self._scale * height, rows) - 1
        latents = self._latents[number]
        if latents.shape[-2:] != (height, width):
            latents = functional.interpolate(latents, (height, width), mode="bilinear", antialias=True)
        packed: Tensor = self._pipeline._pack_latents(latents, rows, latents.shape[1], height, width)
        return packed

    def _added(self, number: int, call: Call) -> dict[str, list[Tensor]]:
        network, given = self.networks[number], call.kwargs
        tokens = given["hidden_states"]
        guidance = given.get("guidance") if network.config.guidance_embeds else None
        if network.config.guidance_embeds and guidance is None:
            guidance = tokens.new_full((len(tokens),), self._guidance_scale, dtype=torch.float32)
        names = ("encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
        samples = self._forwards[number](
            hidden_states=tokens[..., : network.config.in_channels],
            controlnet_cond=self._hint(number, call),
            conditioning_scale=self.controls[number].weight,
            guidance=guidance,
            return_dict=False,
            **{name: given[name] for name in names},
        )
        repeats = network.input_hint_block is not None
        return {
            name: _each(added, blocks, repeats)
            for (name, blocks), added in zip(self._blocks.items(), samples, strict=True)
            if added is not None
        }

    def inputs(self, number: int, call: MetaCall) -> MetaCall:
        network, given = self.networks[number], dict(call[1])
        tokens = given["hidden_states"][..., : network.config.in_channels]
        hint = tokens
        if network.input_hint_block is not None:
            sides = [self._scale * side for side in self._grid]
            hint = tokens.new_empty((len(tokens), 3, *sides))
        guidance = tokens.new_empty((len(tokens),)) if network.config.guidance_embeds else None
        given |= {"hidden_states": tokens, "controlnet_cond": hint, "guidance": guidance, "return_dict": False}
        given.pop("joint_attention_kwargs", None)
        return (), given


def _each(samples: Sequence[Tensor], blocks: int, repeats: bool) -> list[Tensor]:
    """Of a ControlNet of fewer layers, what is added after each of the transformer's blocks: diffusers' two rules."""
    if repeats:
        return [samples[block % len(samples)] for block in range(blocks)]
    interval = -(-blocks // len(samples))
    return [samples[block // interval] for block in range(blocks)]
