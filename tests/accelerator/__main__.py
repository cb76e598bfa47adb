"""python -m tests.accelerator waits|memory|cards: what the simulated device tells, as tables in Markdown.

python -m tests.accelerator counts NAME...: the rows of benchmarks.gpu.measure that it can tell, a JSON line each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks.chat import FLUX2_KLEIN, Z_IMAGE_TURBO
from benchmarks.geometries import ALL, FLUX_DEV, FLUX_SCHNELL, FLUX_SMALL, SD15, SDXL, SDXL_REFINER, Geometry
from benchmarks.gpu import measure
from benchmarks.gpu.measure import COUNTED, GEOMETRIES, Within, cached, ignore
from benchmarks.joint import JOINT
from cache import NoCache
from models.base import GenerationParams, Refiner
from models.loading.plan import Plan, Sizes, Work, choose
from models.sampling import samplers

from .device import Accelerator, Counts
from .loading import load
from .memory import peaks, request, strategies
from .waits import STRATEGIES, waits

STEPS = 4
DOCUMENT = {
    "sd15": ("3.2", "3.4"),
    "sdxl": ("6.8", "7.0"),
    "flux-dev": ("12.5", "12.6"),
    "flux-schnell": ("12.5", "12.6"),
}


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def waits_table(geometry: Geometry, table: Any, kind: str) -> Iterator[str]:
    """The waits of each of the run's steps."""
    yield row(f"{geometry.name}, waits of {STEPS} steps", *STRATEGIES[kind])
    yield row(*["---"] * (1 + len(STRATEGIES[kind])))
    device = Accelerator()
    with device, torch.no_grad():
        model = load(geometry)
        size = {"width": geometry.width, "height": geometry.height, "guidance_scale": geometry.guidance_scale}
        for sampler in table:
            params = GenerationParams(prompt="a cat", steps=STEPS, sampler=sampler, **size)
            found = [waits(device, model, params, strategy) for strategy in STRATEGIES[kind].values()]
            yield row(sampler, *(" ".join(str(sum(step.values())) for step in one.steps) for one in found))


def memory_table() -> Iterator[str]:
    """Gigabytes (10⁹ bytes)."""

    def gigabytes(count: int) -> str:
        return f"{count / 1e9:.2f}"

    four_bits = FLUX_SMALL["Q4_0"]
    plain: list[tuple[Geometry, dict[str, Any]]] = [(geometry, {}) for geometry in (*ALL, four_bits)]
    special = [(SD15, {"vae_tiling": True}), (SDXL, {"vae_tiling": True}), (FLUX_DEV, {"vae_tiling": True})]
    offloaded = [
        (one, {"offload": how}) for one in (SD15, SDXL, FLUX_DEV, FLUX_SCHNELL) for how in ("model", "sequential")
    ]
    offloaded += [
        (FLUX_DEV, {"offload": "group"}),
        (four_bits, {"offload": "model"}),
        (four_bits, {"offload": "group"}),
    ]
    document = [f"document, {name}" for name in ("none", "cache")]
    yield row(
        "model",
        "options",
        "weights",
        "text",
        "denoise",
        "denoise, cache",
        "kept",
        "decode",
        "counted to decode",
        *document,
    )
    yield row(*["---"] * 11)
    for geometry, options in [*plain, *special, *offloaded]:
        none, cached = (peaks(geometry, strategy, **options) for strategy in strategies(geometry).values())
        yield row(
            f"{geometry.name} {geometry.width}×{geometry.height}, {str(geometry.dtype).removeprefix('torch.')}",
            ", ".join(f"{name}: {value}" for name, value in options.items()) or "–",
            *map(gigabytes, (none.weights, none.text, none.denoise, cached.denoise, cached.kept, cached.decode)),
            gigabytes(none.weights + none.working),
            *DOCUMENT.get(geometry.name, ("–", "–")),
        )


CARDS = (8, 12, 16, 24)  # GiB
TAKEN = 0.7  # of them by the CUDA context and the screen


def cards_table() -> Iterator[str]:
    """Gigabytes (10⁹ bytes), with the family's cache by default."""
    yield row("model", "card", "plan", "moved for a prompt", "streamed a step", "counted", "peak")
    yield row(*["---"] * 7)
    for geometry in (SD15, SDXL, FLUX_DEV, *FLUX_SMALL.values(), *JOINT, FLUX2_KLEIN, Z_IMAGE_TURBO):
        device = Accelerator()
        with device, torch.no_grad():
            loaded = load(geometry, memory=0)
            model, residence = loaded.model, loaded.model.residence
            if residence is None:
                raise RuntimeError("nothing was planned")
            sizes, usual, work = residence.sizes, model.usual_work, model.work(geometry.width, geometry.height, 1)
            name = f"{geometry.name} {geometry.width}×{geometry.height}"
            for card in CARDS:
                plan = choose(sizes, usual, int((card - TAKEN) * 2**30))
                residence.settle(plan)
                new = replace(request(geometry, 3), prompt="cat " * card)  # one that is remembered would not be read
                with device.counting() as counts:
                    loaded.generate(new, strategies(geometry)["default"], lambda step: None)
                yield _card(name, card, plan, sizes, work, f"{counts.peak / 1e9:.1f}")
        if geometry is SDXL:
            yield from _refined_cards()


def _refined_cards() -> Iterator[str]:
    """SDXL and its refiner, by the plan for both, one after the other."""
    device = Accelerator()
    with device, torch.no_grad():
        base, refiner = load(SDXL, memory=0), load(SDXL_REFINER, memory=0)
        work = base.model.usual_work.beside(refiner.model.usual_work)
        params = replace(request(SDXL, 5), refiner=Refiner(model="sdxl-refiner"))
        for card in CARDS:
            base.model.memory = int((card - TAKEN) * 2**30)
            with device.counting() as counts, base.refined_by(refiner):
                joint = base.model.residence
                if joint is None:
                    raise RuntimeError("nothing was planned")
                base.generate(params, strategies(SDXL)["default"], lambda step: None)
                plan, sizes = joint.plan, joint.sizes
            name = f"sdxl {SDXL.width}×{SDXL.height}, refiner"
            yield _card(name, card, plan, sizes, work, f"{counts.peak / 1e9:.1f}")


def _card(name: str, card: int, plan: Plan, sizes: Sizes, work: Work, peak: str) -> str:
    streamed = plan.copied_each_step(sizes)
    moved = sum(sizes.weights[one] for one in plan.moved) - streamed
    figures = (f"{figure / 1e9:.1f}" for figure in (moved, streamed, plan.need(sizes, work)))
    return row(name, f"{card} GB", f"`{plan.offload}`" + (", tiles" if plan.tiled else ""), *figures, peak)


def counted(name: str) -> Iterator[str]:
    """Waits and launches of the denoising; bytes: weights, the peak of the denoising, and that of the whole run."""
    geometry, device = GEOMETRIES[name], Accelerator()
    with device, torch.no_grad():
        model = load(geometry)
        weights = device.live
        for setting, strategy in (("uncached", NoCache()), ("ours", cached(geometry))):
            found: list[Counts] = []

            @contextmanager
            def span(found: list[Counts] = found) -> Iterator[None]:
                with device.counting() as counts:
                    found.append(counts)
                    yield

            with device.counting() as whole:
                model.generate(measure.request(geometry, COUNTED), Within(strategy, span), ignore)
            row = {"waits": sum(found[0].waits.values()), "launches": found[0].launches, "weights_bytes": weights}
            peaks = {"peak_bytes": found[0].peak, "most_bytes": whole.peak}
            yield json.dumps({"model": name, "setting": setting, "simulated": True, **row, **peaks})


def main() -> None:
    match sys.argv[1:]:
        case ["waits"]:
            tables = [
                waits_table(SD15, samplers.DIFFUSION, "deepcache"),
                waits_table(FLUX_DEV, samplers.FLOW_MATCHING, "first_block"),
            ]
        case ["memory"]:
            tables = [memory_table()]
        case ["cards"]:
            tables = [cards_table()]
        case ["counts", *names]:
            tables = [counted(name) for name in names]
        case _:
            sys.exit(__doc__)
    for table in tables:
        for line in table:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
