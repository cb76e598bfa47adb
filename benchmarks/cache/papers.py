"""Peers that no package brings, written from their papers and their authors' repositories, on a twin as in `peers.py`.

DiCache (Bu et al. 2025, arXiv:2508.17356) skips the blocks behind its probe. Spectrum (Han et al. 2026,
arXiv:2603.01623) skips all that lies before a network's last normalisation; so do cache-dit's calibrators where they
are put on a UNet, which cache-dit itself does not take.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.cache.peers import Peer
from cache import TransformerDenoiser
from cache.views.transformer import IMAGE


class Method(Protocol):
    """What decides about each call of a run, and forecasts. A new one is made for each run.

    x: what enters the network's blocks. probe: the same behind the first of them; x where a method wants no probe.
    """

    def skipped(self, call: int, x: Tensor, probe: Tensor) -> Tensor | None:
        """What would leave the last block, if call number `call`, from 0, is not to run the others; else None."""

    def computed(self, call: int, x: Tensor, probe: Tensor, y: Tensor) -> None:
        """Told of the calls that ran whole. y: what left the last block."""


class Forecast(Protocol):
    """What a tensor will be at a call that does not compute it, by its values at those that did."""

    def add(self, call: int, value: Tensor) -> None: ...

    def at(self, call: int) -> Tensor: ...


class DiCache:
    """The probe's distance says when (Online Probe Profiling), its residual how far (Cache Trajectory Alignment).

    When: while the sum of |p_k − p_(k−1)| / |p_(k−1)| (means, over calls k since the last computed one) is below
    `threshold`; never in the first `retained` of a run nor in its last call. How far: with r the probe's residual and R
    that of all blocks at the last two computed calls a and b, R_b + γ (R_a − R_b), γ = |r − r_b| / |r_a − r_b| within 1
    and 1.5. The choice that the authors' run_flux_dicache.py makes for Flux, with its bounds and retained share.
    """

    depth = 1

    def __init__(self, steps: int, threshold: float, retained: float = 0.2) -> None:
        self._last, self._first = steps - 1, int(retained * steps)
        self._threshold = threshold
        self._spent = 0.0
        self._before: Tensor | None = None  # the probe of the call before
        self._kept: list[tuple[Tensor, Tensor]] = []  # r and R of the last two computed calls

    def skipped(self, call: int, x: Tensor, probe: Tensor) -> Tensor | None:
        before, self._before = self._before, probe
        if before is None or call <= self._first or call == self._last:
            self._spent = 0.0
            return None
        self._spent += float(_distance(probe, before) / before.abs().mean())
        if not self._spent < self._threshold:
            self._spent = 0.0
            return None
        if len(self._kept) < 2:
            return x + self._kept[-1][1]
        (r_b, whole_b), (r_a, whole_a) = self._kept
        ahead = (_distance(probe - x, r_b) / _distance(r_a, r_b)).clip(1, 1.5)
        return x + whole_b + ahead * (whole_a - whole_b)

    def computed(self, call: int, x: Tensor, probe: Tensor, y: Tensor) -> None:
        self._kept = [*self._kept[-1:], (probe - x, y - x)]


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().mean()


class Chebyshev:
    """Spectrum's forecast: ridge regression on Chebyshev polynomials over the whole run.

    With τ = 2 k / steps − 1 for call k, T_0 to T_degree at the computed calls are the rows of X; the forecast is
    t (XᵀX + ridge I)⁻¹ Xᵀ H, t being the row of the asked call and H the values. `blend` of it, and of the line through
    the last two values the rest: 1 is the paper, less its repository's later advice.
    """

    def __init__(self, steps: int, blend: float = 1.0, degree: int = 4, ridge: float = 0.1) -> None:
        self._steps, self._blend, self._degree, self._ridge = steps, blend, degree, ridge
        self._calls: list[int] = []
        self._values: list[Tensor] = []

    def _rows(self, calls: Collection[int]) -> np.ndarray:
        angles = np.arccos(2 * np.fromiter(calls, float) / self._steps - 1)
        return np.cos(angles[:, None] * np.arange(self._degree + 1))

    def add(self, call: int, value: Tensor) -> None:
        self._calls.append(call)
        self._values.append(value)

    def at(self, call: int) -> Tensor:
        known, wanted = self._rows(self._calls), self._rows([call])[0]
        shares = self._blend * known @ np.linalg.solve(known.T @ known + self._ridge * np.eye(len(wanted)), wanted)
        if len(self._calls) > 1:
            ahead = (call - self._calls[-1]) / (self._calls[-1] - self._calls[-2])
            shares[-2:] += (1 - self._blend) * np.array([-ahead, 1 + ahead])
        else:
            shares[-1] += 1 - self._blend
        weights = torch.as_tensor(shares, dtype=self._values[-1].dtype, device=self._values[-1].device)
        return torch.tensordot(weights, torch.stack(self._values), 1)


class Calibrator:
    """A calibrator of cache-dit 1.5.3 as a forecast: `FoCaCalibrator`, `DMDCalibrator`, `TaylorSeerCalibrator`."""

    def __init__(self, name: str) -> None:
        calibrators = importlib.import_module("cache_dit.caching.cache_contexts.calibrators")
        self._calibrator: Any = getattr(calibrators, name)()
        self._call = -1

    def _begin(self, call: int) -> None:
        while self._call < call:
            self._calibrator.mark_step_begin()
            self._call += 1

    def add(self, call: int, value: Tensor) -> None:
        self._begin(call)
        self._calibrator.update(value)

    def at(self, call: int) -> Tensor:
        self._begin(call)
        forecast: Tensor = self._calibrator.approximate()
        return forecast


class Scheduled:
    """Computes in the given calls, and forecasts what leaves the last block in the others."""

    depth = 0

    def __init__(self, forecast: Forecast, calls: Collection[int]) -> None:
        self._forecast, self._calls = forecast, calls

    def skipped(self, call: int, x: Tensor, probe: Tensor) -> Tensor | None:
        return None if call in self._calls else self._forecast.at(call)

    def computed(self, call: int, x: Tensor, probe: Tensor, y: Tensor) -> None:
        self._forecast.add(call, y)


def growing(steps: int, warm_up: int, window: float, growth: float) -> frozenset[int]:
    """Spectrum's computed calls (Appendix B.1): the first `warm_up`, then one in ⌊window⌋, widened by each of them."""
    calls, skipped = set(range(warm_up)), 0
    for call in range(warm_up, steps):
        if (skipped + 1) % math.floor(window) == 0:
            calls.add(call)
            skipped, window = 0, window + growth
        else:
            skipped += 1
    return frozenset(calls)


def spectrum(host: Any, steps: int, *, growth: float, warm_up: int, blend: float = 1.0) -> Peer:
    """window: 2, as published."""
    calls = growing(steps, warm_up, 2, growth)
    return _peer("Spectrum", host, lambda: Scheduled(Chebyshev(steps, blend), calls))


def dicache(host: Any, steps: int, *, threshold: float) -> Peer:
    return _peer("DiCache", host, lambda: DiCache(steps, threshold))


def calibrated(host: Any, steps: int, *, calibrator: str, interval: int, warm_up: int) -> Peer:
    """One call in `interval` computes, after the first `warm_up`."""
    calls = growing(steps, warm_up, interval, 0)
    return _peer(f"cache-dit {calibrator}", host, lambda: Scheduled(Calibrator(calibrator), calls))


def _peer(name: str, host: Any, make: Callable[[], Any]) -> Peer:
    skip = _skip_layers if hasattr(host, "unet") else _skip_blocks

    def begin(network: Any) -> None:
        network.method, network.call = make(), -1

    return Peer(name, host, skip, begin)


def _skip_layers(unet: Any) -> None:
    """A UNet whose skipped calls run its last normalisation and convolution alone."""
    whole, entered = unet.forward, {}
    unet.conv_norm_out.register_forward_pre_hook(lambda _, inputs: entered.update(y=inputs[0]))

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        unet.call += 1
        y = unet.method.skipped(unet.call, sample, sample)
        if y is None:
            output = whole(sample, *args, **kwargs)
            unet.method.computed(unet.call, sample, sample, entered["y"])
            return output
        return (unet.conv_out(unet.conv_act(unet.conv_norm_out(y))),)

    unet.forward = forward


def _skip_blocks(network: Any) -> None:
    """A transformer whose skipped calls run no block behind the probe. Text leaves the last block as it entered."""
    view = TransformerDenoiser(network)
    blocks = [block for blocks in view.blocks for block in blocks]
    now: dict[str, Any] = {}  # of this call: the image stream before the first block, behind the probe, in place of all

    def run(number: int, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        depth, streams = network.method.depth, view.inputs(args, kwargs)
        if number == 0:
            network.call += 1
            now["x"] = streams[IMAGE]
        if number == depth:
            now["probe"] = streams[IMAGE]
            now["y"] = network.method.skipped(network.call, now["x"], now["probe"])
        if number >= depth and now["y"] is not None:
            image = now["y"] if number == len(blocks) - 1 else streams[IMAGE]
            return view.output({**streams, IMAGE: image}, packed=len(streams) > 1)
        output = whole(*args, **kwargs)
        if number == len(blocks) - 1:
            network.method.computed(network.call, now["x"], now["probe"], view.results(output)[IMAGE])
        return output

    for number, block in enumerate(blocks):
        block.forward = partial(run, number, block.forward)
