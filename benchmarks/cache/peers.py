"""Published caches under the interface of our own, one function a peer, so that one driver runs them all.

A peer patches its network for good, as its users do, and patches none but its own: a twin over the same weights. For
the time of a run the twin takes the network's place in the pipeline; patching it is not part of any measured time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    patch, begin = (lambda network: network.enable_cache(config)), (lambda network: network._reset_stateful_cache())
    return Peer("diffusers", host, patch, begin)


def cache_dit(host: Any, steps: int, *, settings: dict[str, Any], taylor: int = 0) -> Peer:
    """cache-dit 1.5.3, DBCache on the network alone; `taylor`: the order of its calibrator, 0 for none."""

    def tell(what: str, network: nn.Module) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # it writes to stdout, where our JSON line goes
        import cache_dit

        configs: Any = {"cache_config": cache_dit.DBCacheConfig(num_inference_steps=steps, **settings)}
        if taylor:
            configs["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylor)
        getattr(cache_dit, what)(network, **configs)

    patch, begin = (lambda network: tell("enable_cache", network)), (lambda network: tell("refresh_context", network))
    return Peer("cache-dit", host, patch, begin)
