"""The real server as a process, with the embedded models: what the document promises a stranger."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import webuiapi
from PIL import Image, ImageChops, ImageStat
from prometheus_client.parser import text_string_to_metric_families

from tests.models import original

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180.0  # seconds; only keeps a broken server from hanging the suite
DOCUMENT = """{
        "prompt": "a misty forest at twilight",
        "width": 768,
        "height": 512,
        "deepcache_enabled": true,
        "deepcache_interval": 3,
        "deepcache_depth": 2
      }"""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def post(self, body: str | dict[str, Any]) -> dict[str, Any]:
        content = {"content": body} if isinstance(body, str) else {"json": body}
        response = self.client.post("/api/generate", headers={"content-type": "application/json"}, **content)  # type: ignore[arg-type]
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def worker(self) -> int:
        pid: int = self.client.get("/api/telemetry").json()["devices"][0]["pid"]
        return pid

    def lines(self) -> list[str]:
        """What `cat logs/server.log | grep -i "deepcache\\|cache"` prints."""
        return [line for line in self.log.read_text().splitlines() if re.search("deepcache|cache", line, re.IGNORECASE)]


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (result := found()):
        assert process.poll() is None, "the server ended by itself"
        assert time.monotonic() < deadline, "the server did not get ready"
        time.sleep(0.1)
    return result


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    log = folder / "logs" / "server.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WAVESPEED_", "LD_"))}
    environment |= {"PYTHONPATH": str(ROOT), "LD_SERVER_LOGLEVEL": "DEBUG", "WAVESPEED_DEVICE": "cpu"}
    command = [sys.executable, "-m", "app", "serve", "--port", "0"]
    with (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=stderr)
    try:
        address = wait_for(lambda: log.exists() and re.search(r"http://127\.0\.0\.1:\d+", log.read_text()), process)[0]
        with httpx.Client(base_url=address, timeout=PATIENCE) as client:
            wait_for(lambda: client.get("/readyz").status_code == 200, process)
            yield Server(process, client, log)
    finally:
        process.kill()
        process.wait()


def picture(answer: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["image"])))


def test_the_documents_request_draws_and_reports(server: Server) -> None:
    answer = server.post(DOCUMENT)
    image = picture(answer)
    assert (image.format, image.size) == ("PNG", (768, 512))
    cache = answer["cache"]
    assert (cache["strategy"], cache["computed"], cache["reused"], cache["hit_rate"]) == ("deepcache", 7, 13, 0.65)
    assert (cache["interval"], cache["depth"], cache["schedule"]) == (3, 2, "auto")
    assert (len(cache["decisions"]), cache["decisions"][0]) == (20, "C")
    assert cache["reuse_cost"] <= 0.25
    assert answer["model"] == "tiny-sd"
    assert any("768×512" in warning for warning in answer["warnings"])


def test_a_seed_draws_the_same_picture_and_a_neutral_cache_the_uncached_one(server: Server) -> None:
    request = {"prompt": "a misty forest at twilight", "width": 192, "height": 128, "seed": 3, "steps": 6}
    cached = {**request, "deepcache_enabled": True}
    first, plain, again = server.post(cached), server.post(request), server.post(cached)
    neutral = server.post({**cached, "deepcache_interval": 1})
    assert picture(first).tobytes() == picture(again).tobytes()
    assert picture(plain).tobytes() == picture(neutral).tobytes()
    assert picture(plain).tobytes() != picture(first).tobytes()


def test_flux_caches_by_itself(server: Server) -> None:
    answer = server.post({"prompt": "a misty forest at twilight", "width": 768, "height": 512, "flux_enabled": True})
    cache = answer["cache"]
    assert (answer["model"], cache["strategy"]) == ("tiny-flux", "first_block")
    assert picture(answer).size == (768, 512)
    assert len(cache["decisions"]) == cache["computed"] + cache["reused"] >= answer["steps"]
    assert cache["hit_rate"] == round(cache["reused"] / len(cache["decisions"]), 4)


def test_the_openai_package_draws_and_streams(server: Server) -> None:
    asked: dict[str, Any] = {"model": "tiny-sd", "prompt": "a misty forest at twilight", "size": "192x128"}
    extra = {"seed": 3, "deepcache_enabled": True, "steps": 10}
    with openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="none", timeout=PATIENCE) as client:
        events = list(client.images.generate(**asked, extra_body=extra, stream=True, partial_images=2))
        answer = client.images.generate(**asked, extra_body=extra)  # the same run: there would be no part to show
        extra["deepcache_enabled"] = False  # its predictions come nearer to the picture at every step
        uncached = list(client.images.generate(**asked, extra_body=extra, stream=True, partial_images=2))
    assert (answer.model_extra or {})["cache"]["hit_rate"] == 0.6
    *partial, whole = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    drawn = picture({"image": (answer.data or [])[0].b64_json})
    assert drawn.tobytes() == picture({"image": whole.b64_json}).tobytes()
    # The later a partial picture, the more it is like the whole one.
    *partial, whole = uncached
    drawn = picture({"image": whole.b64_json})
    small = [picture({"image": event.b64_json}).convert("RGB") for event in partial]
    off = [ImageStat.Stat(ImageChops.difference(drawn.resize(one.size), one)).mean for one in small]
    assert sum(off[1]) < sum(off[0])


def test_an_automatic1111_client_draws(server: Server) -> None:
    client = webuiapi.WebUIApi(baseurl=f"{server.client.base_url}/sdapi/v1", sampler="DPM++ 2M Karras")
    try:
        result = client.txt2img(
            prompt="a misty forest at twilight",
            width=192,
            height=128,
            seed=3,
            steps=9,
            override_settings={"deepcache_preset": "balanced", "deepcache_enabled": True},
        )
    finally:
        client.session.close()
    same = {"prompt": "a misty forest at twilight", "width": 192, "height": 128, "seed": 3, "cfg_scale": 7.0}
    same |= {"steps": 9, "sampler": "dpmpp_2m", "scheduler": "karras", "deepcache_enabled": True}
    assert result.image.tobytes() == picture(server.post(same)).tobytes()
    assert result.info["wavespeed"]["cache"]["hit_rate"] == 0.6667


def test_log_telemetry_and_metrics_say_the_same(server: Server) -> None:
    answer = server.post(DOCUMENT)
    telemetry = server.client.get("/api/telemetry").json()
    metrics = server.client.get("/metrics").text

    def mine() -> list[str]:
        return [line for line in server.lines() if f"request={answer['request_id']} " in line]

    # A thread writes the log: a line may come after the answer. The summary is a request's last one.
    summaries = wait_for(lambda: [line for line in mine() if "hit_rate=" in line], server.process)
    steps = [match[1] for line in mine() if (match := re.search(r"step=\d+/20 decision=(\w)", line))]
    assert "".join(steps) == answer["cache"]["decisions"]
    assert len(summaries) == 1
    assert re.search(r"cache strategy=deepcache .*computed=7 reused=13 hit_rate=0\.65", summaries[0])

    logged = {"computed": 0, "reused": 0}
    for line in server.lines():
        if match := re.search(r"strategy=deepcache .*computed=(\d+) reused=(\d+) hit_rate=", line):
            logged["computed"] += int(match[1])
            logged["reused"] += int(match[2])
    deepcache = telemetry["cache"]["deepcache"]
    assert (deepcache["computed_steps"], deepcache["reused_steps"]) == (logged["computed"], logged["reused"])
    assert deepcache["last"]["reused"] == 13
    counted = {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "wavespeed_cache_steps_total" and sample.labels["strategy"] == "deepcache"
    }
    assert counted == logged
    assert telemetry["devices"][0]["kind"] == "cpu"
    assert telemetry["memory_info"]["total_vram"] == 0


def test_a_checkpoint_dropped_into_the_folder_is_listed_drawn_replaced_and_gone(server: Server) -> None:
    folder = server.log.parents[1] / "checkpoints"
    (folder / "people").mkdir(parents=True)
    (folder / "broken.safetensors").write_bytes(b"")

    def rows() -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in server.client.get("/api/models").json()["models"]}

    request = {"prompt": "a cat", "model": "mine", "width": 64, "height": 64, "steps": 4, "seed": 1}
    file = folder / "people" / "mine.safetensors"
    original.write_stable_diffusion(file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)
    row = wait_for(lambda: rows().get("mine"), server.process)
    assert (row["family"], row["available"], row["loaded"], len(row["branches"])) == ("sd15", True, False, 12)
    assert rows()["broken"] == {
        "name": "broken",
        "available": False,
        "reason": "broken.safetensors is empty. Fetch it again.",
        "loaded": False,
    }
    refused = server.client.post("/api/generate", json={**request, "model": "broken"})
    assert (refused.status_code, "is empty. Fetch it again." in refused.text) == (404, True)

    plain, cached = server.post(request), server.post({**request, "deepcache_enabled": True, "deepcache_interval": 2})
    assert ImageStat.Stat(picture(plain)).stddev[0] > 1
    assert (cached["model"], cached["cache"]["decisions"]) == ("mine", "CCRCR")  # PNDM calls once more than it steps
    assert rows()["mine"]["loaded"]

    original.write_stable_diffusion(file.with_suffix(".part"), seed=1)
    file.with_suffix(".part").rename(file)
    assert server.post(request)["image"] != plain["image"]
    file.unlink()
    wait_for(lambda: "mine" not in rows(), server.process)
    assert server.client.post("/api/generate", json=request).status_code == 404
    assert server.post(DOCUMENT)["model"] == "tiny-sd"


def test_the_worker_killed_in_a_request_is_replaced_and_the_request_answered(server: Server) -> None:
    worker = server.worker()
    request = {"prompt": "a stormy sea at dawn", "steps": 30, "seed": 1}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, request)
        wait_for(lambda: server.client.get("/api/telemetry").json()["running_count"] == 1, server.process)
        os.kill(worker, signal.SIGKILL)
        assert len(answer.result()["image"]) > 1000
    assert server.worker() != worker
    assert server.process.poll() is None
    server.post({"prompt": "a stormy sea at dawn", "steps": 2})


def test_it_ends_when_told_and_takes_its_worker_along(server: Server) -> None:
    worker = psutil.Process(server.worker())
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) in (0, -signal.SIGTERM)
    assert not worker.is_running()
    assert "Traceback" not in server.log.read_text()
