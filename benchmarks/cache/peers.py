"""Published caches under the interface of our own, one function a peer, so that one driver runs them all.

A peer patches its network for good, as its users do, and patches none but its own: a twin over the same weights. For
the time of a run the twin takes the network's place in the pipeline; patching it is not part of any measured time.
"""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cache import CacheReport, Denoiser


def slot_of(host: Any) -> str:
    """The name under which a pipeline, or what stands for one, holds its denoiser."""
    return "unet" if hasattr(host, "unet") else "transformer"


def twin(network: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer.

    In a run of ours the network's `forward` is another one, which uploads a schedule's timesteps from main memory: a
    copy of that would call the network instead of the twin. The twin has its class's, and a hook that uploads.
    """
    shared = [*network.parameters(), *network.buffers()]
    copied: nn.Module = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    copied.__dict__.pop("forward", None)
    device = shared[0].device

    def upload(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))

    if device.type != "cpu":
        copied.register_forward_pre_hook(upload, with_kwargs=True)
    return copied


@dataclass(eq=False)
class Peer:
    """A cache strategy (`cache.CacheStrategy`) by someone else's code.

    host: the pipeline whose denoiser is replaced, or anything with `unet` or `transformer` and `scheduler`.
    patch: enables the cache on a network, once. begin: what the peer's user does before each run.
    """

    name: str
    host: Any
    patch: Callable[[Any], None]
    begin: Callable[[Any], None] = lambda network: None
    network: nn.Module | None = field(default=None, init=False)

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """One run. The report stays empty: what a peer did is seen from the operations it ran."""
        if self.network is None:
            self.network = twin(denoiser.root)
            self.patch(self.network)
        self.begin(self.network)
        slot = slot_of(self.host)
        own = getattr(self.host, slot)
        setattr(self.host, slot, self.network)
        try:
            yield CacheReport(self.name)
        finally:
            setattr(self.host, slot, own)


def published_deepcache(host: Any, steps: int, *, interval: int, branch: int) -> Peer:
    """PyPI `DeepCache` 0.1.1 (Ma et al. 2023)."""

    class Pipe:
        """What the helper reads of a pipeline; the scheduler is the run's, in which each timestep is looked up."""

        scheduler = property(lambda self: host.scheduler)

        def __init__(self, unet: nn.Module) -> None:
            self.unet = unet

    def patch(network: nn.Module) -> None:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=Pipe(network))
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()

    return Peer("DeepCache", host, patch)


def diffusers_hook(host: Any, steps: int, *, config: Any) -> Peer:
    """A cache of diffusers by its configuration; it is reset as the pipelines do after a whole run."""
    return Peer("diffusers", host, lambda network: network.enable_cache(config), _reset)


def _reset(network: Any) -> None:
    from diffusers.hooks import HookRegistry

    HookRegistry.check_if_exists_or_initialize(network).reset_stateful_hooks(recurse=True)


def sea_cache(host: Any, steps: int, *, threshold: float, order: int, most: int) -> Peer:
    """diffusers' SeaCache (Chung et al. 2026, arXiv:2602.18993): the gate of TeaCache after a filter like Wiener's.

    order, most: of the forecast, and of reused calls in a row, 0 for no limit: 1 and 2 as the hook comes, 0 and 0 as
    published for Flux. Flux has no adapter there, so the filter runs over the grid of its tokens, with the exponent 2
    of pictures.
    """

    def grid(network: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
        height, width = (int(size) + 1 for size in kwargs["img_ids"].amax(0)[1:])
        tokens: Tensor = kwargs["hidden_states"]
        return list(tokens.transpose(1, 2).unflatten(2, (1, height, width)))  # each (channels, 1, height, width)

    def patch(network: Any) -> None:
        from diffusers import SeaCacheConfig

        given: Any = {"residual_order": order, "max_consecutive_cached": most, "power_exp": 2.0}
        network.enable_cache(SeaCacheConfig(threshold=threshold, raw_vision_callback=grid, **given))

        def context(name: str) -> Any:
            """Flux's pipeline does not say where its loop is."""
            step, network.steps = network.steps, network.steps + 1
            where = {"step_index": step, "sigma": float(host.scheduler.sigmas[step]), "num_inference_steps": steps}
            return type(network).cache_context(network, name, **where)

        network.cache_context = context

    def begin(network: Any) -> None:
        network.steps = 0
        _reset(network)

    return Peer("SeaCache", host, patch, begin)


def faster_cache(host: Any, steps: int, *, every: int, below: float) -> Peer:
    """diffusers' FasterCache (Lyu et al. 2024, arXiv:2410.19355), in calls at timesteps below `below`.

    One in `every` runs whole. The others of a UNet run the half with text, and have the other by the difference in low
    and high frequencies; a transformer with distilled guidance forecasts its attention in every second one.
    """

    def patch(network: Any) -> None:
        from diffusers import FasterCacheConfig, apply_faster_cache

        now = {"timestep": 0.0}
        guided = slot_of(host) == "unet"

        def note(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if not guided:
                now["timestep"] = 1000 * float(kwargs["timestep"][0])  # which Flux is given as a share
                return None
            now["timestep"] = float(args[1])
            return (args[0], args[1].expand(len(args[0])), *args[2:]), kwargs  # the hook halves each tensor

        given: Any = {
            "current_timestep_callback": lambda: now["timestep"],
            "unconditional_batch_skip_range": every,
            "unconditional_batch_timestep_skip_range": (-1, below),
            "spatial_attention_block_skip_range": every,
            "spatial_attention_timestep_skip_range": (-1, below),
            "tensor_format": "BCHW",
            "is_guidance_distilled": not guided,
            "_unconditional_conditional_input_kwargs_identifiers": ("encoder_hidden_states",),
        }
        apply_faster_cache(network, FasterCacheConfig(**given))
        network.register_forward_pre_hook(note, with_kwargs=True)

    return Peer("FasterCache", host, patch, _reset)


def mag_ratios(host: Any, steps: int, draw: Callable[[Peer], Any]) -> list[float]:
    """What diffusers' MagCache (Ma et al. 2025, arXiv:2506.09045) wants to know of a model: by its own calibration.

    draw: draws one picture under a strategy.
    """
    from diffusers import MagCacheConfig

    with redirect_stdout(io.StringIO()) as told:
        draw(diffusers_hook(host, steps, config=MagCacheConfig(calibrate=True, num_inference_steps=steps)))
    ratios: list[float] = json.loads(next(line for line in told.getvalue().splitlines() if line.startswith("[1.0")))
    return ratios


def cache_dit(host: Any, steps: int, *, settings: dict[str, Any], calibrator: str | None = None) -> Peer:
    """cache-dit 1.5.3, DBCache on the network alone. calibrator: of its forecasts `TaylorSeer`, `FoCa` or `DMD`."""

    def tell(what: str, network: nn.Module) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # it writes to stdout, where our JSON line goes
        import cache_dit

        configs: Any = {"cache_config": cache_dit.DBCacheConfig(num_inference_steps=steps, **settings)}
        if calibrator:
            configs["calibrator_config"] = getattr(cache_dit, f"{calibrator}CalibratorConfig")()
        getattr(cache_dit, what)(network, **configs)

    patch, begin = (lambda network: tell("enable_cache", network)), (lambda network: tell("refresh_context", network))
    return Peer("cache-dit", host, patch, begin)
