"""What the caches save and what they change, on the embedded models: measured beside predicted.

    python -m benchmarks.cache --repeats 10

Every setting draws the same prompt and seed in turn, uncached among them, so that a slow moment of the machine falls
on all alike; a speed-up is the median over the pictures of uncached by cached seconds in the denoising loop.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cache import CacheReport, CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.base import Generation, GenerationParams, LoadedModel
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.registry import Registry

UNCACHED = "uncached"
SETTINGS: Mapping[str, Mapping[str, CacheStrategy]] = {
    "deepcache": {
        UNCACHED: NoCache(),
        "max_quality 2/1": DeepCache(interval=2, depth=1),
        "balanced 3/2": DeepCache(interval=3, depth=2),
        "max_speed 5/3": DeepCache(interval=5, depth=3),
        "partial 3/2/200/800": DeepCache(interval=3, depth=2, start=200, end=800),
    },
    "first_block": {
        UNCACHED: NoCache(),
        **{f"threshold {value}": FirstBlockCache(threshold=value) for value in (0.03, 0.05, 0.1, 0.2, 0.3)},
    },
}
PROMPTS = (
    "a misty forest at twilight",
    "a clear sea at noon",
    "snowy mountains at dawn",
    "a stormy island at sunset",
    "a starry desert at night",
    "misty hills at dawn",
    "a snowy forest at night",
    "clear mountains at sunset",
)


@dataclass(slots=True)
class Measurements:
    """One setting's runs, a picture each."""

    seconds: list[float] = field(default_factory=list)
    reports: list[CacheReport] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def add(self, run: Generation) -> None:
        self.seconds.append(run.timings.denoise_seconds)
        self.reports += run.reports
        self.images += run.images

    def against(self, uncached: Measurements) -> dict[str, Any]:
        """A row of the result; `psnr_db` is the mean over the pictures that differ, None if none does."""
        speedups = [base / own for base, own in zip(uncached.seconds, self.seconds, strict=True)]
        distances = [psnr(base, own) for base, own in zip(uncached.images, self.images, strict=True)]
        finite = [distance for distance in distances if distance is not None]
        predicted = [report.predicted_speedup for report in self.reports]
        known = [value for value in predicted if value is not None]
        return {
            "denoise_seconds": round(statistics.median(self.seconds), 4),
            "speedup": round(statistics.median(speedups), 3),
            "predicted_speedup": round(statistics.mean(known), 3) if len(known) == len(predicted) else None,
            "hit_rate": round(statistics.mean(report.hit_rate for report in self.reports), 3),
            "psnr_db": round(statistics.mean(finite), 2) if finite else None,
            "identical": len(distances) - len(finite),
        }


def psnr(reference: Image.Image, picture: Image.Image) -> float | None:
    """Peak signal-to-noise ratio in dB of 8-bit RGB; None for equal pictures."""
    error = np.mean((np.asarray(reference, float) - np.asarray(picture, float)) ** 2)
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def measure(
    model: LoadedModel, params: GenerationParams, settings: Mapping[str, CacheStrategy], pictures: Iterable[int]
) -> dict[str, Measurements]:
    """Each setting once for warm-up, then one run a setting for each picture's number, the first one rotating."""
    for strategy in settings.values():
        model.generate(params, strategy, lambda step: None)
    results = {name: Measurements() for name in settings}
    names = list(settings)
    for number in pictures:
        picture = replace(params, prompt=PROMPTS[number % len(PROMPTS)], seeds=(number,))
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            results[name].add(model.generate(picture, settings[name], lambda step: None))
    return results


def processor() -> str:
    """The CPU's name; Linux keeps it where `platform` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    result = Table("setting", "denoise s", "speed-up", "predicted", "hit rate", "PSNR dB", title=title)
    for column in result.columns[1:]:
        column.justify = "right"
    for name, row in rows.items():
        quality = "same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        predicted = "–" if row["predicted_speedup"] is None else f"{row['predicted_speedup']:.2f}×"
        result.add_row(
            name,
            f"{row['denoise_seconds']:.3f}",
            f"{row['speedup']:.2f}×",
            predicted,
            f"{row['hit_rate']:.2f}",
            quality,
        )
    return result


def main(
    model: Annotated[list[str] | None, typer.Option(help="Name of a model; repeat for several. Default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pictures a setting, each of another prompt and seed.")] = 5,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="A sampler's name. Default: the model's own.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
) -> None:
    """Measure the caches on the embedded models; a table a model, and one JSON object as the last line."""
    registry = Registry(SPECS, DEFAULT, DEFAULT_FLUX, device)
    console = Console(stderr=True)
    results: dict[str, Any] = {}
    for name in model or registry.names:
        spec, family = registry.spec(name), registry.family(name)
        width, height = spec.render_sizes[0] if spec.render_sizes else (family.native_size, family.native_size)
        params = GenerationParams(
            prompt=PROMPTS[0],
            width=width,
            height=height,
            steps=steps or spec.steps or family.steps,
            guidance_scale=family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale,
            sampler=sampler,
        )
        pictures = track(range(repeats), description=name, console=console)
        runs = measure(registry.get(name), params, SETTINGS[family.cache], pictures)
        rows = {setting: run.against(runs[UNCACHED]) for setting, run in runs.items()}
        title = f"{name}, {width}×{height}, {params.steps} steps, guidance {params.guidance_scale}, {repeats} pictures"
        Console().print(table(title, rows))
        results[name] = {
            "width": width,
            "height": height,
            "steps": params.steps,
            "guidance_scale": params.guidance_scale,
            "sampler": sampler,
            "settings": rows,
        }
    print(json.dumps({"benchmark": "cache", "repeats": repeats, "machine": machine(device), "models": results}))


if __name__ == "__main__":
    typer.run(main)
