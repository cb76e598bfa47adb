"""ControlNets over HTTP: what `control` and other APIs' words for it become, and what is refused before it is drawn."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.engine.queue import kind_of
from app.infotext import restored
from models.base import Control
from models.embedded import CONTROLNETS
from models.families import FAMILIES
from models.stages.kept import exactly
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_bad_input import assert_refused
from tests.app.test_masks import sent
from tests.app.test_passes import bomb, upload

SIZE = {"width": 96, "height": 64}
MAP = upload()
ONE = {"model": "canny", "image": MAP}
WIDE = sent(Image.linear_gradient("L").resize((192, 64)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, one of a subfolder, a folder in diffusers format; a pickle, and a link that leads out."""
    outside = tmp_path_factory.mktemp("outside") / "a.safetensors"
    outside.write_bytes(b"")
    root = tmp_path_factory.mktemp("controlnets")
    for name in ("canny.safetensors", "xl/depth.v2.safetensors", "old.pth", "edges/config.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"{}")
    (root / "edges" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (root / "link.safetensors").symlink_to(outside)
    return root


@pytest.fixture
async def client(engine: FakeEngine, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine, control_folder=folder) as client:
        yield client


async def steered(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], address: str = "/api/generate"
) -> tuple[Control, ...]:
    answer = await client.post(address, json={"prompt": "a", **SIZE, **body})
    assert answer.status_code == 200, answer.text
    return engine.submitted[-1].params.control


async def test_fields_become_what_steers(client: httpx.AsyncClient, engine: FakeEngine, folder: Path) -> None:
    """The picture is cut and scaled on arrival, as that of img2img is."""
    units = [
        {**ONE, "weight": 0, "start": 0.25, "end": 0.5},
        {"model": "depth.v2", "image": WIDE, "edges": True},
        {"model": "edges", "image": f"data:image/png;base64,{MAP}"},
        ONE,
    ]
    one, two, three, four = await steered(client, engine, {"control": units})
    assert (one.name, one.path, one.weight, one.start, one.end) == ("canny", folder / "canny.safetensors", 0, 0.25, 0.5)
    assert (two.name, two.path, two.edges) == ("xl/depth.v2", folder / "xl" / "depth.v2.safetensors", True)
    assert (three.name, three.path) == ("edges", folder / "edges")
    assert four == Control(name="canny", path=one.path, image=four.image)
    assert {unit.image.size for unit in (one, two, three, four)} == {(96, 64)}
    cut = np.asarray(Image.linear_gradient("L").resize((192, 64)).crop((48, 0, 144, 64)).convert("RGB"))
    assert np.array_equal(np.asarray(two.image), cut)
    for model in ("flux", "fine"):
        assert len(await steered(client, engine, {"model": model, "control": [ONE]})) == 1


async def test_names_are_listed(client: httpx.AsyncClient) -> None:
    names = sorted(["canny", "edges", "xl/depth.v2", *CONTROLNETS])
    assert (await client.get("/api/controlnets")).json() == {"models": names}
    assert (await client.get("/api/adapters")).json()["controlnets"] == names
    assert (await client.get("/controlnet/model_list")).json() == {"model_list": names}
    assert (await client.get("/controlnet/module_list")).json()["module_list"] == ["none", "canny"]
    assert (await client.get("/controlnet/settings")).json() == {"control_net_unit_count": 4}
    assert (await client.get("/controlnet/version")).json() == {"version": 3}


REFUSED: dict[str, tuple[Any, int, str, str, str]] = {
    "no list": ({}, 422, "invalid", "control", "list"),
    "five": ([ONE] * 5, 422, "invalid", "control", "4"),
    "ten": ([ONE] * 10, 422, "invalid", "control", "4"),
    "no model": ([{"image": MAP}], 422, "invalid", "control.0.model", "required"),
    "no picture": ([ONE, {"model": "canny"}], 422, "invalid", "control.1.image", "required"),
    "a slip": ([{**ONE, "wieght": 1}], 422, "invalid", "control.0.wieght", "not permitted"),
    "a negative weight": ([{**ONE, "weight": -0.5}], 422, "invalid", "control.0.weight", "greater than or equal to 0"),
    "too much weight": ([{**ONE, "weight": 2.5}], 422, "invalid", "control.0.weight", "less than or equal to 2"),
    "a weight that is none": ([{**ONE, "weight": float("nan")}], 422, "invalid", "control.0.weight", "finite"),
    "start after end": ([ONE, {**ONE, "start": 0.6, "end": 0.4}], 422, "invalid", "control.1.start", "less than end"),
    "start at end": ([{**ONE, "start": 0.5, "end": 0.5}], 422, "invalid", "control.0.start", "swap them"),
    "start at 1": ([{**ONE, "start": 1}], 422, "invalid", "control.0.start", "less than 1"),
    "end at 0": ([{**ONE, "end": 0}], 422, "invalid", "control.0.end", "greater than 0"),
    "a path": ([{**ONE, "image": "/etc/passwd"}], 422, "invalid", "control.0.image", "not base64"),
    "a URL": ([{**ONE, "image": "http://169.254.169.254/"}], 422, "invalid", "control.0.image", "nothing is fetched"),
    "a bomb": ([ONE, {**ONE, "image": bomb()}], 413, "picture_too_large", "control.1.image", "pixels"),
    "an unknown name": ([{**ONE, "model": "cany"}], 422, "invalid", "control.0.model", "Nearest: canny"),
    "a name outside": ([{**ONE, "model": "../a"}], 422, "invalid", "control.0.model", "no ControlNet"),
    "a link that leads out": ([{**ONE, "model": "link"}], 422, "invalid", "control.0.model", "no ControlNet"),
    "a file of a folder": (
        [{**ONE, "model": "edges/diffusion_pytorch_model"}], 422, "invalid", "control.0.model", "no ControlNet"
    ),
    "a pickle": ([{**ONE, "model": "old"}], 422, "invalid", "control.0.model", "never loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_steer_is_refused_and_the_next_request_is_drawn(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    control, status, kind, field, words = REFUSED[name]
    content = json.dumps({"prompt": "a", **SIZE, "control": control})
    answer = await client.post("/api/generate", content=content, headers={"Content-Type": "application/json"})
    assert_refused(answer, status, kind, field, words)
    assert engine.submitted == []
    assert len(await steered(client, engine, {"control": [ONE]})) == 1


async def test_a_family_that_has_none_refuses_them(folder: Path) -> None:
    engine = FakeEngine()
    models = {name: replace(info, family="sdxl-refiner") for name, info in engine.models.models.items()}
    over = {"img2img_enabled": True, "img2img_image": MAP}
    async with client_of(
        replace(engine, models=replace(engine.models, models=models)), control_folder=folder
    ) as client:
        answer = await client.post("/api/generate", json={"prompt": "a", **SIZE, **over, "control": [ONE]})
        assert_refused(answer, 422, "incompatible", "control", "sdxl-refiner", "flux-dev")
        assert (await client.post("/api/generate", json={"prompt": "a", **SIZE, **over})).status_code == 200
    steered = {"sd", "sd15", "sd21", "sdxl", "flux", "flux-schnell", "flux-dev", "flux-fill"}
    assert {name for name, family in FAMILIES.items() if family.controlnets} == steered


async def test_a_full_queue_decodes_no_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.http.pictures.read_picture", lambda *_, **__: pytest.fail("decoded"))
    async with client_of(FakeEngine(capacity=0), control_folder=folder) as client:
        answer = await client.post("/api/generate", json={"prompt": "a", "control": [ONE]})
        assert_refused(answer, 429, "queue_full", None)


async def test_requests_with_maps_are_drawn_apart_and_kept_by_what_they_show(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for image in (MAP, MAP, WIDE):
        await steered(client, engine, {"seed": 7, "control": [{**ONE, "image": image}]})
    assert {kind_of(job) for job in engine.submitted} == {None}
    same, again, other = [exactly(job.params) for job in engine.submitted]
    assert same == again
    assert {name for name, value in same.items() if value != other[name]} == {"control"}


async def test_the_text_of_a_png_names_them(client: httpx.AsyncClient) -> None:
    unit = {**ONE, "weight": 0.5, "end": 0.75, "edges": True}
    answer = await client.post("/api/generate", json={"prompt": "a", **SIZE, "control": [unit, ONE]})
    texts = Image.open(io.BytesIO(base64.b64decode(answer.json()["image"]))).text  # type: ignore[attr-defined]
    told = restored(texts["parameters"])
    assert told["ControlNet 0"] == (
        "Module: canny, Model: canny, Weight: 0.5, Resize Mode: Crop and Resize, Guidance Start: 0, "
        "Guidance End: 0.75, Control Mode: Balanced"
    )
    assert told["ControlNet 1"].startswith("Module: none, Model: canny, Weight: 1,")
    first = {"name": "canny", "weight": 0.5, "start": 0, "end": 0.75, "edges": True}
    assert json.loads(texts["wavespeed"])["control"][0] == first


# LightDiffusion-Next's words.
LIGHT = {"controlnet_enabled": True, "controlnet_model": "canny", "img2img_image": WIDE}


async def test_lightdiffusions_words_are_one_of_control(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    (one,) = await steered(client, engine, {**LIGHT, "controlnet_strength": 0.7})
    assert (one.name, one.weight, one.edges, one.image.size) == ("canny", 0.7, True, (96, 64))
    assert engine.submitted[-1].params.img2img is None
    assert not any("img2img_image" in warning for warning in engine.submitted[-1].warnings)
    (one,) = await steered(client, engine, {**LIGHT, "controlnet_type": "none", "img2img_mode": True})
    assert not one.edges
    assert engine.submitted[-1].params.img2img is not None
    assert await steered(client, engine, {"controlnet_enabled": False, "controlnet_model": "x"}) == ()


@pytest.mark.parametrize(
    ("fields", "kind", "field", "words"),
    [
        ({"controlnet_model": None}, "invalid", "controlnet_model", "/api/controlnets"),
        ({"controlnet_model": "x"}, "invalid", "control.0.model", "Nearest"),
        ({"controlnet_type": "openpose"}, "unsupported", "controlnet_type", "Make the map"),
        ({"controlnet_strength": 3.0}, "invalid", "controlnet_strength", "2"),
        ({"img2img_image": None}, "invalid", "img2img_image", "reads a picture"),
        ({"control": [ONE]}, "invalid", "controlnet_enabled", "give one"),
    ],
    ids=["unnamed", "unknown", "preprocessor", "strength", "no picture", "twice"],
)
async def test_lightdiffusions_words_that_cannot_be_meant_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], kind: str, field: str, words: str
) -> None:
    answer = await client.post("/api/generate", json={"prompt": "a", **SIZE, **LIGHT, **fields})
    assert_refused(answer, 422, kind, field, words)
    assert engine.submitted == []


# AUTOMATIC1111's units.
UNIT = {"enabled": True, "module": "canny", "model": "canny [d14c016b]", "image": MAP, "weight": 0.8}
NEUTRAL = {
    "mask": None, "resize_mode": "Crop and Resize", "low_vram": False, "processor_res": 512, "threshold_a": -1,
    "threshold_b": 200.0, "guidance_start": 0.0, "guidance_end": 0.5, "control_mode": "Balanced", "pixel_perfect": True,
    "hr_option": "Both", "save_detected_map": True, "advanced_weighting": None, "inpaint_crop_input_image": False,
    "effective_region_mask": None, "ipadapter_input": None, "union_control_type": "Unknown", "pulid_mode": "Fidelity",
    "input_mode": "simple", "batch_images": "", "loopback": False, "is_ui": True, "output_dir": "",
}  # fmt: skip


def scripts(*units: Any) -> dict[str, Any]:
    return {"alwayson_scripts": {"ControlNet": {"args": list(units)}}}


async def test_units_are_control(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    older = {"model": "xl/depth.v2", "input_image": f"data:image/png;base64,{MAP}", "control_mode": 0, "lowvram": True}
    boxed = {
        "module": None,
        "threshold_a": 64,
        "model": "edges",
        "image": {"image": WIDE, "mask": None},
        "resize_mode": 1,
    }
    off = {"enabled": False, "module": "depth_midas", "model": "None"}
    one, two, three = await steered(
        client, engine, scripts({**UNIT, **NEUTRAL}, off, older, boxed), "/sdapi/v1/txt2img"
    )
    assert (one.name, one.weight, one.start, one.end, one.edges) == ("canny", 0.8, 0, 0.5, True)
    assert (two.name, two.weight, two.end, two.edges) == ("xl/depth.v2", 1, 1, False)
    assert (three.name, three.edges, three.image.size) == ("edges", False, (96, 64))
    assert [said.partition(" ")[0] for said in engine.submitted[-1].warnings] == [
        "alwayson_scripts.ControlNet.args.2.lowvram"
    ]
    fits = {**UNIT, "resize_mode": "Resize and Fill"}
    assert len(await steered(client, engine, scripts(fits), "/sdapi/v1/txt2img")) == 1
    body = {"init_images": [MAP], **scripts({"model": "canny", "module": "none"})}
    (own,) = await steered(client, engine, body, "/sdapi/v1/img2img")
    assert own.image.getextrema() == ((10, 10), (20, 20), (30, 30))


@pytest.mark.parametrize(
    ("changes", "kind", "field", "words"),
    [
        ({"module": "openpose_full"}, "unsupported", "module", "Make the map yourself"),
        ({"module": "invert (from white bg & black line)"}, "unsupported", "module", "none, canny"),
        ({"module": 5}, "unsupported", "module", "no preprocessor"),
        ({"resize_mode": "Just Resize", "image": WIDE}, "invalid", "control.0.image", "Crop and Resize"),
        ({"resize_mode": 3}, "invalid", "resize_mode", "Crop and Resize"),
        ({"resize_mode": True}, "invalid", "resize_mode", "Crop and Resize"),
        ({"control_mode": "My prompt is more important"}, "unsupported", "control_mode", "Set weight"),
        ({"threshold_a": 64}, "unsupported", "threshold_a", "100 and 200"),
        ({"hr_option": "High res only"}, "unsupported", "hr_option", "both passes"),
        ({"mask": MAP}, "unsupported", "mask", "whole picture"),
        ({"image": {"image": MAP, "mask": MAP}}, "unsupported", "image.mask", "whole picture"),
        ({"strength": 1}, "unsupported", "strength", "leave it out"),
        ({"model": "None"}, "invalid", "control.0.model", "no ControlNet"),
        ({"model": "other [d14c016b]"}, "invalid", "control.0.model", "no ControlNet 'other'"),
        ({"image": None}, "invalid", "control.0.image", "required"),
        ({"weight": -1}, "invalid", "control.0.weight", "greater"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "invalid", "control.0.start", "less than end"),
    ],
)  # fmt: skip
async def test_units_that_are_not_drawn_here_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, changes: dict[str, Any], kind: str, field: str, words: str
) -> None:
    body = {"prompt": "a", **SIZE, **scripts({**UNIT, **changes})}
    named = field if field.startswith("control.") else f"alwayson_scripts.ControlNet.args.0.{field}"
    assert_refused(await client.post("/sdapi/v1/txt2img", json=body), 422, kind, named, words)
    assert engine.submitted == []
    text = {"prompt": "a", **SIZE, **scripts("canny")}
    where = "alwayson_scripts.ControlNet.args.0"
    assert_refused(await client.post("/sdapi/v1/txt2img", json=text), 422, "invalid", where, "is a unit")
