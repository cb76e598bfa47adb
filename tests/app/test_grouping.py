"""Which jobs go together, and when a free worker waits for more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.engine.queue import QUIET, Grouping, kind_of
from app.engine.types import Job, JobHandle
from cache import DeepCache, FirstBlockCache, NoCache
from models.base import Embedding, FreeU, GenerationParams, Img2Img, Lora, Multiscale

TIMEOUT = 0.8
PARAMS = GenerationParams(prompt="a")


def job(name: str = "x", **changes: Any) -> Job:
    fields = {key: changes.pop(key) for key in ("model", "strategy") if key in changes}
    return Job(id=name, params=replace(PARAMS, **changes), **{"model": "fine", "strategy": NoCache(), **fields})


def test_prompts_and_seeds_may_differ() -> None:
    one = job(prompt="a forest", negative_prompt="rain", seeds=(1,))
    assert kind_of(one) is not None
    assert kind_of(one) == kind_of(job(prompt="the sea", seeds=(2, 3), batch_size=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"strategy": DeepCache()},
        {"strategy": FirstBlockCache(0.1)},
        {"width": 256},
        {"steps": 3},
        {"guidance_scale": 2.0},
        {"guidance_rescale": 0.5},
        {"guidance_end": 0.5},
        {"freeu": FreeU(b1=1.5, b2=1.6, s1=0.9, s2=0.2)},
        {"sampler": "heun"},
        {"scheduler": "karras"},
        {"clip_skip": 2},
        {"attention": "sage"},
        {"loras": (Lora(name="l", path=Path("l")),)},
        {"embeddings": (Embedding(name="e", path=Path("e")),)},
        {"hires_fix": True},
        {"multiscale": Multiscale()},
    ],
    ids=str,
)
def test_whatever_else_differs_keeps_them_apart_and_equal_goes_together(changes: dict[str, Any]) -> None:
    assert kind_of(job(**changes)) is not None
    assert kind_of(job(**changes)) != kind_of(job())
    assert kind_of(job("y", **changes, seeds=(9,))) == kind_of(job(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"img2img": Img2Img(picture=Image.new("RGB", (64, 64)))},
        {"adetailer": True},
        {"preview": True},
        {"compiled": True},
        {"seeds": (1, 2, 3), "batch_size": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_drawn_by_itself(changes: dict[str, Any]) -> None:
    assert kind_of(job(**changes)) is None


class World:
    """A queue, a worker and a clock of the test's own."""

    def __init__(self, most: int = 4, timeout: float = TIMEOUT) -> None:
        self.now = 0.0
        self.grouping = Grouping(most, timeout, lambda: self.now)
        self.waiting: list[JobHandle] = []
        self.running: list[JobHandle] = []

    def come(self, *jobs: Job) -> None:
        for one in jobs:
            handle = JobHandle(one, kind=kind_of(one))
            self.waiting.append(handle)
            self.grouping.arrived(handle, self.waiting, self.running)

    def start(self, **how: Any) -> str | float:
        """The names of what is started, or how long is waited."""
        group, seconds = self.grouping.choose(self.waiting, self.running, **how)
        if not group:
            return seconds
        self.waiting = [handle for handle in self.waiting if handle not in group]
        self.running += group
        return " ".join(handle.job.id for handle in group)

    def end(self, after: float = 1.0) -> None:
        self.now += after
        for handle in self.running:
            self.grouping.ended(handle)
        self.running = []


async def test_the_oldest_goes_with_those_like_it_up_to_the_limit() -> None:
    world = World()
    world.come(job("a"), job("b", steps=3), job("c"), job("d", seeds=(1, 2), batch_size=2), job("e"), job("f"))
    assert [world.start(), world.start(), world.start()] == ["a c d", "b", "e f"]


async def test_one_that_lost_a_worker_is_tried_alone() -> None:
    world = World()
    world.come(job("a"), job("b"), job("c"))
    world.waiting[1].attempts = 1
    assert [world.start(), world.start()] == ["a c", "b"]


async def test_one_who_is_alone_never_waits() -> None:
    world = World()
    for number in range(5):
        world.come(job(str(number)))
        assert world.start() == str(number)
        world.end()


async def test_those_who_ask_again_at_once_find_each_other() -> None:
    world = World(most=8)
    world.come(job("a"))
    assert world.start() == "a"  # nobody else is there
    world.come(*(job(name) for name in "bcd"))
    world.end()
    quiet = QUIET * TIMEOUT
    assert world.start() == pytest.approx(quiet)  # four were on their way, and three are here
    world.now += quiet / 2
    world.come(job("e"))
    assert world.start() == "b c d e"
    world.end()
    world.come(job("f"))
    assert world.start() == pytest.approx(quiet)
    world.now += quiet * 0.9
    world.come(job("g"))
    assert world.start() == pytest.approx(quiet)  # somebody came: the wait begins anew
    world.now += quiet
    assert world.start() == "f g"
    world.end()
    world.come(job("h"))
    assert world.start() == pytest.approx(quiet)  # two the last time
    world.now += quiet
    assert world.start() == "h"
    world.end()
    world.come(job("i"))
    assert world.start() == "i"


async def test_the_timeout_bounds_the_wait_however_many_come() -> None:
    world = World(most=16)
    world.come(*(job(str(number)) for number in range(16)))
    world.start()
    world.end()
    began = world.now
    for number in range(15):
        world.come(job(str(number)))
        if isinstance(world.start(), str):
            break
        world.now += 0.9 * QUIET * TIMEOUT
    assert world.now - began == pytest.approx(TIMEOUT, rel=0.15)


@pytest.mark.parametrize(
    ("others", "how"),
    [([], {"hurry": True}), ([], {"idle": 1}), ([job("z", steps=3)], {})],
    ids=["hurry", "another worker idle", "somebody else waits"],
)
async def test_nobody_is_kept_waiting_for_nothing(others: list[Job], how: dict[str, Any]) -> None:
    world = World()
    world.come(*(job(name) for name in "abcd"))
    world.start()
    world.end()
    world.come(job("e"), *others)
    assert world.start(**how) == "e"


async def test_an_old_crowd_is_forgotten() -> None:
    world = World()
    world.come(*(job(name) for name in "abcd"))
    world.start()
    world.end()
    world.now += 1.01 * TIMEOUT
    world.come(job("e"))
    assert world.start() == "e"


async def test_a_crowd_is_remembered_while_it_is_drawn_however_long_that_takes() -> None:
    world = World()
    world.come(*(job(name) for name in "abcd"))
    world.start()
    world.now += 100
    world.come(job("z", steps=3))
    world.waiting.clear()
    world.end()
    world.come(job("e"))
    assert isinstance(world.start(), float)


async def test_idle_workers_share_what_there_is() -> None:
    world = World()
    world.come(*(job(name) for name in "abcd"))
    assert [world.start(idle=1), world.start(idle=0)] == ["a b", "c d"]


async def test_no_timeout_no_wait() -> None:
    world = World(timeout=0)
    world.come(*(job(name) for name in "abcd"))
    world.start()
    world.end()
    world.come(job("e"))
    assert world.start() == "e"
