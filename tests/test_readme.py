"""What the README, and the pages beside it that list things, show is what the code takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from app.errors import Invalid
from app.http.schemas import EXAMPLE, PRESETS, GenerateRequest, parse
from app.metrics import Metrics
from app.settings import Settings, variable
from cache.deepcache.schedule import Uniform, Window

ROOT = Path(__file__).resolve().parents[1]


def page(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


README, CACHING = page("README.md"), page("docs/caching.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def bodies() -> list[dict[str, object]]:
    """The JSON that the README's curl commands send."""
    return [json.loads(body) for block in blocks("bash") for body in re.findall(r"-d '(\{.*?\})'", block, re.DOTALL)]


def rows(text: str, after: str) -> list[list[str]]:
    """Cells of the first table after a heading or sentence, without its two head lines."""
    table = re.search(r"((?:^\|.*\n)+)", text[text.index(after) :], re.MULTILINE)
    assert table is not None, f"no table after {after!r}"
    lines = table[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("block", blocks("bash"))
def test_shell_blocks_parse(block: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_parse_and_import(block: str) -> None:
    compile(block, "README.md", "exec")
    for line in block.splitlines():
        if re.match(r"(from|import) ", line):
            exec(line, {})


def test_the_requests_shown_are_valid_and_one_is_the_document_s() -> None:
    shown = bodies()
    assert EXAMPLE in shown
    for body in shown:
        parse(body)


def test_the_error_shown_is_the_error_given() -> None:
    error = next(json.loads(block) for block in blocks("json") if '"error"' in block)["error"]
    with pytest.raises(Invalid) as refused:
        parse({"prompt": "", error["field"]: 3})
    assert refused.value.body(error["request_id"]) == {"error": error}


def test_presets_are_described_as_they_are() -> None:
    described = {}
    for name, numbers, window, *_ in rows(CACHING, "**Presets.**"):
        interval, depth = map(int, numbers.split(","))
        start, end = (0, 1000) if window == "all" else map(int, window.split("–"))
        described[name.split("`")[1]] = {
            "deepcache_interval": interval,
            "deepcache_depth": depth,
            "deepcache_start_step": start,
            "deepcache_end_step": end,
        }
    assert described == PRESETS


@pytest.mark.parametrize("row", rows(CACHING, "**Presets.**"), ids=lambda row: row[0])
def test_the_saving_follows_from_interval_and_depth(row: list[str]) -> None:
    steps, depth = 20, int(row[1].split(",")[1])
    reused = int(row[3].split(",")[0])
    assert row[4] == f"{steps / (steps - reused + reused / (depth + 2)):.2f}×"
    start, end = (0, 1000) if row[2] == "all" else map(int, row[2].split("–"))
    window, uniform = Window(start, end), Uniform(int(row[1].split(",")[0]))
    computed, counted = 0, 0
    for step in range(steps):
        timestep = 1000 - step * 1000 / steps - 1  # spacing "trailing", as the embedded models are saved
        if window.contains(timestep) and uniform.reuses(step, computed) and step:
            counted += 1
        else:
            computed = step
    assert reused == counted


def test_every_setting_is_listed_with_its_default() -> None:
    listed = {name.strip("`"): default.strip("`") for name, default, _ in rows(page("docs/settings.md"), "# Settings")}
    assert set(listed) == {variable(name) for name in Settings.model_fields}
    in_words = {
        "model": "tiny-sd",
        "devices": "auto",
        "api_keys": "none",
        "jobs_folder": "jobs",
        "result_seconds": "2592000",
        "allowed_hosts": "none",
        "face_detector": "none",
        "cors_origins": "none",
        "proxies": "none",
    }
    in_words |= {"models_file": "none", "model_memory": "nine tenths", "device_memory": "what is free"}
    for name, field in Settings.model_fields.items():
        default = in_words.get(name, field.default)
        expected = f"{default:g}" if isinstance(default, float) else str(default)
        assert listed[variable(name)] == expected, name


def test_every_metric_is_named() -> None:
    exported = set(re.findall(r"^# HELP (wavespeed_\w+)", empty_exposition(), re.MULTILINE))
    named = set(re.findall(r"`(wavespeed_\w+)`", page("docs/operations.md")))
    assert named == {name for name in exported if not name.endswith("_created")}


def empty_exposition() -> str:
    from app.http.pages import exposition
    from tests.app.fakes import FakeEngine

    return exposition(Metrics(), FakeEngine(ready=False)).decode()


def test_fields_named_in_the_text_exist() -> None:
    named = set(re.findall(r"`((?:deepcache|fbcache|cache)_[a-z_]+)", README + CACHING))
    reported = {"cache_bytes"}
    assert named - reported <= set(GenerateRequest.model_fields)


def test_links_into_the_repository_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("#"):
                assert (document.parent / target.partition("#")[0]).exists(), f"{document.name}: {target}"


def test_files_that_the_documents_name_are_there() -> None:
    folders = "app|benchmarks|cache|deploy|docs|models|scripts|tests"
    missing = {
        f"{document.relative_to(ROOT)}: {path}"
        for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
        for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    }
    assert missing == set()


def test_the_index_of_documents_lists_every_page() -> None:
    """A new page is listed in docs/README.md, or in the README of its own folder, which is listed there."""
    for folder in (ROOT / "docs", ROOT / "docs" / "decisions"):
        index = (folder / "README.md").read_text(encoding="utf-8")
        linked = [target for target in re.findall(r"\]\(([^)\s#]+)\)", index) if ".." not in target]
        pages = {page.name for page in folder.glob("*.md")} | {
            str(page.relative_to(folder)) for page in folder.glob("*/README.md")
        }
        assert pages - {"README.md"} - set(linked) == set(), f"not in {folder.name}/README.md"
        assert len(linked) == len(set(linked))


def test_scripts_named_in_the_text_exist() -> None:
    for script in set(re.findall(r"\bscripts/\w+", README)):
        assert os.access(ROOT / script, os.X_OK), script


def test_it_is_read_in_three_minutes() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) <= 1200
