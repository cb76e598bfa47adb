"""Pictures to bytes, with what made them written inside."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app import __version__
from app.engine.base import Job, OutputFormat

_QUALITY = 95


def encode(image: Image.Image, output_format: OutputFormat, text: Mapping[str, str] | None = None) -> bytes:
    """`text` becomes text chunks of a PNG; the other formats carry none."""
    buffer = io.BytesIO()
    if output_format == "png":
        chunks = PngInfo()
        for key, value in (text or {}).items():
            chunks.add_itxt(key, value) if not value.isascii() else chunks.add_text(key, value)
        image.save(buffer, "PNG", pnginfo=chunks)
    else:
        image.convert("RGB").save(buffer, output_format.upper(), quality=_QUALITY)
    return buffer.getvalue()


def metadata(job: Job, seed: int, cache: Mapping[str, object]) -> dict[str, str]:
    """A PNG's text chunks: `parameters` as AUTOMATIC1111's web UI writes it, and `wavespeed`, one JSON object."""
    params = job.params
    settings = {
        "Steps": params.steps,
        "Sampler": params.sampler or "default",
        "Schedule type": params.scheduler or "default",
        "CFG scale": params.guidance_scale,
        "Seed": seed,
        "Size": f"{params.width}x{params.height}",
        "Model": job.model,
        "Cache": job.strategy.name,
        "Version": f"WaveSpeed {__version__}",
    }
    # One line each, so that a prompt cannot pose as settings to those who read this text line by line.
    lines = [" ".join(params.prompt.split())]
    if params.negative_prompt:
        lines.append(f"Negative prompt: {' '.join(params.negative_prompt.split())}")
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items()))
    report = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "model": job.model,
        "seed": seed,
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "guidance_scale": params.guidance_scale,
        "sampler": params.sampler,
        "scheduler": params.scheduler,
        "cache": dict(cache),
        "version": __version__,
    }
    return {"parameters": "\n".join(lines), "wavespeed": json.dumps(report)}
