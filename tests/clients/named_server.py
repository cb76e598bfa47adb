"""The fake server under the names that the documents use: `tiny-sd` and `tiny-flux`, with their samplers and sizes."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from app.engine.runner import RegistryRunner
from app.engine.supervisor import LocalEngine
from app.http.app import create_app
from app.http.server import serve_until_told
from app.log import logging_to
from app.settings import Settings
from cache import CacheStrategy
from models.base import Generation, GenerationParams, Step, StepHook
from models.sampling.samplers import DIFFUSION, FLOW_MATCHING, choices
from tests.app.fakes import MODELS, FakeModel, FakeRegistry


class PreviewingModel(FakeModel):
    """Every step has a preview, if they are asked for."""

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 24), "green").save(buffer, "JPEG")
        preview = buffer.getvalue() if params.preview else None
        return super().generate(
            params, strategy, lambda step: on_step(Step(step.index, step.total, step.decision, preview))
        )


class NamedRegistry(FakeRegistry):
    def __init__(self) -> None:
        super().__init__("tiny-sd")
        self.default_flux = "tiny-flux"
        self._own = {"tiny-sd": PreviewingModel(), "tiny-flux": PreviewingModel()}

    def get(self, name: str) -> FakeModel:
        return self._own.get(name) or super().get(name)

    def describe(self) -> list[dict[str, Any]]:
        rows = {row["name"]: row for row in super().describe() if row["name"] in MODELS}
        native = {"native_width": 192, "native_height": 128}
        sd = {**rows["fine"], **native, "name": "tiny-sd", "samplers": choices(DIFFUSION)}
        flux = {**rows["flux"], **native, "name": "tiny-flux", "samplers": choices(FLOW_MATCHING)}
        return [sd, flux, *rows.values()]


def named_runner(device: str) -> RegistryRunner:
    return RegistryRunner(NamedRegistry(), "fake device")


def main() -> None:
    settings = Settings(port=0)
    with logging_to(settings.log_folder, settings.log_level):
        engine = LocalEngine(named_runner, ["cpu"], queue_size=settings.queue_size, backoff=(0.01, 0.1))
        serve_until_told(create_app(settings, engine), settings, engine)


if __name__ == "__main__":
    main()
