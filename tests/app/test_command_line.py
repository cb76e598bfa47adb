"""`python -m app`: the server's checks and code, in a terminal."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import app.__main__ as command_line
import app.cli.generate
import app.engine.runner
from app.errors import ServiceError
from app.http.schemas import GenerateRequest
from tests.app.fakes import fake_runner
from tests.app.forks import Ended, ended


@pytest.fixture
def _fake_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app.engine.runner, "configured_runner", lambda device, **options: fake_runner(device))


@pytest.mark.usefixtures("_fake_models")
def test_generate_writes_pictures_and_says_what_the_cache_did(tmp_path: Path) -> None:
    arguments = ["a misty forest", "-o", "out/x.png", "--num-images", "2", "--preset", "balanced", "--seed", "5"]
    result = CliRunner().invoke(command_line.cli, ["generate", *arguments])
    assert result.exit_code == 0, result.output
    assert "computed=14 reused=26 hit_rate=0.65" in result.output
    texts = [json.loads(Image.open(tmp_path / "out" / f"x-{n}.png").text["wavespeed"]) for n in (0, 1)]  # type: ignore[attr-defined]
    assert [text["seed"] for text in texts] == [5, 6]
    assert "20/20" in result.output or "40/40" in result.output


@pytest.mark.usefixtures("_fake_models")
def test_json_is_the_report_and_nothing_else(tmp_path: Path) -> None:
    result = CliRunner().invoke(command_line.cli, ["generate", "a", "--json", "--deepcache", "--seed", "5"])
    answer = json.loads(result.stdout)
    assert answer["files"] == ["image.png"]
    assert (answer["seeds"], answer["cache"]["hit_rate"]) == ([5], 0.65)
    assert answer["timings"]["total_seconds"] >= 0
    assert answer["warnings"] == ["The fake says so."]


@pytest.mark.usefixtures("_fake_models")
def test_models_are_listed_as_json() -> None:
    result = CliRunner().invoke(command_line.cli, ["models"])
    assert {"fine", "flux"} <= {row["name"] for row in json.loads(result.stdout)}


@pytest.mark.usefixtures("_fake_models")
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--width", "513"], 1, "multiple of 8"),
        (["--flux", "--deepcache"], 1, "FBCache"),
        (["--model", "nothing"], 1, "There is no model"),
        (["-o", "x.gif"], 1, ".webp"),
        (["--lora", "ink:0.5", "--lora", "wash"], 1, "no LoRA 'ink'"),
        (["--lora", "ink:much"], 1, "NAME:0.8"),
    ],
)
def test_what_the_server_refuses_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["app", "generate", "a", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == status
    *progress, last = capsys.readouterr().err.splitlines()  # loading may take long enough to be told
    assert words in last
    assert not [line for line in progress if words in line or "Traceback" in line]


WRONG: list[tuple[list[str], str]] = [
    (["generate", "a", "--model", "nope"], "There is no model 'nope'. There is: tiny-sd, tiny-flux."),
    (["generate", "a", "--sampler", "nope"], "There is no sampler 'nope' for this model. It has: euler, "),
    (
        ["generate", "a", "--deepcache-interval", "11"],
        "deepcache_interval: input should be less than or equal to 10.",
    ),
    (["generate", "a", "--width", "513"], "multiple of 8"),
    (["generate", "a", "--img2img-enabled", "--img2img-image", "none.png"], "none.png: No such file or directory."),
    (
        ["compare", "a", "--flux", "--sampler", "lms"],
        "There is no sampler 'lms' for this model. It has: euler, heun.",
    ),
    (["calibrate", "nope"], "There is no model 'nope'."),
    (["calibrate", "tiny-sd", "--sampler", "nope"], "There is no sampler 'nope' for this model."),
    (["threshold", "nope", "--speedup", "2"], "There is no model 'nope'."),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    return ended(tmp_path_factory.mktemp("wrong"), [(arguments, {}) for arguments, _ in WRONG])


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[words for _, words in WRONG])
def test_what_is_known_to_be_wrong_is_said_before_torch_is_imported(refusals: list[Ended], number: int) -> None:
    refusal = refusals[number]
    assert (refusal.status, refusal.out, refusal.heavy) == (1, "", ""), refusal.err
    assert WRONG[number][1] in refusal.err
    assert refusal.err.count("\n") == 1


def test_every_simple_field_of_a_request_is_an_option_with_its_description() -> None:
    told = " ".join(CliRunner().invoke(command_line.cli, ["generate", "--help"]).output.split())
    for name, field in GenerateRequest.model_fields.items():
        if name not in ("prompt", "rerender", "output_format", "enable_preview", "loras"):
            assert f"--{name.replace('_', '-')}" in told, name
            assert str(field.description) in told
    for short in ("flux", "deepcache", "preset", "interval", "depth", "fbcache", "threshold", "lora NAME:WEIGHT"):
        assert f"--{short}" in told


@pytest.mark.usefixtures("_fake_models")
def test_fields_arrive_as_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def seen_here(values: dict[str, object], settings: object) -> None:
        seen.update(values)
        raise ServiceError("seen")

    monkeypatch.setattr(app.cli.generate, "drawn_here", seen_here)
    Path("a.png").write_bytes(b"bytes")
    options = ["--depth", "3", "--no-multiscale-intermittent", "--lora", "ink:0.5", "--lora", "wash", "--seed", "-1"]
    options += ["--img2img-image", "a.png", "--guidance-scale", "3.5", "--attention", "sdpa"]
    options += ["--control", "canny:0.5=edges:a.png", "--control", "xl/depth=a.png"]
    CliRunner().invoke(command_line.cli, ["generate", "a", *options, "-o", "x.webp"])
    assert seen == {
        "prompt": "a",
        "deepcache_depth": 3,
        "multiscale_intermittent": False,
        "loras": [{"name": "ink", "weight": 0.5}, {"name": "wash"}],
        "seed": -1,
        "img2img_image": base64.b64encode(b"bytes").decode(),
        "guidance_scale": 3.5,
        "attention": "sdpa",
        "control": [
            {"model": "canny", "image": base64.b64encode(b"bytes").decode(), "weight": 0.5, "edges": True},
            {"model": "xl/depth", "image": base64.b64encode(b"bytes").decode()},
        ],
        "output_format": "webp",
    }


@pytest.mark.usefixtures("_fake_models")
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LD_SERVER_LOGLEVEL", "LOUD")
    monkeypatch.setattr("sys.argv", ["app", "serve"])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 2
    assert "LD_SERVER_LOGLEVEL" in capsys.readouterr().err


@pytest.mark.usefixtures("_fake_models")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny-sd", "--speedup", "2"], "Use DeepCache"),
        (["nothing", "--speedup", "2"], "There is no model"),
        (["tiny-flux", "--speedup", "2", "--max-consecutive", "51"], "fbcache_max_consecutive"),
    ],
)
def test_a_threshold_is_not_searched_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.setattr("sys.argv", ["app", "threshold", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 1
    assert words in capsys.readouterr().err
