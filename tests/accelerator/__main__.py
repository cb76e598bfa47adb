"""python -m tests.accelerator waits|memory: what the simulated device tells, as tables in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.geometries import ALL, FLUX_DEV, FLUX_SCHNELL, SD15, SDXL, Geometry
from models import samplers
from models.base import GenerationParams

from .device import Accelerator
from .loading import load
from .memory import peaks, strategies
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

    plain: list[tuple[Geometry, dict[str, Any]]] = [(geometry, {}) for geometry in ALL]
    special = [(SD15, {"vae_tiling": True}), (SDXL, {"vae_tiling": True}), (FLUX_DEV, {"vae_tiling": True})]
    offloaded = [
        (one, {"offload": how}) for one in (SD15, SDXL, FLUX_DEV, FLUX_SCHNELL) for how in ("model", "sequential")
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


def main() -> None:
    match sys.argv[1:]:
        case ["waits"]:
            tables = [
                waits_table(SD15, samplers.DIFFUSION, "deepcache"),
                waits_table(FLUX_DEV, samplers.FLOW_MATCHING, "first_block"),
            ]
        case ["memory"]:
            tables = [memory_table()]
        case _:
            sys.exit(__doc__)
    for table in tables:
        for line in table:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
