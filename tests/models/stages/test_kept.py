"""A request that goes on from an earlier run is, bit for bit, the one drawn whole; and who may go on from what."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.base import Generation, GenerationParams, Img2Img, Inpaint, Lora, ModelSpec, Step, Upscaler
from models.errors import GenerationCancelled
from models.families.sd import SD
from models.generation import LoadedModel
from models.registry import Registry
from models.stages.kept import AFTER, OF_HIRES, OF_NO_PICTURE, TOLD_OTHERWISE, exactly
from tests.models.stages.test_stages import picture, spelled
from tests.models.test_generation import ignore, pixels

MEGABYTE = 2**20
FIRST = GenerationParams(
    prompt="a misty forest", width=64, height=64, steps=4, guidance_scale=3.0, seeds=(7, 8), batch_size=2, owner="one"
)
SHARP = Upscaler(name="sharp", path=Path("sharp.safetensors"))


MASKED = Img2Img(picture=picture(64, 64), denoise=0.75, inpaint=Inpaint(mask=Image.linear_gradient("L"), padding=8))


class Doubler:
    """In an upscaler's place: twice as large, upside down."""

    name, scale = "sharp", 2

    def __call__(self, image: Image.Image, device: torch.device) -> Image.Image:
        return image.resize((2 * image.width, 2 * image.height)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upscaler, and one face in every picture."""
    from models.faces import Box

    monkeypatch.setattr("models.upscaling.load", lambda upscaler: Doubler())
    monkeypatch.setattr("models.faces.finder", lambda path: lambda image: [Box(16, 16, 24, 24)])


@pytest.fixture(scope="module")
def loaded(small_folders: dict[str, Path]) -> Any:
    """The quick model draws at 64×64 alone, so that it resamples as the embedded ones do."""
    spec = ModelSpec(name="small", family="sd", source=small_folders["v_prediction"], render_sizes=((64, 64),))
    return SD.load(spec, "cpu")


@pytest.fixture
def fresh(loaded: Any) -> Callable[[], LoadedModel]:
    """The model as it is when nothing was asked of it yet."""
    return lambda: LoadedModel(loaded, MEGABYTE)


def kept(drawn: Generation) -> list[tuple[str, bool]]:
    return [(one.name, one.kept) for one in drawn.stages]


def same(one: Generation, other: Generation) -> None:
    """But for the times, and for what is said to have been drawn before."""
    assert np.array_equal(pixels(one.images), pixels(other.images))
    assert [replace(stage, kept=False) for stage in one.stages] == [
        replace(stage, kept=False) for stage in other.stages
    ]
    told = ("warnings", "batches", "sampling", "attention")
    assert [getattr(one, name) for name in told] == [getattr(other, name) for name in told]


LATER: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"width": 96, "height": 80}, []),
    ({"upscale": SHARP}, []),
    ({"adetailer": True}, ["adetailer", "adetailer"]),
    ({"hires_fix": True}, ["hires_fix"]),
    ({"hires_fix": True, "hires_upscaler": SHARP}, ["hires_fix"]),
    ({"hires_fix": True, "adetailer": True, "upscale": SHARP}, ["hires_fix", "adetailer", "adetailer"]),
]


@pytest.mark.parametrize(("changes", "passes"), LATER, ids=spelled)
@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_every_later_pass_goes_on_as_if_the_whole_had_been_drawn(
    fresh: Callable[[], LoadedModel], changes: dict[str, Any], passes: list[str], sampler: str
) -> None:
    first = replace(FIRST, sampler=sampler)
    later, strategy, steps = replace(first, **changes), DeepCache(2, 2), list[Step]()
    whole = fresh().generate(later, strategy, ignore)
    model = fresh()
    model.generate(first, strategy, ignore)
    resumed = model.generate(later, strategy, steps.append)
    same(resumed, whole)
    assert kept(whole) == [("base", False), *((name, False) for name in passes)]
    assert kept(resumed) == [("base", True), *((name, False) for name in passes)]
    assert len(steps) == sum(one.steps for one in resumed.stages[1:])
    assert [(step.index, step.total) for step in steps[-1:]] == [(len(steps) - 1, len(steps))] * bool(steps)
    assert (resumed.timings.denoise_seconds > 0) == bool(passes)


@pytest.mark.parametrize(
    ("family", "strategy", "changes"),
    [
        ("flux", FirstBlockCache(0.3), {"upscale": SHARP, "img2img": Img2Img(picture=picture(64, 64), denoise=0.75)}),
        ("sdxl", NoCache(), {"adetailer": True}),
        ("sd", DeepCache(2, 2), {"hires_fix": True, "width": 128, "height": 128}),
        ("sd", NoCache(), {"upscale": SHARP, "img2img": MASKED}),
    ],
    ids=spelled,
)
def test_every_family_does(
    family: str, strategy: CacheStrategy, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    drawing: LoadedModel = request.getfixturevalue(family)
    model, later = LoadedModel(drawing.model, MEGABYTE), replace(FIRST, **changes)
    model.generate(replace(FIRST, img2img=later.img2img), strategy, ignore)
    resumed = model.generate(later, strategy, ignore)
    name = "base" if later.img2img is None else "img2img" if later.img2img.inpaint is None else "inpaint"
    assert kept(resumed)[0] == (name, True)
    same(resumed, drawing.generate(later, strategy, ignore))


def test_the_latest_run_is_gone_on_from(fresh: Callable[[], LoadedModel]) -> None:
    model, hires = fresh(), replace(FIRST, hires_fix=True)
    model.generate(hires, NoCache(), ignore)
    detailed = model.generate(replace(hires, adetailer=True), NoCache(), ignore)
    assert kept(detailed)[:3] == [("base", True), ("hires_fix", True), ("adetailer", False)]
    assert kept(model.generate(replace(hires, hires_upscaler=SHARP), NoCache(), ignore)) == [
        ("base", True),
        ("hires_fix", False),
    ]
    same(detailed, fresh().generate(replace(hires, adetailer=True), NoCache(), ignore))


def test_a_second_run_of_another_size_is_another(sd: LoadedModel) -> None:
    """Both begin at 64×64: of 120 pixels a side, the model's own 64 are more than half."""
    model, strategy = LoadedModel(sd.model, MEGABYTE), NoCache()
    hires = replace(FIRST, hires_fix=True, steps=2, seeds=(7,))
    model.generate(replace(hires, width=128, height=128), strategy, ignore)
    smaller = model.generate(replace(hires, width=120, height=120), strategy, ignore)
    assert kept(smaller) == [("base", True), ("hires_fix", False)]
    assert [one.size for one in smaller.images] == [(120, 120)]


def test_a_mask_lies_on_a_picture_of_the_size_that_was_asked_for(fresh: Callable[[], LoadedModel]) -> None:
    model, wide = fresh(), replace(FIRST, width=96, height=80, img2img=MASKED)
    model.generate(replace(FIRST, img2img=MASKED), NoCache(), ignore)
    same(model.generate(wide, NoCache(), ignore), fresh().generate(wide, NoCache(), ignore))


def test_runs_are_each_owners_own(fresh: Callable[[], LoadedModel]) -> None:
    model = fresh()
    for owner, known in (("one", False), ("two", False), (None, False), ("one", True), (None, False), ("two", True)):
        assert kept(model.generate(replace(FIRST, owner=owner), NoCache(), ignore)) == [("base", known)], owner


def test_a_batch_is_gone_on_from_as_a_whole(fresh: Callable[[], LoadedModel]) -> None:
    """Another number of rows rounds otherwise, so that a picture alone is another run than in company."""
    model = fresh()
    model.generate(replace(FIRST, seeds=(1, 2, 3)), NoCache(), ignore)  # 1 and 2 together, then 3
    assert kept(model.generate(replace(FIRST, seeds=(3, 1)), NoCache(), ignore)) == [("base", False)]
    several = model.generate(replace(FIRST, seeds=(3, 1), batch_size=1), NoCache(), ignore)
    assert kept(several) == [("base", True), ("base", False)]
    same(several, fresh().generate(replace(FIRST, seeds=(3, 1), batch_size=1), NoCache(), ignore))
    requests = [replace(FIRST, seeds=(3,), batch_size=1), replace(FIRST, seeds=(4,), batch_size=1)]
    for one in model.generate_together(requests, NoCache(), lambda steps: None):
        assert isinstance(one, Generation)
        assert kept(one) == [("base", False)]
    assert kept(model.generate(requests[1], NoCache(), ignore)) == [("base", False)]


def test_whole_and_resumed_requests_do_not_disturb_each_other(fresh: Callable[[], LoadedModel]) -> None:
    model = fresh()
    plain, other = FIRST, replace(FIRST, prompt="a rainy day")
    asked = [
        plain,
        other,
        replace(plain, adetailer=True),
        replace(other, steps=5),
        replace(other, adetailer=True),
        plain,
    ]
    known = [False, False, True, False, True, True]
    for params, is_known in zip(asked, known, strict=True):
        drawn = model.generate(params, DeepCache(2, 2), ignore)
        assert kept(drawn)[0] == ("base", is_known)
        same(drawn, fresh().generate(params, DeepCache(2, 2), ignore))


def test_a_run_that_did_not_end_is_not_kept(fresh: Callable[[], LoadedModel]) -> None:
    def stop(step: Step) -> None:
        raise GenerationCancelled

    model = fresh()
    with pytest.raises(GenerationCancelled):
        model.generate(FIRST, NoCache(), stop)
    assert kept(model.generate(FIRST, NoCache(), ignore)) == [("base", False)]


def test_what_is_kept_is_bounded_and_the_one_used_longest_ago_goes(loaded: Any) -> None:
    asked = [replace(FIRST, seeds=(seed,)) for seed in range(3)]
    sizing = LoadedModel(loaded, MEGABYTE)
    sizing.generate(asked[0], NoCache(), ignore)
    one = sizing._runs.bytes
    assert one > 8 * 8 * 4 * 4 + 5000  # latents, and a Mersenne twister
    model = LoadedModel(loaded, 2 * one + one // 2)
    for params in (asked[0], asked[1], asked[0], asked[2]):
        model.generate(params, NoCache(), ignore)
    assert (len(model._runs), model._runs.bytes) == (2, pytest.approx(2 * one, rel=0.1))
    assert [kept(model.generate(params, NoCache(), ignore))[0][1] for params in (asked[0], asked[2], asked[1])] == [
        True, True, False,
    ]  # fmt: skip
    for too_little in (0, one // 2):
        model = LoadedModel(loaded, too_little)
        assert [kept(model.generate(FIRST, NoCache(), ignore)) for _ in range(2)] == [[("base", False)]] * 2
        assert model._runs.bytes == 0


def test_a_model_whose_file_is_exchanged_has_no_runs(small_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_folders["epsilon"], tmp_path / "model"))
    registry = Registry([ModelSpec(name="a", family="sd", source=folder)], "a", None, kept_bytes=MEGABYTE)

    def is_known() -> bool:
        return registry.get("a").generate(FIRST, NoCache(), ignore).stages[0].kept

    assert [is_known(), is_known()] == [False, True]
    os.utime(next((folder / "unet").glob("*.safetensors")), ns=(1, 1))
    assert [is_known(), is_known()] == [False, True]


def test_all_parameters_tell_runs_apart_but_those_that_act_later(tmp_path: Path) -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Tomorrow(GenerationParams):
        added: int = 0
        masked: Image.Image | None = None

    assert {field.name for field in fields(GenerationParams)} >= AFTER | OF_HIRES | OF_NO_PICTURE | TOLD_OTHERWISE
    file = tmp_path / "ink.safetensors"
    file.write_bytes(b"1")
    plain = Tomorrow(prompt="a")
    changes: list[dict[str, Any]] = [
        {},
        {"added": 1},
        {"masked": picture(32, 32)},
        {"masked": picture(32, 48)},
        {"img2img": Img2Img(picture=picture(32, 32))},
        {"img2img": Img2Img(picture=picture(32, 32), denoise=0.5)},
        {"img2img": Img2Img(picture=picture(48, 32))},
        {"loras": (Lora(name="ink", path=file),)},
        {"loras": (Lora(name="ink", path=file, weight=0.5),)},
    ]
    asked = [exactly(replace(plain, **change)) for change in changes]
    assert len({tuple(one.items()) for one in asked}) == len(changes)
    assert asked == [exactly(replace(plain, **change)) for change in changes]
    os.utime(file, ns=(1, 1))  # exchanged for another file
    assert exactly(replace(plain, **changes[-1])) != asked[-1]
