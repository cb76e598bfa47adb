"""Every code block of the documents runs, or names nothing that is not there. tests/clients runs the curl commands."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from diffusers import StableDiffusionPipeline

from app.__main__ import cli
from app.settings import Settings, variable
from benchmarks.server import Server, running
from tests.models.conftest import sd_folder

__all__ = ["sd_folder"]

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ADDRESS = "http://localhost:7861"
NAMED = ("-m", "tests.clients.named_server")

# Python blocks that are not programs, by how they begin, each with the reason. A test sees that they could not run.
SHAPES = {
    "@dataclass(frozen=True, slots=True)\nclass FromNoise:": "shows a stage, without the imports of its file",
}
FOREIGN = re.compile(
    r"^(FASTAPI|OTEL|PIP)_|^(PYTHON|ID|TORCH_INDEX_URL)$"
)  # variables that are others' to define, or the reader's


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: found.start()].count("\n") + 1
        yield Block(str(path.relative_to(ROOT)), line, found[1], found[2])


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def is_shape(block: Block) -> bool:
    return any(block.text.startswith(beginning) for beginning in SHAPES)


def test_every_block_is_of_a_language_that_is_tested_here() -> None:
    assert [str(block) for block in BLOCKS if block not in of("python", "bash", "json", "toml", "yaml", "promql")] == []
    assert len(of("python")) > 2
    assert len(of("bash")) > 10


# Python


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(NAMED, WAVESPEED_DEVICE="cpu") as server:
        yield server


@pytest.mark.parametrize("block", [block for block in of("python") if not is_shape(block)], ids=str)
def test_python_runs_and_shows_something(
    block: Block, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`pipe` is a small random pipeline; at the address shown there is a server of fake models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")  # as in a checkout
    text, given = block.text, {}
    if re.search(r"\bpipe\b", text) and not re.search(r"\bpipe =", text):
        pipe = StableDiffusionPipeline.from_pretrained(request.getfixturevalue("sd_folder"), safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        given["pipe"] = pipe
    if "localhost" in text:
        host, port = request.getfixturevalue("server").address
        text = text.replace("localhost", host).replace("7861", str(port))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(text, str(block), "exec"), given)
    if "print(" in text:
        assert re.search(r"CR|0\.65", shown.getvalue()), f"no reuse in {shown.getvalue()!r}"


@pytest.mark.parametrize("beginning", SHAPES)
def test_what_is_not_run_could_not_be(beginning: str) -> None:
    """A block that has become a program, or has gone, leaves the list."""
    (block,) = (block for block in of("python") if block.text.startswith(beginning))
    with pytest.raises(NameError):
        exec(compile(block.text, str(block), "exec"), {})


# Shell


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell script, without comments, quoted programs kept as one word."""
    lexer = shlex.shlex(text.replace("\\\n", " ").replace("\n", "\n;"), posix=True, punctuation_chars=";|&()<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";|&()"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def named_in_prose(path: Path) -> Iterator[Block]:
    """`python -m …` and `scripts/…` between backticks."""
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"`((?:\.venv/bin/)?python\s+-m\s+(?:app|benchmarks)[^`]*|scripts/[^`]*)`", prose):
        yield Block(
            str(path.relative_to(ROOT)), prose[: found.start()].count("\n") + 1, "prose", " ".join(found[1].split())
        )


PROSE = [block for path in DOCUMENTS for block in named_in_prose(path)]
SCRIPTS = [*of("bash"), *PROSE]


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_shell_parses(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_what_shell_calls_is_there(block: Block) -> None:
    for words in commands(block.text):
        while words and re.match(r"[A-Z_]+=", words[0]):
            name = words.pop(0).partition("=")[0]
            assert FOREIGN.search(name) or name in {variable(field) for field in Settings.model_fields}, name
        if not words:
            continue
        program = words[0].removeprefix("./")
        if program.startswith("scripts/"):
            assert os.access(ROOT / program, os.X_OK), program
        elif re.fullmatch(r"(\.venv/bin/)?python3?", program) and words[1] == "-m":
            check_module(words[2], words[3:])
        elif words[:3] == ["docker", "compose", "up"]:
            services = set(yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"])
            assert {word for word in words[3:] if not word.startswith("-")} <= services


def check_module(module: str, arguments: list[str]) -> None:
    if module == "app":
        check_options(typer.main.get_command(cli), arguments)
    elif module.startswith("benchmarks"):
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        if spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
        assert spec is not None, f"{module} cannot be run"
        source = Path(str(spec.origin)).read_text(encoding="utf-8")
        for option in options(arguments):
            name = option.removeprefix("--")  # in typer's form or argparse's; a test of the benchmark's own runs it
            assert re.search(rf"\b{name.replace('-', '_')}:|\"{option}\"", source), f"{module} has no {option}"
    elif module != "pip":
        assert importlib.util.find_spec(module), module


def check_options(command: Any, arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("<"):
        return
    assert arguments[0] in command.commands, f"there is no command {arguments[0]}"
    chosen = command.commands[arguments[0]]
    known = {name for parameter in chosen.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    assert set(options(arguments)) <= known


def options(arguments: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_named_anywhere_are_settings(document: Path) -> None:
    named = set(re.findall(r"\b(?:WAVESPEED|LD)_[A-Z_]*[A-Z]\b", document.read_text(encoding="utf-8")))
    assert named <= {variable(field) for field in Settings.model_fields}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("python -m app compare x --presets y", "--presets"),
        ("scripts/nothing", "nothing"),
        ("WAVESPEED_NOTHING=1 scripts/run", "WAVESPEED_NOTHING"),
        ("python -m app paint x", "paint"),
        ("a | python -m benchmarks.soak --nothing", "--nothing"),
        ("docker compose up nothing", "nothing"),
    ],
)
def test_what_is_not_there_is_noticed(text: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        test_what_shell_calls_is_there(Block("here", 1, "bash", text))


# Data


@pytest.mark.parametrize("block", of("json", "toml", "yaml"), ids=str)
def test_data_parses(block: Block) -> None:
    readers: dict[str, Any] = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
    assert readers[block.language](block.text)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("block", of("promql"), ids=str)
def test_queries_are_valid(block: Block, tmp_path: Path) -> None:
    """promtool of Debian checks no bare query; a rule that records it is one that it does check."""
    rule = {"record": "a:b:c", "expr": block.text}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "documented", "rules": [rule]}]}))
    command = ["promtool", "check", "rules", "rules.yml"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
