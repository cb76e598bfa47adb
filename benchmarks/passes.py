"""The contact sheet of the passes, and what a cache saves in a request that combines them.

    python -m benchmarks.passes            draws docs/passes/contact-sheet.jpg, then measures
    python -m benchmarks.passes --no-sheet

Drawn with tiny-sd on the CPU. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file

from app.engine.runner import summarise_passes
from benchmarks.report import ROOT, machine
from cache import CacheStrategy, DeepCache, NoCache
from models import faces
from models.base import Generation, GenerationParams, Img2Img, LoadedModel, Lora, Multiscale, Step
from models.embedded import SPECS
from models.loading import quiet
from models.passes.adetailer import ADetailer, around
from models.passes.drawing import Clock, Drawing, Progress
from models.unet import SD

SHEET = ROOT / "docs" / "passes" / "contact-sheet.jpg"
WIDTH, HEIGHT, LABEL = 288, 192, 18  # of a picture on the sheet, and of the words above it
PROMPT, OTHER = "a misty forest at twilight", "clear mountains at sunset"
PARAMS = GenerationParams(prompt=PROMPT, width=768, height=512, steps=20, guidance_scale=3.0, seeds=(7,))
COMBINED = replace(PARAMS, hires_fix=True, multiscale=Multiscale())
RANK = 4  # of the LoRA, over the UNet's attention
Row = list[tuple[str, Image.Image]]


def ignore(step: Step) -> None:
    """A step hook that wants nothing."""


def rows(model: LoadedModel) -> list[Row]:
    def draw(**changes: Any) -> Image.Image:
        return model.generate(replace(PARAMS, **changes), NoCache(), ignore).images[0]

    upload = draw(prompt=OTHER, seeds=(3,))
    steps: list[Step] = []
    model.generate(replace(PARAMS, preview=True), NoCache(), steps.append)
    shown = [(step.index + 1, Image.open(BytesIO(step.preview))) for step in steps if step.preview is not None]
    redrawn = {share: draw(img2img=Img2Img(picture=upload, denoise=share)) for share in (0.3, 0.6, 0.9)}
    passes: dict[str, Any] = {
        "plain": {},
        "hires_fix": {"hires_fix": True},
        "multi-scale": {"multiscale": Multiscale()},
        "multi-scale, not intermittent": {"multiscale": Multiscale(intermittent=False)},
    }
    return [
        [(f"upload: {OTHER}", upload), *((f"img2img {share:g}: {PROMPT}", one) for share, one in redrawn.items())],
        [(name, draw(**changes)) for name, changes in passes.items()],
        [(f"preview, step {index}", picture) for index, picture in shown[:4]],
        detailed(model),
    ]


def detailed(model: Any) -> Row:
    """The pass alone, on scikit-image's photograph: tiny-sd itself draws nothing in which a face could be found."""
    from skimage.data import astronaut

    photograph = Image.fromarray(astronaut())
    params = replace(PARAMS, width=512, height=512, prompt="", guidance_scale=1.0)
    clock, progress = Clock(torch.device("cpu")), Progress(ignore, 0)
    with torch.no_grad(), quiet():
        drawing = Drawing(model, params, params.seeds, model._encode(params), NoCache(), (512, 512), clock, progress)
        drawing.images = [photograph]
        ADetailer().run(drawing)
    (box,) = faces.find(photograph)
    frame, boxed = around(box, photograph.size), photograph.copy()
    pen = ImageDraw.Draw(boxed)
    pen.rectangle([box.left, box.top, box.left + box.width, box.top + box.height], outline="red", width=4)
    pen.rectangle(frame, outline="yellow", width=3)
    return [
        ("photograph; face red, crop yellow", boxed),
        ("adetailer (tiny-sd knows no faces)", drawing.images[0]),
        ("crop before", photograph.crop(frame)),
        ("crop after", drawing.images[0].crop(frame)),
    ]


def sheet(drawn: list[Row]) -> Image.Image:
    whole = Image.new("RGB", (WIDTH * max(map(len, drawn)), (HEIGHT + LABEL) * len(drawn)), "white")
    pen = ImageDraw.Draw(whole)
    for y, row in enumerate(drawn):
        for x, (label, picture) in enumerate(row):
            fitted = ImageOps.contain(picture.convert("RGB"), (WIDTH, HEIGHT), Image.Resampling.LANCZOS)
            pen.text((x * WIDTH + 4, y * (HEIGHT + LABEL) + 3), label, fill="black")
            whole.paste(fitted, (x * WIDTH + (WIDTH - fitted.width) // 2, y * (HEIGHT + LABEL) + LABEL))
    return whole


def timed(model: LoadedModel, params: GenerationParams, strategy: CacheStrategy, repeats: int) -> dict[str, Any]:
    runs: list[Generation] = [model.generate(params, strategy, ignore) for _ in range(repeats + 1)]
    seconds = [run.timings.denoise_seconds for run in runs[1:]]  # the first one warms up
    return {"denoise_seconds": round(statistics.median(seconds), 3), "cache": summarise_passes(runs[-1].passes)}


def lora_of(model: Any, folder: Path) -> Lora:
    """A LoRA of random numbers in PEFT's layout, small enough to leave the scene: none was trained for these models."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for path, module in model.pipeline.unet.named_modules():
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            out, inputs = module.weight.shape
            for half, shape in (("lora_A", (RANK, inputs)), ("lora_B", (out, RANK))):
                tensors[f"unet.{path}.{half}.weight"] = torch.randn(*shape, generator=generator) * 0.02
    save_file(tensors, folder / "random.safetensors")
    return Lora(name="random", path=folder / "random.safetensors", weight=0.8)


def main(
    draw_sheet: Annotated[bool, typer.Option("--sheet/--no-sheet")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each setting, in turn.")] = 3,
) -> None:
    model = SD.load(next(spec for spec in SPECS if spec.name == "tiny-sd"), "cpu")
    if draw_sheet:
        SHEET.parent.mkdir(exist_ok=True)
        sheet(rows(model)).save(SHEET, quality=85, optimize=True)
        print(f"{SHEET}: {SHEET.stat().st_size // 1024} kB")
    cache = DeepCache(interval=3, depth=2)
    with TemporaryDirectory() as folder:
        lora = replace(COMBINED, loras=(lora_of(model, Path(folder)),))
        settings: dict[str, tuple[GenerationParams, CacheStrategy]] = {
            "plain": (PARAMS, NoCache()),
            "previews": (replace(PARAMS, preview=True), NoCache()),
            "multiscale": (replace(PARAMS, multiscale=Multiscale()), NoCache()),
            "deepcache": (PARAMS, cache),
            "hires_fix + multiscale": (COMBINED, NoCache()),
            "hires_fix + multiscale + deepcache": (COMBINED, cache),
            "hires_fix + multiscale + lora": (lora, NoCache()),
            "hires_fix + multiscale + lora + deepcache": (lora, cache),
        }
        results = {name: timed(model, params, strategy, repeats) for name, (params, strategy) in settings.items()}
    for name, result in results.items():
        print(f"{name}: {result['denoise_seconds']} s, predicted ×{result['cache']['predicted_speedup']}")
    print(json.dumps({"machine": machine(), "steps": PARAMS.steps, "seed": PARAMS.seeds[0], "results": results}))


if __name__ == "__main__":
    typer.run(main)
