"""LoRAs and embeddings by name over HTTP: what reaches the job, what is refused, what is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.engine.runner import summarise
from app.engine.types import Job, JobResult
from app.jobs.record import drawn
from cache import CacheReport, NoCache
from models.base import FreeU, GenerationParams, Timings, Upscaler
from models.embedded import CONTROLNETS
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """The settings, as an operator writes them; the files are empty, since nothing reads them here."""
    for folder, names in (("loras", ("ink", "wash.v2", "sets/fog")), ("embeddings", ("bad-hands", "sets/style"))):
        (tmp_path / folder / "sets").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "secret.safetensors").write_bytes(b"")
    (tmp_path / "loras" / "way-out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (tmp_path / "loras" / "old.ckpt").write_bytes(b"")
    return {"lora_folder": str(tmp_path / "loras"), "embedding_folder": str(tmp_path / "embeddings")}


@pytest.fixture
async def client(engine: FakeEngine, folders: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine, **folders) as client:
        yield client


async def test_named_loras_reach_the_job_as_files(
    client: httpx.AsyncClient, engine: FakeEngine, folders: dict[str, str]
) -> None:
    loras = [{"name": "ink", "weight": 0.5}, {"name": "wash.v2.safetensors"}, {"name": "fog", "text_weight": 0.2}]
    response = await client.post("/api/generate", json={"prompt": "a", "loras": loras})
    assert response.status_code == 200
    (job,) = engine.submitted
    root = Path(folders["lora_folder"]).resolve()
    assert [(lora.name, lora.path, lora.weight, lora.text_weight) for lora in job.params.loras] == [
        ("ink", root / "ink.safetensors", 0.5, None),
        ("wash.v2", root / "wash.v2.safetensors", 1.0, None),
        ("sets/fog", root / "sets" / "fog.safetensors", 1.0, 0.2),
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inc", ["no LoRA 'inc'", "Nearest: ink"]),
        ("old", ["convert it to .safetensors"]),
        ("ink.pt", ["convert it to .safetensors"]),
        ("way-out", ["no LoRA"]),
        ("../secret", ["no LoRA"]),
        ("..\\secret", ["no LoRA"]),
        ("/etc/passwd", ["no LoRA"]),
        ("%2e%2e/secret", ["no LoRA"]),
        ("bad-hands", ["no LoRA"]),
    ],
)
async def test_a_name_that_is_none_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, folders: dict[str, str], name: str, words: list[str]
) -> None:
    response = await client.post("/api/generate", json={"prompt": "a", "loras": [{"name": "ink"}, {"name": name}]})
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["type"], error["field"]) == ("invalid", "loras.1.name")
    for word in words:
        assert word in error["message"]
    assert str(Path(folders["lora_folder"]).parent) not in response.text
    assert engine.submitted == []


async def test_an_embedding_is_used_where_a_prompt_holds_its_name(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post("/api/generate", json={"prompt": "in STYLE", "negative_prompt": "(bad-hands:1.2)"})
    await client.post("/api/generate", json={"prompt": "in styles, stylish"})
    first, second = engine.submitted
    assert [embedding.name for embedding in first.params.embeddings] == ["bad-hands", "style"]
    assert second.params.embeddings == ()


async def test_a_flux_model_takes_no_embedding_and_says_so(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = (await client.post("/api/generate", json={"prompt": "a style", "flux_enabled": True})).json()
    assert engine.submitted[0].params.embeddings == ()
    assert any("no embeddings" in sentence and "style" in sentence for sentence in body["warnings"])


async def test_the_names_are_listed(client: httpx.AsyncClient) -> None:
    response = await client.get("/api/adapters")
    assert response.json() == {
        "loras": ["ink", "sets/fog", "wash.v2"],
        "embeddings": ["bad-hands", "sets/style"],
        "upscalers": [],
        "controlnets": [*CONTROLNETS],
    }


async def test_without_folders_there_are_none(tmp_path: Path, engine: FakeEngine) -> None:
    async with client_of(engine, lora_folder=str(tmp_path / "no"), embedding_folder=str(tmp_path / "no")) as client:
        none = {name: [] for name in ("loras", "embeddings", "upscalers")}
        assert (await client.get("/api/adapters")).json() == {**none, "controlnets": [*CONTROLNETS]}
        response = await client.post("/api/generate", json={"prompt": "a", "loras": [{"name": "ink"}]})
        assert "The server has none" in response.json()["error"]["message"]


async def test_freeu_has_what_is_published_but_for_what_is_named(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/api/generate", json={"prompt": "a", "freeu": True, "freeu_b2": 1.2})
    assert engine.submitted[0].params.freeu == FreeU(b1=1.5, b2=1.2, s1=0.9, s2=0.2)
    answer = await client.post("/api/generate", json={"prompt": "a", "freeu_b2": 1.2})
    assert engine.submitted[1].params.freeu is None
    assert any("freeu_b2 had no effect" in sentence for sentence in answer.json()["warnings"])


async def test_clip_skip_and_guidance_rescale_reach_the_job(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/api/generate", json={"prompt": "a", "clip_skip": 2, "guidance_rescale": 0.5})
    params = engine.submitted[0].params
    assert (params.clip_skip, params.guidance_rescale) == (2, 0.5)


async def test_an_upscaler_is_found_by_its_name(tmp_path: Path, engine: FakeEngine) -> None:
    for name in ("4x-sharp.safetensors", "old.pth"):
        (tmp_path / name).touch()
    async with client_of(engine, upscaler_folder=str(tmp_path)) as client:
        assert (await client.get("/api/adapters")).json()["upscalers"] == ["4x-sharp"]
        listed = (await client.get("/sdapi/v1/upscalers")).json()
        assert [one["name"] for one in listed] == ["None", "Lanczos", "Nearest", "4x-sharp"]
        body = {"prompt": "a", "hires_fix": True, "hires_upscaler": "4x-sharp", "upscale": "4x-sharp"}
        await client.post("/api/generate", json=body)
        params = engine.submitted[0].params
        expected = Upscaler(name="4x-sharp", path=(tmp_path / "4x-sharp.safetensors").resolve())
        assert params.hires_upscaler == params.upscale == expected
        for field, name, words in (
            ("upscale", "4x-shrap", "Nearest: 4x-sharp"),
            ("hires_upscaler", "old.pth", "Pickled"),
            ("upscale", "../4x-sharp", "no upscaler"),
        ):
            answer = await client.post("/api/generate", json={"prompt": "a", "hires_fix": True, field: name})
            assert (answer.status_code, answer.json()["error"]["field"]) == (422, field)
            assert words in answer.json()["error"]["message"]
        answer = await client.post("/api/generate", json={"prompt": "a", "hires_upscaler": "4x-sharp"})
        assert any("hires_upscaler had no effect" in sentence for sentence in answer.json()["warnings"])
        theirs = {"prompt": "a", "enable_hr": True, "hr_upscaler": "4x-sharp", "denoising_strength": 0.5}
        assert (await client.post("/sdapi/v1/txt2img", json=theirs)).status_code == 200
        assert engine.submitted[-1].params.hires_upscaler == expected


def test_enlarged_pictures_are_told_at_their_size() -> None:
    job = Job(id="j", model="m", params=GenerationParams(prompt="a", width=64, height=96), strategy=NoCache())
    timings = Timings(text_seconds=0, denoise_seconds=0, decode_seconds=0)
    cache: Any = summarise([CacheReport("none")])
    for size, told in ((None, (64, 96)), ((128, 192), (128, 192))):
        result = JobResult(images=(b"",), cache=cache, timings=timings, batches=(1,), size=size)
        report = drawn(job, result, queue_seconds=0, total_seconds=0).report
        assert (report["width"], report["height"]) == told
