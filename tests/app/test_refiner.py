"""From a request's fields to a refiner, by each API; what cannot be refined is refused with its remedy."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from app.engine.types import Catalogue
from models.base import Refiner
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine, fake_catalogue
from tests.app.test_bad_input import JSON, assert_refused
from tests.app.test_infotext import restored
from tests.app.test_passes import upload

FAMILIES = {"fine": "sdxl", "slow": "sdxl", "greedy": "sdxl-refiner", "raises": "sd"}


@pytest.fixture
def engine() -> FakeEngine:
    known = fake_catalogue()
    models = {name: replace(known.models[name], family=family) for name, family in FAMILIES.items()}
    unserved = {"cut": "cut.safetensors is cut short."}
    return FakeEngine(
        models=Catalogue(models={**models, "flux": known.models["flux"]}, default="fine", unserved=unserved)
    )


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine) as client:
        yield client


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"refiner_model": "greedy"}, Refiner(model="greedy", switch=0.8)),
        ({"refiner_model": "slow", "refiner_switch": 0.5}, Refiner(model="slow", switch=0.5)),
        ({"refiner_model": "greedy", "deepcache_enabled": True}, Refiner(model="greedy", switch=0.8)),
        ({"refiner_model": None}, None),
        ({}, None),
    ],
    ids=str,
)
async def test_the_fields_name_a_second_model(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], expected: Refiner | None
) -> None:
    response = await client.post("/api/generate", json={"prompt": "a", **fields})
    assert response.status_code == 200, response.text
    (job,) = engine.submitted
    assert job.params.refiner == expected
    assert job.models == (("fine",) if expected is None else ("fine", expected.model))


@pytest.mark.parametrize(
    ("members", "status", "kind", "field", "words"),
    [
        ('"refiner_model": "absent"', 404, "unknown_model", "refiner_model", "There is no model 'absent'"),
        ('"refiner_model": "cut"', 404, "unknown_model", "refiner_model", "cut short"),
        ('"refiner_model": "raises"', 422, "incompatible", "refiner_model", "There is: slow, greedy"),
        ('"refiner_model": "fine"', 422, "incompatible", "refiner_model", "the model itself"),
        (
            '"refiner_model": "greedy", "model": "raises"',
            422,
            "incompatible",
            "refiner_model",
            "Leave refiner_model out",
        ),
        ('"refiner_model": "greedy", "model": "flux"', 422, "incompatible", "refiner_model", "which is flux"),
        ('"refiner_model": ""', 422, "invalid", "refiner_model", "at least 1 character"),
        ('"refiner_model": "greedy", "refiner_switch": 0', 422, "invalid", "refiner_switch", "greater than 0"),
        ('"refiner_model": "greedy", "refiner_switch": 1', 422, "invalid", "refiner_switch", "less than 1"),
        ('"refiner_model": "greedy", "refiner_switch": NaN', 422, "invalid", "refiner_switch", "finite"),
        ('"refiner_switch": 0.5', 422, "invalid", "refiner_switch", "with refiner_model alone"),
        ('"model": "greedy"', 422, "incompatible", "model", "Name it as refiner_model beside an SDXL"),
    ],
)
async def test_what_cannot_be_refined_is_refused_with_its_remedy(
    client: httpx.AsyncClient, engine: FakeEngine, members: str, status: int, kind: str, field: str, words: str
) -> None:
    response = await client.post("/api/generate", content=f'{{"prompt": "a", {members}}}', headers=JSON)
    assert_refused(response, status, kind, field, words)
    assert engine.submitted == []


async def test_a_refiner_alone_draws_over_a_picture(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    over = {"img2img_enabled": True, "img2img_image": upload()}
    response = await client.post("/api/generate", json={"prompt": "a", "model": "greedy", **over})
    assert response.status_code == 200, response.text
    assert engine.submitted[0].models == ("greedy",)


async def test_automatic1111_names_it_otherwise(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    there = "/sdapi/v1/txt2img"
    theirs = {"prompt": "a", "refiner_checkpoint": "greedy", "refiner_switch_at": 0.6}
    response = await client.post(there, json=theirs)
    assert response.status_code == 200, response.text
    info = json.loads(response.json()["info"])
    found = restored(info["infotexts"][0])
    assert (found["Refiner"], found["Refiner switch at"]) == ("greedy", "0.6")
    for none in ({"refiner_checkpoint": "None", "refiner_switch_at": 0.8}, {"refiner_checkpoint": ""}, {}):
        assert (await client.post(there, json={"prompt": "a", **none})).status_code == 200
    assert [job.params.refiner for job in engine.submitted] == [Refiner(model="greedy", switch=0.6), None, None, None]
    response = await client.post(there, json={**theirs, "refiner_checkpoint": "raises"})
    assert_refused(response, 422, "incompatible", "refiner_model", "There is: slow, greedy")
