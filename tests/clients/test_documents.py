"""Every curl command and client of README.md and docs/api.md, run against a server; every address has a command."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.client import Client, Fields
from app.http.app import create_app
from app.http.schemas import GenerateRequest
from app.settings import Settings
from benchmarks.server import Server, wait_for
from tests.app.fakes import FakeEngine
from tests.clients.test_client import address_of

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://localhost:7861"
HOST = 'host="localhost", port=7861'
# A refusal ends the script, and with it the test.
PROLOGUE = 'set -euo pipefail\ncurl() { command curl --fail-with-body --silent --show-error --max-time 60 "$@"; }\n'


def blocks(document: str, language: str = "bash") -> list[str]:
    """Those that speak with a server."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for block in found if ADDRESS in block or HOST in block]


def in_documents(language: str) -> list[str]:
    return [block for document in ("README.md", "docs/api.md") for block in blocks(document, language)]


def asked(block: str) -> set[tuple[str, str]]:
    """Method and path of each command, without its query."""
    found: set[tuple[str, str]] = set()
    for words in _commands(block):
        paths = [word.removeprefix(ADDRESS).partition("?")[0] for word in words if word.startswith(ADDRESS)]
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if {"-d", "-F"} & {*words} else "GET"
        found.update((method, path) for path in paths)
    return found


def _commands(block: str) -> list[list[str]]:
    commands: list[list[str]] = []
    for word in shlex.split(block, comments=True):
        if word.endswith("curl"):
            commands.append([])
        if commands:
            commands[-1].append(word)
    return commands


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", in_documents("bash"), ids=lambda text: text.strip().splitlines()[0][:60])
def test_the_command_does_what_is_said(server: Server, block: str) -> None:
    """In the server's folder, where the log is. Where the block makes no job, $ID is one that takes long.

    The log has a line of a request, whichever blocks came before.
    """
    environment = {**os.environ, "KEY": "none"}
    lasting = "$ID" in block and "ID=" not in block
    with Client(address_of(server)) as client:
        if "server.log" in block:
            client.generate("a")
            wait_for(lambda: "cache strategy=" in server.log, 30, "the log's line")
        if lasting:
            environment["ID"] = client.submit("a", model="slow", steps=150, num_images=10).id
        script = PROLOGUE + block.replace(ADDRESS, address_of(server))
        ran = subprocess.run(
            ["bash", "-c", script], cwd=server.folder, env=environment, capture_output=True, text=True, timeout=120
        )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr
    if ("DELETE", "/api/jobs/$ID") in asked(block):
        assert json.loads(ran.stdout)["state"] == "cancelled"


@pytest.mark.parametrize("block", in_documents("python"), ids=lambda text: text.strip().splitlines()[0][:60])
def test_the_client_shown_draws_with_a_cache(server: Server, block: str) -> None:
    host, port = server.address
    script = block.replace(ADDRESS, address_of(server)).replace(HOST, f'host="{host}", port={port}')
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "0.65" in ran.stdout


def test_every_address_has_a_command() -> None:
    described = create_app(Settings(_env_file=None), FakeEngine()).openapi()["paths"]  # type: ignore[call-arg]
    wanted = {(method.upper(), path) for path, operations in described.items() for method in operations}
    commands = set().union(*(asked(block) for block in blocks("docs/api.md")))
    lists = {
        ("GET", f"/sdapi/v1/{name}")
        for name in re.findall(r"for list in (.*?);", "".join(blocks("docs/api.md")))[0].split()
    }
    shown = {(method, re.sub(r"\$ID", "1", path)) for method, path in commands} | lists
    missing = {
        (method, path)
        for method, path in wanted
        if not any(method == m and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), p) for m, p in shown)
    }
    assert missing == set()


def test_the_errors_of_the_table_are_those_that_there_are() -> None:
    from app.errors import ServiceError

    def tree(kind: type[ServiceError]) -> list[type[ServiceError]]:
        return [kind, *(below for one in kind.__subclasses__() for below in tree(one))]

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([0-9, ]+) \| (`.*?`) \|", text, re.MULTILINE)
    told = {
        kind: set(map(int, statuses.split(","))) for statuses, kinds in rows for kind in re.findall(r"`(\w+)`", kinds)
    }
    there = {error.type: error.status for error in tree(ServiceError) if error.__module__ == "app.errors"}
    assert set(told) == set(there)
    assert {kind for kind, status in there.items() if status not in told[kind]} == set()


def test_the_clients_types_and_the_tables_of_fields_are_those_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python docs/fields.py` writes them."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    fields = importlib.import_module("fields")
    for path, written in ((fields.CLIENT, fields.client), (fields.PAGE, fields.page)):
        text = path.read_text(encoding="utf-8")
        assert written(text) == text, path.name
    assert {"prompt", *Fields.__annotations__} == set(GenerateRequest.model_fields)
    listed = re.findall(r"^\| `(\w+)` \| .+? \| .+? \| .+ \|$", fields.PAGE.read_text(encoding="utf-8"), re.M)
    assert set(GenerateRequest.model_fields) <= set(listed)
    sys.modules.pop("fields")


def test_fields_named_in_the_document_exist() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`?\"?((?:deepcache|fbcache)_[a-z_]+)", text)) <= set(GenerateRequest.model_fields)
