"""`python -m app compare`: what its rows are, how they are timed, what the sheet shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from typer.testing import CliRunner

import app.__main__ as command_line
import app.engine.runner
from app import cli
from app.cli.compare import Comparison, compared, settings_of, sheet
from app.engine.runner import RegistryRunner
from app.engine.types import Job, JobResult, StepListener
from app.http.schemas import PRESETS
from app.settings import Settings
from tests.app.fakes import FakeRegistry, fake_catalogue

COLOURS = {"C": ImageColor.getrgb(cli.COMPUTED), "R": ImageColor.getrgb(cli.REUSED)}


class RecordingRunner(RegistryRunner):
    """A fake that notes its jobs."""

    def __init__(self) -> None:
        super().__init__(FakeRegistry(), "fake device")
        self.jobs: list[Job] = []

    def run(self, job: Job, on_step: StepListener) -> JobResult:
        self.jobs.append(job)
        return super().run(job, on_step)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RecordingRunner:
    monkeypatch.chdir(tmp_path)
    recording = RecordingRunner()
    monkeypatch.setattr(app.engine.runner, "configured_runner", lambda device, **options: recording)
    return recording


def strips(image: Image.Image, columns: int) -> list[str]:
    """The letters of each column's strip, read from the colours of its cells."""
    pixels = np.asarray(image)
    computed = (pixels == COLOURS["C"]).all(-1)
    reused = (pixels == COLOURS["R"]).all(-1)
    row = int((computed | reused).sum(1).argmax())  # the line of pixels that holds most of the two colours
    letters = np.where(computed[row], "C", np.where(reused[row], "R", " "))
    margin, gap = 28, 20
    tile = (image.width - 2 * margin - (columns - 1) * gap) // columns
    found = []
    for column in range(columns):
        left = margin + column * (tile + gap)
        found.append("".join(letters[left : left + tile]))
    return found


def runs_of(text: str) -> str:
    """One letter a cell: cells are parted by bare pixels."""
    return "".join(cell[0] for cell in text.split())


def test_a_unet_is_compared_under_all_presets_and_a_transformer_under_thresholds() -> None:
    models = fake_catalogue().models
    unet = settings_of(models["fine"])
    assert set(unet) == {"uncached", *PRESETS}
    assert {name: fields.get("deepcache_preset") for name, fields in unet.items() if fields} == {
        name: name for name in PRESETS
    }
    flux = settings_of(models["flux"])
    assert [fields.get("fbcache_threshold") for fields in flux.values()] == [None, 0.05, 0.1, 0.2]
    assert flux["uncached"] == {"fbcache_enabled": False}
    assert next(iter(unet)) == next(iter(flux)) == "uncached"


def test_wished_speeds_stand_in_the_presets_place() -> None:
    models = fake_catalogue().models
    rows = settings_of(models["flux"], (2.0, 3.0))
    assert list(rows) == ["uncached", "2 times as fast", "3 times as fast"]
    assert list(rows.values()) == [{"fbcache_enabled": False}, {"cache_speedup": 2.0}, {"cache_speedup": 3.0}]
    assert settings_of(models["fine"], (2.0,))["uncached"] == {}


def test_the_demonstration_is_drawn_without_typing(runner: RecordingRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.compare.SPEEDUPS", (1.0,))  # the fake models have no profile to choose by
    result = CliRunner().invoke(command_line.cli, ["demo"])
    assert result.exit_code == 0, result.output
    with Image.open("demo.png") as image:
        assert len(strips(image, 2)) == 2
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["uncached", "1", "demo.png"]


def test_every_row_is_warmed_up_and_then_timed_in_turn(runner: RecordingRunner) -> None:
    comparison = compared({"prompt": "a", "model": "flux", "seed": 3}, Settings(), repeats=2)
    strategies = [job.strategy for job in runner.jobs]
    assert strategies[:4] == strategies[4:8] == strategies[8:]
    assert len(set(strategies)) == 4
    assert {job.params.seeds for job in runner.jobs} == {(3,)}
    assert {(job.params.width, job.params.height) for job in runner.jobs} == {(512, 512)}  # the model's own
    assert comparison.repeats == 2
    assert "median of 2" in comparison.conditions


def test_a_long_run_is_warmed_up_by_a_short_one(runner: RecordingRunner) -> None:
    compared({"prompt": "a", "seed": 0}, Settings())
    assert [job.params.steps for job in runner.jobs] == [4] * 5 + [20] * 5


def test_the_sheet_shows_each_row_s_decisions(runner: RecordingRunner) -> None:
    result = CliRunner().invoke(command_line.cli, ["compare", "a misty forest", "-o", "out/sheet.png"])
    assert result.exit_code == 0, result.output
    uniform = {
        interval: "".join("C" if index % interval == 0 else "R" for index in range(20)) for interval in (2, 3, 5)
    }
    expected = ["C" * 20, uniform[2], uniform[3], uniform[5], uniform[3]]
    with Image.open("out/sheet.png") as image:
        assert [runs_of(text) for text in strips(image, 5)] == expected
    for decisions in expected:
        assert decisions in result.stdout


def test_nothing_need_be_typed(runner: RecordingRunner) -> None:
    assert CliRunner().invoke(command_line.cli, ["compare"]).exit_code == 0
    assert {job.params.prompt for job in runner.jobs} == {"a stormy island at twilight"}


def test_json_is_all_that_stdout_holds(runner: RecordingRunner) -> None:
    result = CliRunner().invoke(command_line.cli, ["compare", "a", "--flux", "--json", "-o", "s.jpg", "--seed", "7"])
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["rows"]] == ["uncached", "threshold 0.05", "threshold 0.1", "threshold 0.2"]
    first, *others = found["rows"]
    assert (first["speedup"], first["identical"], first["psnr_db"]) == (1.0, True, None)
    assert {row["cache"]["decisions"] for row in others} == {"CRCR"}
    assert (found["model"], found["seed"], found["sheet"]) == ("flux", 7, "s.jpg")
    assert {"device", "threads", "versions", "date"} == set(found["machine"])
    assert "The fake says so." in result.stderr
    with Image.open("s.jpg") as image:
        assert image.format == "JPEG"


@pytest.mark.usefixtures("runner")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nothing"], "There is no model"),
        (["--width", "511"], "multiple of 8"),
        (["-o", "sheet.pdf"], ".webp"),
        (["--sampler", "best"], "sampler"),
        (["--steps", "0"], "steps"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.setattr("sys.argv", ["app", "compare", "a", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert caught.value.code == 1
    assert words in capsys.readouterr().err.splitlines()[-1]


def comparison_of(runner: RecordingRunner, prompt: str, pictures: list[Image.Image]) -> Comparison:
    from dataclasses import replace

    found = compared({"prompt": prompt, "model": "flux", "seed": 0}, Settings())
    rows = tuple(replace(row, picture=picture) for row, picture in zip(found.rows, pictures, strict=True))
    return replace(found, rows=rows)


def test_differences_are_made_brighter_alike(runner: RecordingRunner) -> None:
    """Grey 100 beside 100, 101, 103 and 110: the largest times 16 is still a colour, times 32 no longer."""
    pictures = [Image.new("RGB", (340, 200), (level,) * 3) for level in (100, 101, 103, 110)]
    image = sheet(comparison_of(runner, "a", pictures), difference=True)
    plain = sheet(comparison_of(runner, "a", pictures))
    assert image.width == plain.width
    below = image.crop((0, plain.height - 60, image.width, image.height))
    shown = {colour for _, colour in below.getcolors(1 << 24) or [] if len(set(colour)) == 1}  # type: ignore[misc,arg-type]
    assert {(16,) * 3, (48,) * 3, (160,) * 3} <= shown


@pytest.mark.parametrize(
    "prompt", ["", "a" * 10_000, "word " * 2_000, "ein Wald im Nebel, über Seen", "森の霧", "a\tb\r\nc\x1b"]
)
def test_any_prompt_fits_on_a_sheet(runner: RecordingRunner, prompt: str) -> None:
    pictures = [Image.new("RGB", (512, 512))] * 4
    image, short = (sheet(comparison_of(runner, words, pictures)) for words in (prompt, "a"))
    assert image.width == short.width
    assert image.height - short.height in (0, 40)  # one more line at most


def test_what_no_font_shows_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_SYSTEM_FONTS", ())
    assert cli.typeset("über “Seen”", 20)[0] == "?ber “Seen”"


def test_a_line_is_cut_where_it_is_too_long() -> None:
    assert cli.wrapped("one two three four", 20, 1000, 2) == ["one two three four"]
    first, second = cli.wrapped("one two three four", 20, cli.width_of("one two", 20), 2)
    assert first == "one two"
    assert second.endswith("…")
    assert cli.width_of(second, 20) <= cli.width_of("one two", 20)
    assert cli.width_of(second[:-1] + "xx…", 20) > cli.width_of("one two", 20)
