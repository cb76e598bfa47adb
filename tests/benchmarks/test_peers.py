"""Published caches under our interface: each changes no bit where it skips nothing, and forecasts by its formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MagCacheConfig
from torch import Tensor

from benchmarks.cache.measure import Bench, pairs
from benchmarks.cache.papers import Calibrator, Chebyshev, DiCache, calibrated, dicache, growing, spectrum
from benchmarks.cache.peers import Peer, cache_dit, diffusers_hook, faster_cache, mag_ratios, sea_cache
from benchmarks.cache.settings import PLAIN, Setting
from models.base import GenerationParams
from models.generation import LoadedModel

STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # FasterCache's own
needs_cache_dit = pytest.mark.skipif(find_spec("cache_dit") is None, reason="needs the bench extra")

Make = Callable[..., Peer]  # of the pipeline and the number of steps


def mag(host: Any, steps: int, *, threshold: float) -> Peer:
    given: Any = {"threshold": threshold, "num_inference_steps": steps, "mag_ratios": [1.0] + [0.99] * (steps - 1)}
    return diffusers_hook(host, steps, config=MagCacheConfig(**given))


def dit(host: Any, steps: int, *, threshold: float, calibrator: str) -> Peer:
    pace = {"residual_diff_threshold": threshold, "max_warmup_steps": 3, "Fn_compute_blocks": 1}
    return cache_dit(host, steps, settings=pace, calibrator=calibrator)


# Of each: settings by which every call runs whole, and others by which some do not.
OF_UNETS: dict[str, tuple[Make, Make]] = {
    "Spectrum": (partial(spectrum, growth=0, warm_up=STEPS), partial(spectrum, growth=0, warm_up=2)),
    "FasterCache": (partial(faster_cache, every=2, below=-1), partial(faster_cache, every=2, below=1000)),
}
OF_TRANSFORMERS: dict[str, tuple[Make, Make]] = {
    "Spectrum": OF_UNETS["Spectrum"],
    "FasterCache": (partial(faster_cache, every=2, below=-1), partial(faster_cache, every=2, below=700)),
    "DiCache": (partial(dicache, threshold=0), partial(dicache, threshold=10)),
    "SeaCache": (partial(sea_cache, threshold=0, order=0, most=0), partial(sea_cache, threshold=10, order=1, most=2)),
    "MagCache": (partial(mag, threshold=0), partial(mag, threshold=1)),
}
IN_CACHE_DIT = {
    name: (partial(dit, threshold=0, calibrator=name), partial(dit, threshold=10, calibrator=name))
    for name in ("TaylorSeer", "FoCa", "DMD")
}
CALIBRATED = {
    name: tuple(partial(calibrated, calibrator=f"{name}Calibrator", interval=n, warm_up=2) for n in (1, 2))
    for name in ("FoCa", "DMD")
}


def bench_of(model: LoadedModel, guidance_scale: float) -> Bench:
    params = GenerationParams(prompt="", steps=STEPS, width=32, height=32, guidance_scale=guidance_scale)
    return Bench(model, params, pairs(1))


@pytest.fixture(scope="module")
def on_unet(sd: LoadedModel) -> Bench:
    return bench_of(sd, 3.0)


@pytest.fixture(scope="module")
def on_transformer(flux: LoadedModel) -> Bench:
    return bench_of(flux, 1.0)  # which has no guidance in the network, and would be called twice a step


def held(bench: Bench, nothing: Make, some: Make) -> None:
    """`nothing` changes no bit and spares no operation; `some` does, and the same in each run."""
    whole = bench.quality(Setting("peer", "", nothing))
    assert (whole.identical, whole.operations_speedup) == (1, 1.0)
    twice = Bench(bench.model, bench.params, [*bench.pairs, *bench.pairs])
    (once, again), watched = twice.pictures(Setting("peer", "", some))
    assert np.array_equal(once, again)  # no run is left what another kept
    assert 0 < watched.hit_rate < 1
    assert not np.array_equal(once, bench.reference[0][0])


@pytest.mark.parametrize("name", OF_UNETS)
def test_a_peer_on_a_unet_is_exact_until_it_skips(on_unet: Bench, name: str) -> None:
    held(on_unet, *OF_UNETS[name])


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_peer_on_a_transformer_is_exact_until_it_skips(on_transformer: Bench, name: str) -> None:
    held(on_transformer, *OF_TRANSFORMERS[name])


@needs_cache_dit
@pytest.mark.parametrize("name", IN_CACHE_DIT)
def test_cache_dit_is_exact_until_it_skips(on_transformer: Bench, name: str) -> None:
    held(on_transformer, *IN_CACHE_DIT[name])


@needs_cache_dit
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibrator_on_a_unet_is_exact_until_it_skips(on_unet: Bench, name: str) -> None:
    held(on_unet, *CALIBRATED[name])


def test_magcache_calibrates_itself(on_transformer: Bench) -> None:
    bench = on_transformer
    ratios = mag_ratios(bench.model.pipeline, STEPS, lambda peer: bench._draw(PLAIN, peer, *bench.pairs[0]))
    assert len(ratios) == STEPS
    assert ratios[0] == 1
    assert all(0 < ratio < 10 for ratio in ratios)


@pytest.mark.parametrize(("growth", "passes"), [(0.75, 14), (3.0, 10)])
def test_spectrum_computes_as_often_as_its_authors_say(growth: float, passes: int) -> None:
    """Of 50 steps, by its repository's README."""
    assert len(growing(50, 5, 2, growth)) == passes


def test_spectrum_is_a_ridge_regression_over_the_whole_run() -> None:
    """Against least squares with a row √λ for each coefficient, in numpy's own polynomials."""
    calls, values = [0, 1, 2, 4, 7, 11], np.random.default_rng(0).normal(size=(6, 5))
    forecast = Chebyshev(20)
    for call, value in zip(calls, values, strict=True):
        forecast.add(call, torch.tensor(value))
    known = np.polynomial.chebyshev.chebvander(np.array(calls) / 10 - 1, 4)
    rows, sides = np.vstack([known, np.sqrt(0.1) * np.eye(5)]), np.vstack([values, np.zeros((5, 5))])
    wanted = np.polynomial.chebyshev.chebvander(13 / 10 - 1, 4) @ np.linalg.lstsq(rows, sides, rcond=None)[0]
    assert torch.allclose(forecast.at(13), torch.tensor(wanted), rtol=0, atol=1e-12)


def test_half_a_line_is_half_of_each() -> None:
    forecasts = [Chebyshev(20, blend) for blend in (0, 0.5, 1)]
    for forecast in forecasts:
        for call, value in ((0, 1.0), (2, 5.0), (4, 6.0)):
            forecast.add(call, torch.tensor([value], dtype=torch.float64))
    line, half, ridge = (float(forecast.at(7)) for forecast in forecasts)
    assert line == pytest.approx(7.5)
    assert half == pytest.approx((line + ridge) / 2)
    assert ridge != pytest.approx(line)


def test_dicache_goes_as_far_as_its_probe() -> None:
    """Numbers by hand: the residuals are 2, 6 of the whole and 1, 2 of the probe at the last two computed calls."""
    method = DiCache(20, threshold=0.5, retained=0.05)

    def call(number: int, probe: float) -> Tensor | None:
        return method.skipped(number, torch.zeros(1), torch.tensor([probe]))

    for number, (probe, whole) in enumerate([(1.0, 2.0), (2.0, 6.0)]):
        assert call(number, probe) is None
        method.computed(number, torch.zeros(1), torch.tensor([probe]), torch.tensor([whole]))
    assert float(call(2, 2.4) or 0) == pytest.approx(2 + 1.4 * 4)  # moved .2 of the probe: γ = 1.4 / 1
    assert float(call(3, 2.8) or 0) == pytest.approx(2 + 1.5 * 4)  # .2 + .167; γ = 1.8, bounded
    assert call(4, 3.2) is None  # .51 in all
    assert call(19, 3.2) is None  # the last one


@needs_cache_dit
def test_calibrators_are_exact_on_what_they_are_made_for() -> None:
    """FoCa on a line, DMD on decaying exponentials, both in a gap behind calls that were computed one by one."""
    foca, dmd = Calibrator("FoCaCalibrator"), Calibrator("DMDCalibrator")
    times = torch.arange(8, dtype=torch.float64)
    line = 3 + 2 * times
    decay = 0.9 ** times[:, None] * torch.tensor([[1.0, 0, 2]]) + 0.7 ** times[:, None] * torch.tensor([[0, 1.0, -1]])
    for call in range(6):
        foca.add(call, line[call : call + 1])
        dmd.add(call, decay[call][None])
    assert float(foca.at(6)) == pytest.approx(float(line[6]))
    assert torch.allclose(dmd.at(7), decay[7][None], atol=1e-5)
