"""What was published beside `cache_speedup`, each as a front, on pictures that no calibration saw.

python -m benchmarks.cache.published tiny-sd --sampler dpmpp_2m --steps 30   measures, and writes its table and the plot
python -m benchmarks.cache.published tiny-sd --rounds 3                      times each method's front, too
python -m benchmarks.cache.published                                         writes those of what is known
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import bar
from app.engine.runner import RegistryRunner
from benchmarks.cache.front import Axis, at_speed, in_operations, in_time, unbeaten
from benchmarks.cache.measure import Bench, Result, bench_of, difference
from benchmarks.cache.page import draw
from benchmarks.cache.papers import calibrated, dicache, spectrum
from benchmarks.cache.peers import cache_dit, diffusers_hook, faster_cache, mag_ratios, published_deepcache, sea_cache
from benchmarks.cache.perceptual import MISSING
from benchmarks.cache.settings import FEWER, PLAIN, PRESET, WISHED, Setting, branches, presets, shares
from benchmarks.cache.wishes import wished
from benchmarks.report import ROOT, conditions, fill, machine, show, table
from cache import UNetDenoiser
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.registry import Registry
from models.sampling.samplers import names

FILE, PAGE = ROOT / "docs" / "published.json", ROOT / "docs" / "benchmarks.md"
_MEASURED_CODE = (
    "cache/**/*.py",
    "models/**/*.py",
    *(f"benchmarks/cache/{name}.py" for name in ("measure", "papers", "peers", "perceptual")),
)
WISHES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
COMPARED = (1.5, 2.0, 3.0, 4.0)  # of the wishes, those that the table holds against the others
FEWER_STEPS = (0.8, 0.6, 0.5, 0.4, 0.35, 0.25, 0.2, 0.15)
PLOTTED = {"tiny-sd-euler-20": "tiny-sd, Euler, 20 steps", "tiny-flux-euler-28": "tiny-flux, Euler, 28 steps"}
CALIBRATION = ("a calm lake at noon", 1000)  # of MagCache: a picture that is not among the others
WINDOWS = ((0.0, 5), (0.75, 5), (0.75, 3), (1.5, 3), (3.0, 3))  # Spectrum's growth and warm-up
CALIBRATORS = ("TaylorSeer", "FoCa", "DMD")


def peers(bench: Bench) -> Iterator[Setting]:
    """Each method over the range of its speeds, at its own values of what does not move it along."""
    for blend, method in ((1.0, "Spectrum"), (0.5, "Spectrum, half a line")):
        for growth, warm_up in WINDOWS:
            make = partial(spectrum, growth=growth, warm_up=warm_up, blend=blend)
            yield Setting(method, f"α{growth:g} W{warm_up}", make)
    denoiser = bench.model.denoiser
    yield from _of_unet(denoiser.branch_costs) if isinstance(denoiser, UNetDenoiser) else _of_transformer(bench)


def _of_unet(costs: Sequence[float]) -> Iterator[Setting]:
    for branch in branches(costs):
        for every in (2, 3, 4, 5):
            yield Setting(
                "DeepCache", f"N{every} b{branch}", partial(published_deepcache, interval=every, branch=branch)
            )
    for calibrator in CALIBRATORS:
        for every in (2, 3, 4):
            make = partial(calibrated, calibrator=f"{calibrator}Calibrator", interval=every, warm_up=3)
            yield Setting(f"cache-dit {calibrator}", f"N{every}", make)
    for every, below in ((2, 1000), (3, 1000), (5, 641), (5, 1000)):
        yield Setting("FasterCache", f"N{every} t<{below}", partial(faster_cache, every=every, below=below))


def _of_transformer(bench: Bench) -> Iterator[Setting]:
    import torch
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    for threshold in (0.05, 0.1, 0.2, 0.4, 0.8):
        yield Setting("DiCache", f"{threshold}", partial(dicache, threshold=threshold))
    for order, most, thresholds in ((1, 2, (0.1, 0.2, 0.3, 0.6)), (1, 0, (0.6, 1.0)), (0, 0, (0.2, 0.4, 0.6))):
        for threshold in thresholds:
            make = partial(sea_cache, threshold=threshold, order=order, most=most)
            yield Setting("SeaCache", f"{threshold} order {order}{f', {most} in a row' if most else ''}", make)
    steps = bench.params.steps
    ratios = mag_ratios(bench.model.pipeline, steps, lambda peer: bench._draw(PLAIN, peer, *CALIBRATION))  # type: ignore[arg-type]
    for threshold, most in ((0.03, 3), (0.12, 3), (0.5, 5), (1.0, 7)):
        config: Any = MagCacheConfig(
            threshold=threshold, max_skip_steps=most, num_inference_steps=steps, mag_ratios=ratios
        )
        yield Setting("MagCache", f"{threshold} K{most}", partial(diffusers_hook, config=config))
    for threshold in (0.05, 0.1, 0.2, 0.3, 0.5):
        config = FirstBlockCacheConfig(threshold=threshold)
        yield Setting("First Block Cache", f"{threshold}", partial(diffusers_hook, config=config))
    for every in (2, 3, 4, 5, 6):  # lite, the whole output instead of each attention's: nearer at equal operations
        given: Any = {"cache_interval": every, "use_lite_mode": True, "taylor_factors_dtype": torch.float32}
        make = partial(diffusers_hook, config=TaylorSeerCacheConfig(**given))
        yield Setting("TaylorSeer lite", f"N{every}", make)
    for calibrator in CALIBRATORS:
        for threshold in (0.1, 0.25, 0.5, 1.0):
            pace = {"residual_diff_threshold": threshold, "max_warmup_steps": 4, "Fn_compute_blocks": 1}
            make = partial(cache_dit, settings=pace, calibrator=calibrator)
            yield Setting(f"cache-dit {calibrator}", f"{threshold}", make)
    yield Setting("FasterCache", "N2 t<1000", partial(faster_cache, every=2, below=1000))


def fingerprint(conditions: Mapping[str, Any], weights: Path) -> str:
    """Changes with the conditions, the code that is measured or measures, and the model's files."""
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True, default=str).encode())
    code = sorted(file for pattern in _MEASURED_CODE for file in ROOT.glob(pattern))
    for file in (*code, *sorted(file for file in weights.rglob("*") if file.is_file())):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def settings(bench: Bench, info: Any) -> list[Setting]:
    """All that is drawn, ours and fewer steps first."""
    named = [replace(one, method=PRESET) for one in presets(info.cache)[1:]]
    fewer = [Setting(FEWER, f"{n}", PLAIN.make, steps=n) for n in shares(bench.params.steps, FEWER_STEPS)]
    return [*(wished(info, bench, wish) for wish in WISHES), *fewer, *named, *peers(bench)]


def as_row(result: Result) -> dict[str, Any]:
    """Of a result what the tables and the plot read, in JSON."""
    rounded = {"psnr_db": [round(one, 2) for one in result.psnr_db], "lpips": [round(one, 5) for one in result.lpips]}
    told = {"steps": result.steps, "operations_speedup": round(result.operations_speedup, 4)}
    return {"method": result.method, "label": result.label, **told, "hit_rate": round(result.hit_rate, 4), **rounded}


def measure(bench: Bench, info: Any, kept: dict[str, Any], write: Callable[[], None]) -> None:
    """Draw what `kept`, the entry of this model, sampler and number of steps, lacks; `write` after each."""
    known = {(row["method"], row["label"]) for row in kept["points"]}
    missing = [one for one in settings(bench, info) if (one.method, one.label) not in known]
    with bar("drawing") as progress:
        progress.show(completed=0, total=len(missing))
        for setting in missing:
            progress.show(setting.name)
            kept["points"].append(as_row(bench.quality(setting)))
            write()
            progress.advance()


def time_fronts(bench: Bench, info: Any, kept: dict[str, Any], rounds: int, write: Callable[[], None]) -> None:
    """Take the seconds of wishes, presets and what stands on a front, where there are none yet; then `write`."""
    compared = {(one.method, one.label) for one in [*_given(kept), *chain.from_iterable(fronts(kept).values())]}
    missing = {(row["method"], row["label"]): row for row in kept["points"] if "seconds" not in row}
    chosen = [one for one in settings(bench, info) if (one.method, one.label) in compared & missing.keys()]
    rows = [missing[one.method, one.label] for one in chosen]
    if not rows:
        return
    with bar("timing") as progress:
        progress.show(completed=0, total=rounds)
        for times in bench.raced(chosen, rounds):
            for row, (own, uncached) in zip(rows, times, strict=True):
                row.setdefault("seconds", []).append(round(own, 4))
                row.setdefault("uncached_seconds", []).append(round(uncached, 4))
            progress.advance()
    kept["timed"] = conditions(machine())
    write()


def fronts(entry: Mapping[str, Any]) -> dict[str, list[Result]]:
    """Each method's points that none of its own beats, `cache_speedup` and fewer steps first. Presets are no front."""
    return _fronts([Result(**row) for row in entry["points"]])


def _fronts(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for one in results:
        found.setdefault(one.method, []).append(one)
    return {
        method: points if method == PRESET else unbeaten((one for one in points if one.acts), in_operations)
        for method, points in found.items()
    }


def rows(entry: Mapping[str, Any]) -> Iterator[str]:
    """Of `COMPARED` wishes: what was given, and what every other method has at as many operations."""
    found = fronts(entry)
    given = [wish for wish in _given(entry) if float(wish.label) in COMPARED]
    wished_for = [f"**{_told(one)}** at {one.operations_speedup:.2f}×{_in_seconds(one)}" for one in given]
    yield " | ".join([f"`{WISHED}`", _span(found[WISHED]), *wished_for])
    for method, front in found.items():
        if method not in (WISHED, PRESET):
            yield " | ".join([method, _span(front), *(_against(one, front) for one in given)])


def _in_seconds(one: Result) -> str:
    return f", {one.speedup:.2f}× in seconds" if one.seconds else ""


def _span(front: Sequence[Result]) -> str:
    speeds = dict.fromkeys(f"{in_operations(one):.2f}" for one in (front[0], front[-1]))
    return f"{'–'.join(speeds)}×"


def _against(one: Result, front: Sequence[Result]) -> str:
    other = at_speed(front, in_operations, one.operations_speedup)
    return f"{_told(other)}; {_gain(one, other)}" if other else "–"


def nearer(entry: Mapping[str, Any], axis: Axis) -> Iterator[str]:
    """What is nearer than a wish at the same speed, or a preset at no lower one, by more than chance."""
    known = [Result(**row) for row in entry["points"] if axis is in_operations or "seconds" in row]
    for one in _wishes(known):
        speed = axis(one)
        others = [(f"`{other.label}`", other) for other in known if other.method == PRESET and axis(other) >= speed]
        for method, front in _fronts(known).items():
            if method not in (WISHED, PRESET) and (other := at_speed(front, axis, speed)):
                others.append((method, other))
        for name, other in others:
            if difference(one, other)[2] < 0:
                yield f"{name} at {speed:.2f}×, by {_gain(other, one)} dB"


def _given(entry: Mapping[str, Any]) -> list[Result]:
    return _wishes(Result(**row) for row in entry["points"])


def _wishes(results: Iterable[Result]) -> list[Result]:
    """Slowest first: those drawn again stand last in the file."""
    return sorted((one for one in results if one.method == WISHED), key=lambda one: float(one.label))


def _told(one: Result) -> str:
    return f"{one.mean_psnr:.1f}" + (f", {statistics.mean(one.lpips):.4f}" if one.lpips else "")


def _gain(one: Result, other: Result) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*difference(one, other))


def part(entry: Mapping[str, Any]) -> list[str]:
    """The lines of a page."""
    columns = " | ".join(["method", "times as fast", *(f"asked {wish:g}×" for wish in COMPARED)])
    lines = [f"### {entry['said']}", "", *table(columns, rows(entry))]
    for what, axis in (("operations", in_operations), ("seconds", in_time))[: 2 if "timed" in entry else 1]:
        found = "; ".join(nearer(entry, axis)) or "none"
        lines.append(f"Nearer than `{WISHED}` at as many {what}, by more than chance: {found}.")
    lines.append(f"{len(entry['points'])} settings. {entry['conditions']}")
    return [*lines, *([f"Seconds: {entry['timed']}"] if "timed" in entry else []), ""]


def main(
    model: Annotated[str | None, typer.Argument(help="An embedded model. None: measure nothing.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Default: the model's.")] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Prompts with seeds.")] = 8,
    rounds: Annotated[int, typer.Option(min=0, help="Runs of each setting of a front whose seconds are taken.")] = 0,
    data: Annotated[Path, typer.Option(help="What was measured; a run goes on from it.")] = FILE,
    page: Annotated[Path, typer.Option(help="Its marked part is written anew, and its plot beside it.")] = PAGE,
) -> None:
    """Draw what every method makes of the same pictures; print tables and, last, one JSON line."""
    kept: dict[str, Any] = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}

    def write() -> None:
        lines = (f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in kept.items())
        data.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    if model is not None:
        registry = Registry(SPECS, DEFAULT, DEFAULT_FLUX, "cpu")
        info = RegistryRunner(registry, "CPU").catalogue().models[model]
        bench = bench_of(registry, model, pictures, steps)
        bench.params = replace(bench.params, sampler=sampler)
        sampling, _ = names(bench.model.pipeline.scheduler, bench.model.model.choices, sampler, None)
        where = f"{model}-{sampling}-{bench.params.steps}"
        mark = fingerprint({"params": asdict(bench.params), "pairs": bench.pairs}, registry.spec(model).source)
        if kept.get(where, {}).get("mark") != mark:
            told = f"`{model}`, {sampling}, {bench.params.steps} steps, {pictures} pictures"
            kept[where] = {"mark": mark, "said": told, "conditions": conditions(machine()), "points": []}
        measure(bench, info, kept[where], write)
        if rounds:
            time_fronts(bench, info, kept[where], rounds, write)
    lines = [line for entry in kept.values() for line in part(entry)]
    if not all(row["lpips"] for entry in kept.values() for row in entry["points"]):
        lines.append(MISSING)
    show(lines)
    fill(page, {"published": lines})
    panels = {title: fronts(kept[where]) for where, title in PLOTTED.items() if where in kept}
    if panels:
        draw(panels, page.parent / "images" / "fronts.png")
    print(json.dumps({"benchmark": "published", "entries": {where: len(one["points"]) for where, one in kept.items()}}))


if __name__ == "__main__":
    typer.run(main)
