"""Models of the hub, fetched by the hub's own client from a small server that speaks as the hub does.

Each case is a process of its own: the client reads its address and cache folder when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import errors
from safetensors.torch import load_file

from models.base import Hub, ModelSpec
from models.errors import LoadFailed
from models.loading import hub

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import json, sys
from huggingface_hub import constants, file_download
from models.base import Hub, LoadHooks, ModelSpec
from models.errors import LoadFailed
from models.families import FAMILIES
answers = []
def full(*_, **__):
    with open("/dev/full", "wb") as disk:  # every write to it fails as one to a full disk does
        disk.write(b"x")
for place in sys.argv[1:]:
    if place == "offline":
        constants.HF_HUB_OFFLINE = True
        continue
    if place == "full":
        file_download.http_get, get = full, file_download.http_get
        continue
    if place == "freed":
        file_download.http_get = get
        continue
    spec = ModelSpec(name="far", family="sd15", source=Hub(*place.split("@")))
    heard = []
    try:
        costs = FAMILIES["sd15"].reuse_costs(spec)
        model = FAMILIES["sd15"].load(spec, "cpu", hooks=LoadHooks(stage=heard.append))
        total = sum(float(p.double().abs().sum()) for p in model.pipeline.unet.parameters())
        answers.append({"costs": len(costs), "heard": heard[0], "total": total})
    except LoadFailed as failure:
        answers.append(str(failure))
print(json.dumps(answers))
"""


class Handler(BaseHTTPRequestHandler):
    """`/api/models/…` lists a repository's files, `/…/resolve/…` gives one."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models/").strip("/")
        self.asked.append(path)
        repository, _, rest = path.partition("/tiny")
        if repository == "gated":
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif repository != "ours":
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "nowhere" in rest:
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/resolve/" in rest:
            file = self.folder / rest.split("/", 3)[3]
            if not file.is_file():
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            else:
                content = file.read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                self.reply(200, content if body else b"", {"ETag": f'"{etag}"'}, length=len(content))
        else:
            names = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
            if "/tree/" in rest:
                rows = [
                    {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0" * 40}
                    for name in names
                ]
                self.reply(200, json.dumps(rows).encode(), {})
            else:
                row = {"id": "ours/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.reply(200, json.dumps(row).encode(), {})

    def reply(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address(family_folders: dict[str, Path]) -> Iterator[str]:
    Handler.folder, Handler.asked = family_folders["sd15"], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load(*places: str, address: str, home: Path) -> list[Any]:
    """For each `repository@revision`: what was loaded, or the error."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *places],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def test_a_repository_is_fetched_once_and_every_refusal_is_told_with_its_remedy(
    address: str, tmp_path: Path, family_folders: dict[str, Path]
) -> None:
    places = ["gated/tiny@main", "absent/tiny@main", "ours/tiny@nowhere"]
    places += ["full", "ours/tiny@v1.0", "freed", "ours/tiny@v1.0"]
    places += ["offline", "ours/tiny@v1.0", "other/tiny@main"]
    gated, absent, nowhere, crowded, loaded, cached, unknown = load(*places, address=address, home=tmp_path)
    assert gated.startswith("The model 'far' could not be fetched from the hub's gated/tiny, revision main: it is")
    assert "gated. Accept its licence" in gated
    assert "no such repository, or it is private" in absent
    assert "no space left for it in the hub's cache" in crowded
    assert "no such revision" in nowhere
    weights = load_file(family_folders["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")
    total = sum(float(tensor.double().abs().sum()) for tensor in weights.values())
    assert loaded == {"costs": 12, "heard": "fetching from the hub", "total": pytest.approx(total)}
    assert any("v1.0" in path or COMMIT in path for path in Handler.asked)
    assert cached == loaded
    assert "the hub cannot be reached and its files are not in the cache" in unknown


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://hub/a/b"))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (errors.GatedRepoError("no", response=answer(401)), "it is gated"),
        (errors.RepositoryNotFoundError("no", response=answer(401)), "no such repository, or it is private"),
        (errors.RevisionNotFoundError("no", response=answer(404)), "no such revision"),
        (errors.RemoteEntryNotFoundError("no", response=answer(404)), "lacks a file"),
        (errors.LocalEntryNotFoundError("no"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("no"), "cannot be reached"),
        (errors.HfHubHTTPError("no", response=answer(403)), "Set HF_TOKEN"),
        (errors.HfHubHTTPError("Server melted\nmore", response=answer(500)), "Server melted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_of_the_client_is_a_sentence(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone, and under the OSError that diffusers wraps around it."""
    spec, source = ModelSpec(name="far", family="sd15", source=Hub("a/b")), Hub("a/b")

    def raising(*_: object, **__: object) -> None:
        raise error

    def wrapping(*_: object, **__: object) -> None:
        raise OSError("Cannot load model a/b") from error

    for fake in (raising, wrapping):
        monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
        with pytest.raises(LoadFailed) as failure:
            hub.fetch_file(spec, source, "model_index.json")
        if remedy != "Server melted" or fake is raising:
            assert remedy in str(failure.value)


def test_a_long_download_is_told_while_it_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "TELL_SECONDS", 0.01)
    heard: list[str] = []
    told = threading.Event()

    def hear(stage: str) -> None:
        heard.append(stage)
        if len(heard) > 1:
            told.set()

    class Pipeline:
        @staticmethod
        def download(repository: str, **options: object) -> str:
            with (blobs / "x.incomplete").open("wb") as file:
                file.truncate(3 * 2**29)  # sparse: no such space is taken
            assert told.wait(60)
            return str(tmp_path)

    spec = ModelSpec(name="far", family="sd15", source=Hub("a/b"))
    assert hub.fetch_pipeline(spec, Hub("a/b"), Pipeline, hear) == tmp_path
    assert heard == ["fetching from the hub", "fetching from the hub, 1.50 GiB so far"], "not again while nothing comes"
