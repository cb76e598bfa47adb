"""Any call is refused or does what was asked, and every accepted job ends exactly once: whatever comes in which order.

Clients of the real app over the real engine; its worker is a thread that does one thing at a time on the test's word.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from PIL import Image

from app.engine.types import JOB_MOVES, JobState
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.test_engine import until
from tests.app.test_server import samples

QUEUE_SIZE = 3
TOGETHER = 3
# Which of the jobs that there are by then: how many are taken depends on the threads, so what is drawn must not.
WHICH = st.integers(0, 99)
SEEDS = st.integers(0, 255)
_Result = TypeVar("_Result")


LOSSES = ("worker_lost", "model_unavailable", "not_ready")  # after kills: of two, of two while loading, of three
REFUSALS = [(429, "queue_full"), *((503, loss) for loss in LOSSES)]


def refusal(response: httpx.Response) -> tuple[int, str]:
    assert int(response.headers["retry-after"]) > 0
    return response.status_code, response.json()["error"]["type"]


@dataclass
class Known:
    """What a client knows of its job."""

    seed: int
    state: JobState
    cancelled: bool = False


def reachable(old: JobState, new: JobState) -> bool:
    """A client that looks now and then may miss states in between."""
    seen, border = {old}, [old]
    while border:
        for state in JOB_MOVES[border.pop()] - seen:
            seen.add(state)
            border.append(state)
    return new in seen


class Service(RuleBasedStateMachine):
    shared = 0.0  # jobs, of all runs, that were done in a batch with others

    def __init__(self) -> None:
        super().__init__()
        self.nursery = Nursery()
        self.runner = asyncio.Runner()
        self.jobs: dict[str, Known] = {}
        self.calls: list[tuple[int, asyncio.Task[httpx.Response]]] = []
        self.asked = 0

    def run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        return self.runner.run(coroutine)

    @initialize()
    def start(self) -> None:
        async def begin() -> httpx.AsyncClient:
            self.engine = self.nursery.engine(
                queue_size=QUEUE_SIZE, quarantine_seconds=0.05, max_batch_size=TOGETHER, batch_timeout=0.01
            )
            self.context = client_of(self.engine)
            client = await self.context.__aenter__()
            await until(lambda: self.engine.status().ready)
            return client

        self.client = self.run(begin())

    def body(self, seed: int, steps: int) -> dict[str, Any]:
        return {"prompt": "a", "width": 64, "height": 64, "seed": seed, "steps": steps}

    @rule(seed=SEEDS, steps=st.integers(1, 2), key=st.sampled_from([None, "k", "l"]))
    def submit(self, seed: int, steps: int, key: str | None) -> None:
        headers = {"Idempotency-Key": f"{key}-{seed}-{steps}"} if key else {}
        response = self.run(self.client.post("/api/jobs", json=self.body(seed, steps), headers=headers))
        if response.status_code == 202:
            identity = response.json()["id"]
            if identity in self.jobs:
                assert key is not None
                assert self.jobs[identity].seed == seed
            else:
                self.asked += 1
                self.jobs[identity] = Known(seed, JobState.QUEUED)
        else:
            self.asked += 1
            assert refusal(response) in REFUSALS

    @rule(seed=SEEDS, steps=st.integers(1, 2))
    def generate(self, seed: int, steps: int) -> None:
        async def begin() -> asyncio.Task[httpx.Response]:
            task = asyncio.create_task(self.client.post("/api/generate", json=self.body(seed, steps)))
            await asyncio.sleep(0)
            return task

        self.asked += 1
        self.calls.append((seed, self.run(begin())))

    @rule(which=WHICH)
    def disconnect(self, which: int) -> None:
        async def leave(task: asyncio.Task[httpx.Response]) -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        if self.calls:
            _, task = self.calls.pop(which % len(self.calls))
            self.run(leave(task))

    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        if not self.jobs:
            return
        identity = list(self.jobs)[which % len(self.jobs)]
        known = self.jobs[identity]
        response = self.run(self.client.delete(f"/api/jobs/{identity}"))
        if response.status_code == 200:
            assert response.json()["state"] == "cancelled"
            assert known.state in (JobState.QUEUED, JobState.RUNNING, JobState.CANCELLED)
            known.state, known.cancelled = JobState.CANCELLED, True
        else:
            assert (response.status_code, response.json()["error"]["type"]) == (409, "job_finished")
            assert not known.cancelled

    @rule(which=WHICH)
    def poll(self, which: int) -> None:
        if self.jobs:
            self.look(list(self.jobs)[which % len(self.jobs)])

    def look(self, identity: str) -> JobState:
        known = self.jobs[identity]
        response = self.run(self.client.get(f"/api/jobs/{identity}"))
        assert response.status_code == 200
        job = response.json()
        state = JobState(job["state"])
        assert reachable(known.state, state)
        assert (job["result"] is not None) == (state is JobState.DONE)
        assert (job["error"] is not None) == (state in (JobState.FAILED, JobState.CANCELLED))
        assert (job["finished"] is not None) == (not JOB_MOVES[state])
        if state is JobState.DONE:
            assert colour(job["result"]) == known.seed
        if state is JobState.FAILED:
            assert job["error"]["type"] in LOSSES
        known.state = state
        return state

    @rule(times=st.integers(1, 4))
    def work(self, times: int) -> None:
        """The worker does so many things, if it has so many to do."""

        async def go() -> None:
            gate = self.nursery.gate
            before = len(gate.passed)

            def over() -> bool:
                idle = self.engine.status().running == 0
                return idle or len(gate.passed) >= before + times or gate is not self.nursery.gate

            gate.open(times)
            await until(over)
            gate.close()

        self.run(go())

    @rule()
    def kill(self) -> None:
        """Whatever the worker is doing, coming up included; the next rule may find the engine with none."""
        self.nursery.child.kill()
        self.run(asyncio.sleep(0))

    @invariant()
    def the_queue_is_bounded(self) -> None:
        assert self.engine.status().pending <= QUEUE_SIZE + TOGETHER  # more: those that came back from a lost worker

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            self.runner.close()
            return
        try:
            self.run(self.end())
            for identity in self.jobs:
                assert not JOB_MOVES[self.look(identity)]
            self.run(self.count())
        finally:
            self.run(self.context.__aexit__(None, None, None))
            self.runner.close()

    async def end(self) -> None:
        """Let everything run to its end."""

        def idle() -> bool:
            self.nursery.gate.open(1)
            status = self.engine.status()
            return status.pending == status.running == 0

        await until(idle)
        for seed, call in self.calls:
            response = await call
            if response.status_code == 200:
                assert colour(response.json()) == seed
            else:
                assert refusal(response) in REFUSALS
        for identity in self.jobs:
            await self.client.get(f"/api/jobs/{identity}/events")  # returns when it has ended

    async def count(self) -> None:
        """Every request was counted with one outcome: none was answered twice, and none was forgotten."""
        counted = samples((await self.client.get("/metrics")).text)
        total = sum(value for (name, _), value in counted.items() if name == "wavespeed_requests_total")
        assert total == self.asked
        done, batches = (counted[f"wavespeed_batch_images_{what}", frozenset()] for what in ("sum", "count"))
        Service.shared += done - batches


def colour(answer: dict[str, Any]) -> int:
    """Of the fake's picture: its red is the seed."""
    red: int = Image.open(io.BytesIO(base64.b64decode(answer["image"]))).getpixel((0, 0))[0]  # type: ignore[index]
    return red


def test_every_call_is_refused_or_done_and_every_accepted_job_ends_once() -> None:
    run_state_machine_as_test(
        Service,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Service.shared > 0
