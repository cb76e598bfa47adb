"""Memory: what cannot fit is refused unstarted, what runs out is tried in smaller batches, and life goes on."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.engine import memory
from app.engine.runner import RegistryRunner, configured_runner
from app.engine.types import Job
from cache import CacheStrategy, NoCache
from models.base import Generation, GenerationParams, StepHook
from tests.app.conftest import client_of
from tests.app.fakes import WEIGHTS, FakeModel, FakeRegistry, GreedyModel, OutOfMemoryError
from tests.app.test_engine import until
from tests.app.test_server import local_engine, post

PARAMS = GenerationParams(prompt="a", width=100, height=100, steps=2, seeds=(1, 2, 3, 4, 5), batch_size=4)
NEED = 100 * 100  # of one image, as the fake model says


class Watched(FakeModel):
    """Notes the batch sizes that it was run with."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        self.sizes.append(params.batch_size)
        return super().generate(params, strategy, on_step)


def drawn(model: Any, params: GenerationParams = PARAMS) -> Generation:
    return memory.draw(model, params, NoCache(), lambda step: None, "cpu")


@pytest.mark.parametrize(
    ("free", "asked", "together"),
    [(10 * NEED, 4, 4), (4 * NEED, 4, 4), (4 * NEED - 1, 4, 3), (NEED, 4, 1), (NEED, 1, 1)],
)
def test_as_many_are_denoised_together_as_fit(
    monkeypatch: pytest.MonkeyPatch, free: int, asked: int, together: int
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    model = Watched()
    generation = drawn(model, replace(PARAMS, batch_size=asked))
    assert (model.sizes, generation.batches[0]) == ([together], together)
    assert len(generation.images) == 5
    said = [sentence for sentence in generation.warnings if "do not fit" in sentence]
    assert len(said) == (together < asked)


def test_what_can_never_fit_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: NEED - 1)
    model = Watched()
    with pytest.raises(MemoryError, match="10000 bytes"):
        drawn(model)
    assert model.sizes == []


def test_a_batch_that_runs_out_is_drawn_one_at_a_time_and_equal() -> None:
    generation = drawn(GreedyModel())
    alone = FakeModel().generate(replace(PARAMS, batch_size=1), NoCache(), lambda step: None)
    assert generation.batches == [1] * 5
    assert [image.tobytes() for image in generation.images] == [image.tobytes() for image in alone.images]
    assert any("one at a time" in sentence for sentence in generation.warnings)


class Tensor:
    """Stands for what a failed attempt held."""


class Hoarder(FakeModel):
    """Runs out of memory with a tensor in its frame; notes whether that is gone at the next attempt."""

    def __init__(self) -> None:
        self.held: list[weakref.ref[Tensor]] = []
        self.gone: list[bool] = []

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        self.gone += [reference() is None for reference in self.held]
        tensor = Tensor()
        self.held.append(weakref.ref(tensor))
        raise OutOfMemoryError(str(tensor))


def test_the_first_attempts_tensors_are_gone_before_the_second_which_is_the_last() -> None:
    model = Hoarder()
    with pytest.raises(OutOfMemoryError):
        drawn(model)
    assert (len(model.held), model.gone) == (2, [True])


def test_other_failures_and_single_images_are_not_tried_again() -> None:
    class Raises(Watched):
        def step(self, index: int) -> None:
            raise RuntimeError("not about memory")

    class Hungry(Watched):
        def step(self, index: int) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    for model, batch in ((Raises(), 4), (Hungry(), 1)):
        with pytest.raises(RuntimeError):
            drawn(model, replace(PARAMS, batch_size=batch))
        assert len(model.sizes) == 1


def crowded(monkeypatch: pytest.MonkeyPatch, runner: RegistryRunner, most: int, free: int) -> None:
    """`free` bytes are free while at most so many models are loaded, else none."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free if len(runner.condition().loaded) <= most else 0)


def of_model(model: str) -> Job:
    return Job(id="x", model=model, params=PARAMS, strategy=NoCache())


@pytest.mark.parametrize(("most", "left"), [(3, ["fine", "slow", "flux"]), (2, ["flux", "fine"]), (1, ["fine"])])
def test_idle_models_go_before_a_job_is_refused_the_one_used_longest_ago_first(
    monkeypatch: pytest.MonkeyPatch, most: int, left: list[str]
) -> None:
    runner = RegistryRunner(FakeRegistry(), "fake device")
    for name in ("fine", "slow", "flux"):
        runner.load(name)
    crowded(monkeypatch, runner, most, NEED)
    assert len(runner.run(of_model("fine"), lambda step: None).images) == 5
    assert sorted(runner.condition().loaded) == sorted(left)


def test_idle_models_stay_when_a_job_would_not_fit_without_them_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one request for too large a picture would cost everybody else their models."""
    runner = RegistryRunner(FakeRegistry(), "fake device")
    for name in ("slow", "flux", "fine"):
        runner.load(name)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    large = replace(of_model("fine"), params=replace(PARAMS, width=200, height=101))
    assert 2 * WEIGHTS < 200 * 101
    with pytest.raises(MemoryError):
        runner.run(large, lambda step: None)
    assert sorted(runner.condition().loaded) == ["fine", "flux", "slow"]


def test_with_no_idle_model_left_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = RegistryRunner(FakeRegistry(), "fake device")
    runner.load("slow")
    crowded(monkeypatch, runner, 0, NEED)
    with pytest.raises(MemoryError):
        runner.run(of_model("fine"), lambda step: None)
    assert runner.condition().loaded == ("fine",)


def test_no_model_is_given_up_for_a_larger_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn in parts, which takes less time than to load a model again."""
    runner = RegistryRunner(FakeRegistry(), "fake device")
    runner.load("slow")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * NEED)
    assert runner.run(of_model("fine"), lambda step: None).batches == (2, 2, 1)
    assert sorted(runner.condition().loaded) == ["fine", "slow"]


def test_a_single_image_that_runs_out_is_drawn_with_the_idle_models_gone() -> None:
    idle = ["a", "b"]

    class Crowded(Watched):
        def step(self, index: int) -> None:
            if idle:
                raise OutOfMemoryError("CUDA out of memory")

    model = Crowded()
    made = memory.draw(model, PARAMS, NoCache(), lambda step: None, "cpu", lambda missing: bool(idle and idle.pop()))
    assert (model.sizes, len(made.images)) == ([4, 1, 1, 1], 5)


class Tiled(Watched):
    """Whose decode in tiles needs a quarter."""

    def working_bytes(self, params: GenerationParams, images: int) -> int:
        return super().working_bytes(params, images) // (4 if params.vae_tiling else 1)

    def generate(self, params: GenerationParams, *args: Any) -> Generation:
        self.tiled = params.vae_tiling
        return super().generate(params, *args)


@pytest.mark.parametrize(("images_free", "tiled"), [(1.0, False), (0.5, True), (0.25, True), (0.2, None)])
def test_a_picture_that_is_too_large_is_decoded_in_tiles(
    monkeypatch: pytest.MonkeyPatch, images_free: float, tiled: bool | None
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(images_free * NEED))
    model, asked = Tiled(), []
    params = replace(PARAMS, seeds=(1,))

    def draw() -> Generation:
        return memory.draw(
            model, params, NoCache(), lambda step: None, "cpu", lambda missing: bool(asked.append(missing))
        )

    if tiled is None:
        with pytest.raises(MemoryError, match="bytes at least"):
            draw()
        assert len(asked) == 2  # idle models go before tiles are tried, and with them
        return
    made = draw()
    assert model.tiled is tiled
    assert any("in tiles" in sentence for sentence in made.warnings) is tiled
    assert len(asked) == tiled


def test_real_models_that_lie_idle_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = configured_runner("cpu", threads=1)
    idle = weakref.ref(runner.model("tiny-flux").denoiser.root)
    runner.load("tiny-sd")
    params = GenerationParams(prompt="a misty forest", width=64, height=64, steps=1, seeds=(1,))
    job = Job(id="x", model="tiny-sd", params=params, strategy=NoCache())
    before = runner.run(job, lambda step: None)
    assert set(runner.condition().loaded) == {"tiny-sd", "tiny-flux"}
    need = runner.model("tiny-sd").working_bytes(params, 1)
    beside = {1: 2**40, 2: need - 1}
    monkeypatch.setattr(memory, "free_bytes", lambda device: beside[len(runner.condition().loaded)])
    assert runner.run(job, lambda step: None).images == before.images
    assert runner.condition().loaded == ("tiny-sd",)
    assert idle() is None
    crowded(monkeypatch, runner, 0, 2**40)
    with pytest.raises(MemoryError):
        runner.run(job, lambda step: None)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    for name, text in {"max": "1000\n", "current": "700\n", "stat": "anon 500\ninactive_file 150\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._container_bytes(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes(tmp_path) == float("inf")
    assert memory._container_bytes(tmp_path / "nothing") == float("inf")
    assert 0 < memory.free_bytes("cpu") < 2**50


async def test_after_it_ran_out_a_request_works_in_the_same_worker() -> None:
    engine = local_engine()
    async with client_of(engine, max_batch_size=4) as client:
        await until(lambda: engine.status().ready)
        worker = engine.status().devices[0].pid
        split = await post(client, model="greedy", num_images=4, batch_size=4)
        assert (split.status_code, len(split.json()["images"])) == (200, 4)
        assert any("one at a time" in sentence for sentence in split.json()["warnings"])
        for _ in range(3):
            out = await post(client, model="hungry", num_images=4, batch_size=4)
            assert (out.status_code, out.json()["error"]["type"]) == (503, "out_of_memory")
            assert int(out.headers["retry-after"]) > 0
            assert (await post(client)).status_code == 200
        assert engine.status().devices[0].pid == worker
        both = await asyncio.gather(post(client, model="hungry"), post(client))
        assert [response.status_code for response in both] == [503, 200]


def test_a_runner_counts_the_batches_that_were_drawn() -> None:
    runner = RegistryRunner(FakeRegistry(), "fake device")
    result = runner.run(Job(id="x", model="greedy", params=PARAMS, strategy=NoCache()), lambda step: None)
    assert (result.batches, len(result.images)) == ((1,) * 5, 5)


class Movable(FakeModel):
    """Another plan takes half of the memory; notes what it was drawn under."""

    def __init__(self) -> None:
        self.plan = "none"
        self.drawn: list[str] = []

    def working_bytes(self, params: GenerationParams, images: int) -> int:
        return super().working_bytes(params, images) // (2 if self.plan == "model" else 1)

    def tighter(self, params: GenerationParams, free: int) -> Any:
        return "model" if self.plan == "none" and super().working_bytes(params, 1) // 2 <= free else None

    @contextmanager
    def settled(self, plan: str) -> Iterator[None]:
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        self.drawn.append(self.plan)
        return super().generate(params, strategy, on_step)


@pytest.mark.parametrize(("free", "plans"), [(NEED, ["none"]), (NEED - 1, ["model"]), (NEED // 2 - 1, [])])
def test_a_job_is_drawn_under_another_plan_before_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, free: int, plans: list[str]
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    model = Movable()
    if plans:
        assert len(drawn(model).images) == 5
    else:
        with pytest.raises(MemoryError):
            drawn(model)
    assert (model.drawn, model.plan) == (plans, "none")
