"""A model's profile: what is written is read, and what is damaged, foreign or another device's is told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cache import DeepCache, FirstBlockCache, NoCache
from models.base import Hub, ModelSpec
from models.embedded import SPECS
from models.errors import LoadFailed
from models.tuning.front import Front, Point
from models.tuning.placements import Calibrated
from models.tuning.profile import Profile, borrowed, file_of, of_user, read, write

OWN = ("ddim", "normal")
FOUND = Calibrated(
    sampler="ddim", scheduler="normal", steps=6, interval=3, branch=0, calls=6, computed=(0, 1), gain_db=1.5, pictures=8
)
POINTS = (
    Point(
        steps=12,
        strategy=DeepCache(2, 1, guidance="reuse"),
        operations=3.1,
        seconds=2.9,
        psnr_db=40.1,
        psnr_interval=(39.0, 41.2),
    ),
    Point(steps=5, strategy=NoCache(), operations=4.0, seconds=3.9, psnr_db=32.0, psnr_interval=(30.0, 34.0)),
)
FRONT = Front(
    sampler="ddim",
    scheduler="normal",
    steps=20,
    guidance_scale=3.0,
    width=192,
    height=128,
    pictures=16,
    device="a card",
    points=POINTS,
)


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    """A model whose weights are some bytes."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"weights")
    return ModelSpec(name="mine", family="sd", source=tmp_path)


def test_what_is_written_is_read_and_replaced(spec: ModelSpec, tmp_path: Path) -> None:
    assert read(spec) == Profile()
    longer = replace(FOUND, steps=12, calls=12, computed=(0, 1, 2, 7))
    write(spec, OWN, [FOUND, longer], [FRONT])
    better, flux = replace(FOUND, computed=(0, 2)), replace(POINTS[0], strategy=FirstBlockCache(0.1))
    other = replace(FRONT, steps=30, points=(flux,))
    path = write(spec, OWN, [better], [other])
    assert read(spec) == Profile(own=OWN, placements=(better, longer), fronts=(FRONT, other))
    assert len(path.read_text().splitlines()) == 12  # one a placement and a point, so that a change is read at a glance
    single = replace(spec, source=tmp_path / "model.safetensors")
    assert write(single, OWN, [FOUND]).name == "model.profile.json"
    assert read(single).placements == (FOUND,)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (SPECS[0].source, "tiny-sd.json"),
        (Hub("some/model", "refs/pr/3"), "some--model@refs--pr--3.json"),
    ],
    ids=["embedded", "hub"],
)
def test_what_a_user_calibrates_of_a_model_that_is_not_theirs_lies_in_their_own_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path | Hub, name: str
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    spec = replace(SPECS[0], source=source)
    brought = read(spec)
    assert bool(brought.placements) == isinstance(source, Path)
    shipped = SPECS[0].source / "profile.json"
    before = shipped.read_bytes()
    mine = replace(FOUND, steps=20, calls=20, computed=(0, 2, 4, 6, 8, 10, 12))
    assert write(spec, OWN, [mine], [FRONT]) == tmp_path / "wavespeed" / "profiles" / name
    assert shipped.read_bytes() == before
    found = read(spec)
    others = {one.key: one for one in brought.placements if one.key != mine.key}
    assert {one.key: one for one in found.placements} == others | {mine.key: mine}
    assert {one.key: one for one in found.fronts} == {one.key: one for one in brought.fronts} | {FRONT.key: FRONT}
    monkeypatch.setenv("XDG_DATA_HOME", "/dev/null")  # a home that cannot be looked into serves what was brought
    assert read(spec) == brought


HEAD = '{"model": "none", "own": ["ddim", "normal"], '


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        HEAD + '"placements": [{"sampler": "ddim"}], "fronts": []}',
        HEAD + '"placements": [{"sampler": "ddim", "scheduler": "normal", "steps": 6, "interval": 3, "branch": 0, '
        '"calls": 6, "computed": [0, 1, 2], "gain_db": 1, "pictures": 8}], "fronts": []}',  # three, where two are due
        HEAD + '"placements": [], "fronts": [{"steps": 20}]}',
        HEAD + '"placements": [], "fronts": [{"points": [{"steps": 0, "cache": "none", "settings": {}}]}]}',
    ],
)
def test_a_damaged_file_is_left_out_and_not_written_over(spec: ModelSpec, content: str) -> None:
    file_of(spec).write_text(content)
    assert read(spec) == Profile(fault="damaged")
    for touch in (of_user, lambda spec: write(spec, OWN, [FOUND])):
        with pytest.raises(LoadFailed, match="app calibrate mine"):
            touch(spec)
    assert file_of(spec).read_text() == content


@pytest.mark.parametrize(
    ("cache", "settings"),
    [
        ("none", {"interval": 2}),
        ("deepcache", {"interval": 0}),
        ("first_block", {"threshold": float("nan")}),
        ("taylor", {}),
    ],
)
def test_a_point_that_no_strategy_has_is_damage(spec: ModelSpec, cache: str, settings: dict[str, float]) -> None:
    path = write(spec, OWN, fronts=[FRONT])
    content = json.loads(path.read_text())
    content["fronts"][0]["points"][0] |= {"cache": cache, "settings": settings}
    path.write_text(json.dumps(content))
    assert read(spec).fault == "damaged"


def test_other_weights_have_no_use_for_it(spec: ModelSpec, tmp_path: Path) -> None:
    path = write(spec, OWN, [FOUND], [FRONT])
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"Weights")
    assert read(spec) == Profile(fault="foreign")
    write(spec, OWN, [FOUND])  # a calibration begins anew
    assert read(spec) == Profile(own=OWN, placements=(FOUND,))
    assert '"points"' not in path.read_text()


def test_seconds_of_another_device_are_none() -> None:
    known = Profile(own=OWN, fronts=(FRONT,))
    assert known.seen_from("a card") == known
    elsewhere = known.seen_from("another").fronts[0]
    assert [point.seconds for point in elsewhere.points] == [None, None]
    assert [point.speedup for point in elsewhere.points] == [3.1, 4.0]


@pytest.mark.parametrize("cache", ["deepcache", "first_block"])
def test_a_model_without_a_profile_borrows_an_embedded_ones_front(cache: str) -> None:
    """On a UNet whose branches cost more, the same settings save fewer operations."""
    lent = borrowed(Profile(fault="foreign"), cache, (0.2, 0.4))  # type: ignore[arg-type]
    assert lent.borrowed
    assert lent.fault == "foreign"
    assert lent.own is not None
    points = [point for front in lent.fronts for point in front.points]
    assert all(point.seconds is None for point in points)
    assert {point.strategy.name for point in points} <= {cache, "none"}
    if cache == "deepcache":
        cheap = borrowed(Profile(), "deepcache", (0.1, 0.15))
        speeds = [point.operations for front in cheap.fronts for point in front.points]
        pairs = list(zip(points, speeds, strict=True))
        assert all(point.operations <= speed for point, speed in pairs)
        assert any(point.operations < speed for point, speed in pairs)


@pytest.mark.parametrize(("name", "samplers"), [("tiny-sd", ("ddim", "euler", "dpmpp_2m")), ("tiny-flux", ("euler",))])
def test_what_ships_has_every_usual_number_of_steps_and_each_speed_up_to_five_times(
    name: str, samplers: tuple[str, ...]
) -> None:
    fronts = {front.key: front for front in read(next(spec for spec in SPECS if spec.name == name)).fronts}
    assert set(fronts) == {(sampler, "normal", steps) for sampler in samplers for steps in (10, 20, 28, 30, 50)}
    for front in fronts.values():
        assert {point.strategy.name for point in front.points} >= {"fitted"}
        speeds = sorted(point.operations for point in front.points)
        assert speeds[-1] >= 5
        assert all(next_one <= 1.7 * speed for speed, next_one in pairwise([1.0, *speeds]))
