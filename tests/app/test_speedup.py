"""`cache_speedup`: which settings a wish becomes, and what is said of it. The profiles are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from app.engine.types import Catalogue, Job, ModelInfo
from app.errors import Incompatible, Invalid
from app.http.resolve import resolve
from app.http.schemas import parse
from app.settings import Settings
from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.tuning.front import Point
from models.tuning.profile import Profile
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine, fake_catalogue
from tests.models.tuning.test_profile import FRONT

HALF = DeepCache(2, 1, guidance="reuse")
INTERVAL = (30.0, 50.0)
POINTS = (
    Point(steps=20, strategy=DeepCache(2), operations=1.8, seconds=1.7, psnr_db=50.0, psnr_interval=INTERVAL),
    Point(steps=12, strategy=HALF, operations=3.1, seconds=2.9, psnr_db=40.0, psnr_interval=INTERVAL),
    Point(steps=5, strategy=NoCache(), operations=4.0, seconds=4.1, psnr_db=30.0, psnr_interval=INTERVAL),
)
SD = Profile(own=("euler", "normal"), fronts=(replace(FRONT, sampler="euler", points=POINTS),))
ELSEWHERE = SD.seen_from("another device")
FLUX = Profile(
    own=("euler", "normal"),
    fronts=(
        replace(FRONT, sampler="euler", steps=4, points=(replace(POINTS[0], steps=4, strategy=FirstBlockCache(0.2)),)),
    ),
)
CALIBRATE = "app calibrate fine"


def catalogue(**profiles: Profile) -> Catalogue:
    known = fake_catalogue()
    models: dict[str, ModelInfo] = dict(known.models)
    for name, profile in profiles.items():
        models[name] = replace(models[name], profile=profile)
    return replace(known, models=models)


def resolved(profile: Profile, **body: Any) -> Job:
    request = parse({"prompt": "a", "guidance_scale": 3.0, **body})
    return resolve(request, catalogue(fine=profile, flux=profile), Settings(_env_file=None), "id")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("profile", "body", "steps", "strategy", "speed", "words"),
    [
        (SD, {"cache_speedup": 1}, 20, NoCache(), (1.0, "operations", None), []),
        (SD, {"cache_speedup": 1.7}, 20, DeepCache(2), (1.7, "seconds", 50.0), []),
        (SD, {"cache_speedup": 1.86}, 20, DeepCache(2), (1.7, "seconds", 50.0), []),  # 91 % of it
        (SD, {"cache_speedup": 1.9}, 12, HALF, (2.9, "seconds", 40.0), []),
        (ELSEWHERE, {"cache_speedup": 1.89}, 20, DeepCache(2), (1.8, "operations", 50.0), ["no seconds", CALIBRATE]),
        (ELSEWHERE, {"cache_speedup": 1.9}, 12, HALF, (3.1, "operations", 40.0), ["no seconds", CALIBRATE]),
        (SD, {"cache_speedup": 6}, 5, NoCache(), (4.1, "seconds", 30.0), ["out of reach", "4.10×"]),
        (SD, {"cache_speedup": 4, "cache_floor": 35}, 12, HALF, (2.9, "seconds", 40.0), ["2.90×", "30.0 dB"]),
        (SD, {"cache_speedup": 4, "cache_floor": 60}, 20, NoCache(), (1.0, "operations", None), ["1.00×"]),
        (SD, {"cache_speedup": 2.5, "cache_floor": 35}, 12, HALF, (2.9, "seconds", 40.0), []),
        (SD, {"cache_speedup": 2, "guidance_scale": 7.5}, 5, NoCache(), (4.1, "seconds", 30.0), []),
        (SD, {"cache_speedup": 2, "sampler": "ddim"}, 12, HALF, (2.9, "seconds", 40.0), ["no ddim, normal, 20"]),
        (SD, {"cache_speedup": 1.5, "steps": 30}, 30, DeepCache(2), (1.7, "seconds", 50.0), ["30 steps", "20 steps"]),
        (SD, {"cache_speedup": 2, "steps": 1}, 1, NoCache(), (1.0, "operations", None), ["1 steps", "out of reach"]),
        (SD, {"cache_speedup": 2, "sampler": "euler", "scheduler": "karras"}, 12, HALF, (2.9, "seconds", 40.0),
         ["karras"]),
        (FLUX, {"cache_speedup": 1.5, "model": "flux"}, 4, FirstBlockCache(0.2), (1.7, "seconds", 50.0), []),
        (Profile(), {"cache_speedup": 2}, 20, NoCache(), (1.0, "operations", None), ["out of reach"]),
    ],
)  # fmt: skip
def test_a_wish_becomes_a_point_of_the_front(
    profile: Profile,
    body: dict[str, Any],
    steps: int,
    strategy: CacheStrategy,
    speed: tuple[float, str, float | None],
    words: list[str],
) -> None:
    job = resolved(profile, **body)
    assert (job.params.steps, job.strategy) == (steps, strategy)
    assert job.chosen is not None
    assert tuple(job.chosen[name] for name in ("speedup", "by", "psnr_db")) == speed
    said = " ".join(job.warnings)
    assert all(word in said for word in words)
    assert bool(said) == bool(words)


def test_a_model_without_a_profile_takes_what_proved_best_elsewhere() -> None:
    borrowed = replace(ELSEWHERE, borrowed=True)
    job = resolved(borrowed, cache_speedup=2, cache_floor=45)
    assert (job.params.steps, job.strategy) == (12, HALF)
    assert job.chosen is not None
    assert [job.chosen[name] for name in ("psnr_db", "psnr_interval", "measured")] == [None, None, None]
    said = " ".join(job.warnings)
    assert all(word in said for word in ("no profile of its own", "tiny-sd", "cache_floor had no effect", CALIBRATE))


@pytest.mark.parametrize(
    ("fault", "words"), [("damaged", "is damaged and was left out"), ("foreign", "made for other weights")]
)
def test_a_profile_with_a_fault_is_told_of_wherever_a_cache_acts(fault: Any, words: str) -> None:
    faulty = replace(ELSEWHERE, fault=fault, borrowed=True)
    for body in ({"cache_speedup": 2}, {"deepcache_enabled": True}):
        assert any(words in sentence and CALIBRATE in sentence for sentence in resolved(faulty, **body).warnings)
    assert resolved(faulty).warnings == ()


@pytest.mark.parametrize(
    "single",
    [
        {"deepcache_enabled": True},
        {"deepcache_preset": "balanced"},
        {"deepcache_interval": 3},
        {"deepcache_end_step": 1000},
        {"deepcache_schedule": "auto"},
        {"deepcache_guidance": "full"},
        {"fbcache_enabled": False},
        {"residual_diff_threshold": 0.1},
        {"fbcache_max_consecutive": 3},
        {"cache_forecast": True},
    ],
)
def test_the_single_fields_are_chosen_by_it(single: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="chosen by cache_speedup; leave one of the two out") as caught:
        resolved(SD, cache_speedup=2, **single)
    (field,) = single
    assert caught.value.field == field.replace("residual_diff", "fbcache")
    assert resolved(SD, cache_speedup=2, fbcache_max_consecutive=None).chosen is not None


def test_a_floor_alone_has_no_effect_and_img2img_no_front() -> None:
    assert resolved(SD, cache_floor=40).warnings == ("cache_floor had no effect: cache_speedup is not given.",)
    for model in ("fine", "flux"):
        with pytest.raises(Incompatible, match="Leave cache_speedup out") as caught:
            resolved(SD, model=model, cache_speedup=2, img2img_enabled=True)
        assert caught.value.field == "cache_speedup"


async def test_the_answer_says_what_was_chosen_and_what_it_promises() -> None:
    async with client_of(FakeEngine(models=catalogue(fine=SD))) as client:
        body = {"prompt": "a", "guidance_scale": 3, "cache_speedup": 2.5, "cache_floor": 35}
        answer = (await client.post("/api/generate", json=body)).json()
        plain = (await client.post("/api/generate", json={"prompt": "a"})).json()
        header = await client.post("/api/generate", json=body, headers={"Accept": "image/png"})
        listed: httpx.Response = await client.get("/api/models")
    assert answer["steps"] == 12
    assert (answer["cache"]["strategy"], answer["cache"]["interval"]) == ("deepcache", 2)
    assert answer["cache"]["chosen"] == {
        "asked_speedup": 2.5,
        "asked_steps": 20,
        "floor_db": 35.0,
        "steps": 12,
        "speedup": 2.9,
        "by": "seconds",
        "psnr_db": 40.0,
        "psnr_interval": [30.0, 50.0],
        "measured": "euler, normal, 20 steps, guidance 3, 192×128, 16 pictures, a card",
    }
    assert '"speedup": 2.9' in header.headers["X-WaveSpeed-Cache-Chosen"]
    assert "chosen" not in plain["cache"]
    assert "profile" not in listed.json()["models"][0]


def test_of_a_front_without_seconds_no_device_is_named() -> None:
    untimed = replace(SD.seen_from("another device"), fronts=(replace(ELSEWHERE.fronts[0], device=None),))
    chosen = resolved(untimed, cache_speedup=2).chosen
    assert chosen is not None
    assert chosen["measured"] == "euler, normal, 20 steps, guidance 3, 192×128, 16 pictures"
