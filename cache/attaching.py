"""A strategy and what it is to act on: a pipeline, a network or a view of one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .deepcache.schedule import WHOLE_SCHEDULE, Placement, ruled
from .errors import IncompatibleDenoiser
from .report import CacheReport
from .solver import responses, timesteps_of
from .strategy import CacheStrategy
from .views.base import Denoiser
from .views.transformer import TransformerDenoiser
from .views.unet import UNetDenoiser


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
        view: Denoiser = _unet(root, target, scheduler)
    else:
        view = TransformerDenoiser(root)
    return view if scheduler is None else view.sampled(lambda: responses(target.scheduler))


def _unet(root: nn.Module, pipeline: Any, scheduler: Any) -> UNetDenoiser:
    """The view of a UNet, which may lie in a pipeline with a scheduler."""
    training = getattr(getattr(scheduler, "config", None), "num_train_timesteps", WHOLE_SCHEDULE)
    if type(training) is not int or training < 1:
        raise IncompatibleDenoiser(
            f"{type(scheduler).__name__} says that the network was trained on {training!r} timesteps: give a "
            "UNetDenoiser of the network its num_train_timesteps."
        )

    def rule(timestep: float, interval: int, branch: int | None) -> Placement | None:
        timesteps = timesteps_of(pipeline.scheduler, timestep)
        return None if timesteps is None else ruled(timesteps, interval)

    def guided() -> bool:
        return bool(getattr(pipeline, "do_classifier_free_guidance", False))

    rule_if_known = None if scheduler is None else rule
    return UNetDenoiser(root, num_train_timesteps=training, rule=rule_if_known, guided=guided)


def attach(target: Any, strategy: CacheStrategy) -> AbstractContextManager[CacheReport]:
    """Attach `strategy` to a diffusers pipeline, a network or a Denoiser for one run.

    The context is one run: what the cache keeps is carried from call to call inside it and dropped at its end. Enter
    it anew for the next picture. A loop that calls the network for the conditional and the unconditional pass apart
    wraps each call in `root.cache_context(name)`, as diffusers' pipelines do. Raises IncompatibleDenoiser and
    AlreadyAttached.
    """
    return strategy.attach(view_of(target))
