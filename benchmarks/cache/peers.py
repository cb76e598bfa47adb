"""Published caches under the interface of our own, one adapter a peer, so that one driver runs them all.

A peer patches its network for good, as its users do, and patches none but its own: a twin over the same weights. For
the time of a run the twin takes the network's place in the pipeline; patching it is not part of any measured time.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from cache import CacheReport, Denoiser


def slot_of(host: Any) -> str:
    """The name under which a pipeline, or what stands for one, holds its denoiser."""
    return "unet" if hasattr(host, "unet") else "transformer"


def twin(network: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer."""
    shared = [*network.parameters(), *network.buffers()]
    copied: nn.Module = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    return copied


@dataclass(eq=False)
class Peer(ABC):
    """A cache strategy (`cache.CacheStrategy`) by someone else's code.

    host: the pipeline whose denoiser is replaced, or anything with `unet` or `transformer` and `scheduler`.
    steps: of each run; only cache-dit has to be told.
    """

    name: ClassVar[str]

    host: Any
    steps: int
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

    @abstractmethod
    def patch(self, network: nn.Module) -> None:
        """Enable the cache on `network`, once."""

    def begin(self, network: nn.Module) -> None:  # noqa: B027  # most peers need nothing
        """What the peer's user does before each run."""


@dataclass(eq=False)
class PublishedDeepCache(Peer):
    """PyPI `DeepCache` 0.1.1 (Ma et al. 2023)."""

    name: ClassVar[str] = "DeepCache"

    interval: int = 3
    branch: int = 0

    unet: nn.Module | None = field(default=None, init=False)

    @property
    def scheduler(self) -> Any:
        """The run's: the helper looks each timestep up in it."""
        return self.host.scheduler

    def patch(self, network: nn.Module) -> None:
        from DeepCache import DeepCacheSDHelper

        self.unet = network
        helper = DeepCacheSDHelper(pipe=self)  # of a pipeline it reads `unet` and `scheduler`
        helper.set_params(cache_interval=self.interval, cache_branch_id=self.branch)
        helper.enable()


@dataclass(eq=False)
class DiffusersHook(Peer):
    """A cache of diffusers by its configuration: FirstBlockCacheConfig, TaylorSeerCacheConfig."""

    name: ClassVar[str] = "diffusers"

    config: Any = None

    def patch(self, network: Any) -> None:
        network.enable_cache(self.config)

    def begin(self, network: Any) -> None:
        network._reset_stateful_cache()  # as the pipelines do after a whole run


@dataclass(eq=False)
class CacheDiT(Peer):
    """cache-dit 1.5.3, DBCache with or without its Taylor calibrator, on the network alone.

    settings: of DBCacheConfig; taylor: order of the calibrator, 0 for none.
    """

    name: ClassVar[str] = "cache-dit"

    settings: dict[str, Any] = field(default_factory=dict)
    taylor: int = 0

    def patch(self, network: nn.Module) -> None:
        self._told("enable_cache", network)

    def begin(self, network: nn.Module) -> None:
        self._told("refresh_context", network)

    def _told(self, what: str, network: nn.Module) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # it writes to stdout, where our JSON line goes
        import cache_dit

        configs: Any = {"cache_config": cache_dit.DBCacheConfig(num_inference_steps=self.steps, **self.settings)}
        if self.taylor:
            configs["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.taylor)
        getattr(cache_dit, what)(network, **configs)
