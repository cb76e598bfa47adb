"""The HTTP API over models that are really there: embedded ones, and every published family at small width."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from app.engine.runner import RegistryRunner
from app.engine.types import Catalogue, Job, JobResult
from app.errors import Invalid
from models.base import ModelSpec
from models.embedded import SPECS
from models.errors import ModelError
from models.generation import LoadedModel
from models.registry import Registry
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.compatibility.rows import CHAT, PICTURE, WEIGHTS
from tests.models.conftest import family_folders, flux_folder, sd_folder, small_folders  # noqa: F401  # fixtures
from tests.models.families.chat import save_all


@dataclass
class RunnerEngine(FakeEngine):
    """Draws in this process: what the workers do, without the processes."""

    runner: RegistryRunner = field(kw_only=True)

    def _result(self, job: Job) -> JobResult:
        try:
            return self.runner.run(job, lambda step: None)
        except ModelError as error:
            raise Invalid(str(error), field=error.field) from None


@pytest.fixture(scope="session")
def registry(
    family_folders: dict[str, Path],  # noqa: F811
    small_folders: dict[str, Path],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Registry:
    folders = {**family_folders, **save_all(tmp_path_factory.mktemp("chat"))}
    published = ("sd15", "sd21", "sdxl", "sdxl-refiner", "flux-schnell", "flux-dev", *CHAT)
    specs = [ModelSpec(name=name, family=name, source=folders[name]) for name in published]
    small = ModelSpec(name="small-sd", family="sd", source=small_folders["epsilon"])
    return Registry([*SPECS, *specs, small], "tiny-sd", "tiny-flux")


@pytest.fixture(scope="session")
def catalogue(registry: Registry) -> Catalogue:
    """Compiling is tried up to what comes of dynamo, without code generation: so it takes seconds, and no compiler."""
    known = RegistryRunner(registry, "CPU").catalogue()
    for name in ("small-sd", "flux-dev"):
        compiled: Any = registry.get(name)
        compiled.model.compile_backend = "eager"
    return replace(known, models={name: replace(info, compilation=None) for name, info in known.models.items()})


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's folders, `loras/` and `embeddings/`, filled by `made_for` when a model is first tried."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("loras", "embeddings"):
        (folder / name).mkdir()
    return folder


@pytest.fixture
async def client(registry: Registry, catalogue: Catalogue, weights: Path) -> AsyncIterator[httpx.AsyncClient]:
    engine = RunnerEngine(models=catalogue, runner=RegistryRunner(registry, "CPU"))
    folders = {"lora_folder": str(weights / "loras"), "embedding_folder": str(weights / "embeddings")}
    async with client_of(engine, **folders) as client:
        yield client


def made_for(model: LoadedModel, name: str, weights: Path) -> None:
    """A random LoRA, and where the model takes one a random embedding, of the file name `name`."""
    lora = weights / "loras" / f"{name}.safetensors"
    if lora.exists():
        return
    generator = torch.Generator().manual_seed(0)
    pipeline: Any = model.pipeline  # type: ignore[attr-defined]
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    tensors = {}
    for path, module in model.denoiser.root.named_modules():
        if path.endswith((".to_q", ".to_v")):
            out, inner = module.weight.shape  # type: ignore[union-attr, misc]
            tensors[f"{component}.{path}.lora_A.weight"] = torch.randn(2, int(inner), generator=generator) * 0.2
            tensors[f"{component}.{path}.lora_B.weight"] = torch.randn(int(out), 2, generator=generator) * 0.2
    save_file(tensors, lora)
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders if encoder is not None]
    keys = ("emb_params",) if len(widths) == 1 else ("clip_l", "clip_g")
    vectors = {key: torch.randn(2, width, generator=generator) for key, width in zip(keys, widths, strict=True)}
    save_file(vectors, weights / "embeddings" / f"{name}.safetensors")


def picture(width: int, height: int) -> str:
    """Noise with a gradient, as base64 of a PNG."""
    pixels = np.random.default_rng(0).integers(0, 128, (height, width, 3), dtype=np.uint8)
    pixels += np.linspace(0, 127, width, dtype=np.uint8)[None, :, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def filled(value: Any, model: str, side: int) -> Any:
    """`value` with a picture and the model's own file name where the rows leave them open."""
    match value:
        case str():
            return picture(side, side) if value == PICTURE else value.replace(WEIGHTS, f"own-{model}")
        case dict():
            return {key: filled(part, model, side) for key, part in value.items()}
        case list():
            return [filled(part, model, side) for part in value]
    return value
