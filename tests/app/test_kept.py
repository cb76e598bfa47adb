"""Requests that go on from an earlier run, over HTTP: the same file, told and counted as what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.engine.runner import RegistryRunner, runner_arguments
from app.settings import Settings
from models.base import ModelSpec
from models.registry import Registry
from tests.app.conftest import client_of
from tests.compatibility.conftest import RunnerEngine
from tests.models.conftest import small_folders  # noqa: F401  # a fixture

BODY = {"prompt": "a", "width": 64, "height": 64, "seed": 1, "steps": 4, "deepcache_enabled": True}


def engine_of(folder: Path, kept_bytes: int) -> RunnerEngine:
    specs = [ModelSpec(name="small", family="sd", source=folder)]
    runner = RegistryRunner(Registry(specs, "small", None, kept_bytes=kept_bytes), "CPU")
    return RunnerEngine(runner=runner, models=runner.catalogue())


async def test_the_same_request_again_is_the_same_file_and_told_as_reused(
    small_folders: dict[str, Path],  # noqa: F811
) -> None:
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    async with client_of(engine_of(small_folders["epsilon"], 2**20), api_keys=("one", "two")) as client:

        async def drawn(key: dict[str, str], **fields: object) -> dict[str, Any]:
            answer: dict[str, Any] = (await client.post("/api/generate", json={**BODY, **fields}, headers=key)).json()
            return answer

        first, again, foreign = await drawn(one), await drawn(one), await drawn(two)
        assert [answer["reused_run"] for answer in (first, again, foreign)] == [False, True, False]
        assert again["image"] == first["image"] == foreign["image"]  # the text in the file as well
        assert again["cache"] == first["cache"]
        assert again["timings"]["denoise_seconds"] == 0 < first["timings"]["denoise_seconds"]
        other_format = await drawn(one, output_format="webp", width=72)
        assert (other_format["reused_run"], other_format["image"] == first["image"]) == (False, False)
        assert (await drawn(one, output_format="webp"))["reused_run"]
        file = await client.post("/api/generate", json=BODY, headers={**one, "Accept": "image/png"})
        assert file.headers["X-WaveSpeed-Reused-Run"] == "true"
        seen = (await client.get("/api/telemetry", headers=one)).json()
        assert (seen["requests_processed"], seen["reused_runs"]) == (6, 3)
        assert (seen["cache"]["deepcache"]["computed_steps"], seen["cache"]["deepcache"]["reused_steps"]) == (6, 6)
        assert 'wavespeed_reused_runs_total{model="small"} 3.0' in (await client.get("/metrics")).text


async def test_it_can_be_turned_off(small_folders: dict[str, Path]) -> None:  # noqa: F811
    settings = Settings(_env_file=None, resume_bytes=0)  # type: ignore[call-arg]
    async with client_of(engine_of(small_folders["epsilon"], runner_arguments(settings)["kept_bytes"])) as client:
        answers = [(await client.post("/api/generate", json=BODY)).json() for _ in range(2)]
    assert [answer["reused_run"] for answer in answers] == [False, False]
    assert answers[0]["image"] == answers[1]["image"]
