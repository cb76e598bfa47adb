"""Time and memory of the caches at the geometry of large models, random weights, bfloat16, on a GPU.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny    tries the code on small networks

Pictures of random weights mean nothing, and a first block's residual of theirs need not fall below any useful
threshold: the first-block cache is therefore run at forced hit rates, and quality is measured elsewhere
(`benchmarks.cache`). A run is the denoising loop alone: the network as its pipeline calls it, and the scheduler.
"""

from __future__ import annotations

import json
import statistics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.cache.claims import PRESETS
from benchmarks.cache.measure import now
from benchmarks.cache.peers import CacheDiT, DiffusersHook, Peer, PublishedDeepCache
from benchmarks.geometry import GEOMETRIES, TINY, Geometry, Host, TransformerHost, UNetHost
from benchmarks.report import machine, show
from cache import CacheReport, CacheStrategy, DeepCache, FirstBlockCache, NoCache, TransformerDenoiser, UNetDenoiser
from cache.cost import deepest_branch

MIB = 2**20
NO_GPU = "No GPU was found, so nothing was measured: time and memory of one are what this benchmark is for."
STREAKS = (1, 2, 4)  # reused calls in a row


def strategies(host: Host, denoiser: UNetDenoiser | TransformerDenoiser) -> dict[str, CacheStrategy]:
    """What is measured on this host's network; a peer makes its twin when it first runs."""
    steps, found = host.geometry.steps, dict[str, CacheStrategy](uncached=NoCache())
    if isinstance(denoiser, UNetDenoiser):
        for name, (interval, depth, _) in PRESETS.items():
            found[f"{name} {interval}/{depth}, ours"] = DeepCache(interval=interval, depth=depth)
            if (branch := deepest_branch(denoiser.branch_costs, depth)) is not None:
                published = PublishedDeepCache(host, steps, interval=interval, branch=branch)
                found[f"{name}, DeepCache 0.1.1 b{branch}"] = published
        return found
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    always = 1e9  # a threshold that every residual stays below
    settings = {"residual_diff_threshold": always, "Fn_compute_blocks": 1, "max_warmup_steps": 1}
    for streak in STREAKS:
        name = f"{streak} of {streak + 1} reused"
        found[f"{name}, ours"] = FirstBlockCache(threshold=1.0, max_consecutive=streak)
        paced = settings | {"max_continuous_cached_steps": streak}
        found[f"{name}, cache-dit F1"] = CacheDiT(host, steps, settings=paced)
    hook = DiffusersHook(host, steps, config=FirstBlockCacheConfig(threshold=always))  # it has no cap
    taylor = DiffusersHook(host, steps, config=TaylorSeerCacheConfig(cache_interval=3))
    others = {"all but one reused, diffusers FirstBlockCache": hook, "interval 3, diffusers TaylorSeer": taylor}
    return found | others


def seconds_and_peak(host: Host, denoiser: Any, strategy: CacheStrategy) -> tuple[float, float, CacheReport]:
    """One run: seconds, peak memory above what is held before it in MiB (0 on a CPU), and the cache's report."""
    on_gpu, held, peak = host.device.startswith("cuda"), 0, 0
    with torch.no_grad(), strategy.attach(denoiser) as report:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(host.device)
            held = torch.cuda.memory_allocated(host.device)
        started = now()
        host.run()
        seconds = now() - started
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(host.device)
    return seconds, (peak - held) / MIB, report


def measure(geometry: Geometry, device: str, dtype: torch.dtype, repeats: int, console: Console) -> dict[str, Any]:
    """Rows by name; each run beside an uncached one, after a warm-up."""
    host: Any = (UNetHost if geometry.kind == "unet" else TransformerHost)(geometry, device, dtype)
    denoiser: Any = TransformerDenoiser(host.transformer) if geometry.kind == "transformer" else None
    if denoiser is None:
        native = geometry.config["sample_size"]
        denoiser = UNetDenoiser(host.unet, native_size=(native, native))
    uncached, rows = NoCache(), {}
    _, base_peak, _ = seconds_and_peak(host, denoiser, uncached)  # a warm-up, too
    listed = strategies(host, denoiser)
    for name, strategy in track(listed.items(), description=geometry.name, console=console):
        # From the second run on a peer holds what it kept in the first: its first one shows what it adds.
        _, peak, report = seconds_and_peak(host, denoiser, strategy)
        pairs = [[seconds_and_peak(host, denoiser, one)[0] for one in (strategy, uncached)] for _ in range(repeats)]
        known = bool(report.decisions)
        predicted = report.predicted_speedup if known else None
        rows[name] = {
            "seconds": round(statistics.median(own for own, _ in pairs), 4),
            "speedup": round(statistics.median(base / own for own, base in pairs), 3),
            "predicted_speedup": None if predicted is None else round(predicted, 3),
            "hit_rate": round(report.hit_rate, 3) if known else None,
            "peak_mib": round(peak, 1),
            "peak_above_uncached_mib": round(peak - base_peak, 1),
            "cache_mib": round(report.cache_bytes / MIB, 4) if known else None,
        }
        if isinstance(strategy, Peer):
            strategy.network = None  # with what it keeps
    return rows


def main(
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a setting, each beside an uncached one.")] = 5,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small networks, to try the code.")] = False,
) -> None:
    """Measure time and memory; a table a geometry, and one JSON object as the last line."""
    console = Console(stderr=True)
    if device.startswith("cuda") and not torch.cuda.is_available():
        console.print(NO_GPU)
        print(json.dumps({"benchmark": "gpu", "run": False, "reason": NO_GPU}))
        raise typer.Exit(1)
    results = {}
    for geometry in TINY if tiny else GEOMETRIES:
        rows = measure(geometry, device, torch.float32 if tiny else torch.bfloat16, repeats, console)
        lines = (" | ".join([name, *map(str, row.values())]).replace("None", "–") for name, row in rows.items())
        show(f"{geometry.name}, {geometry.steps} steps", " | ".join(["setting", *rows["uncached"]]), lines)
        results[geometry.name] = rows
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    print(json.dumps({"benchmark": "gpu", "run": True, "machine": machine(device), "models": results}))


if __name__ == "__main__":
    typer.run(main)
