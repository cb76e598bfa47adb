"""What the page sends, held against the API's own schema; its pictures' arithmetic against scikit-image."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from app.client import ApiError, Unreachable
from app.http.schemas import PRESETS as API_PRESETS
from app.http.schemas import parse
from app.ui import strip
from app.ui.difference import difference, psnr
from app.ui.gallery import Drawn
from app.ui.refusal import explained
from app.ui.request import (
    ASPECTS,
    DEFAULTS,
    PRESETS,
    SPEEDS,
    aspect_of,
    body,
    no_deepcache,
    no_fbcache,
    reuse_cost,
    size_of,
    widgets,
)
from app.ui.result import faster
from app.ui.scenes import PLACES, TIMES, WEATHERS, scene
from app.ui.source import fitting, wrong_with
from models.embedded.recipe import grammar

NATIVE = {"native_size": [512, 512], "render_sizes": []}
UNET: dict[str, Any] = {
    **NATIVE,
    "name": "unet",
    "cache": "deepcache",
    "branches": [
        {"branch": 0, "reuse_cost": 0.08},
        {"branch": 1, "reuse_cost": 0.22},
        {"branch": 2, "reuse_cost": 0.38},
        {"branch": 3, "reuse_cost": 0.47},
    ],
}
FLUX: dict[str, Any] = {**NATIVE, "name": "flux", "cache": "first_block", "branches": []}
PIXEL = b"not looked at"


def test_presets_are_those_of_the_api() -> None:
    for name, preset in PRESETS.items():
        sent = body({**DEFAULTS, "by_hand": True, **preset}, UNET)
        assert {field: sent[field] for field in API_PRESETS[name]} == API_PRESETS[name]
    assert PRESETS.keys() == API_PRESETS.keys()


@pytest.mark.parametrize("model", [UNET, FLUX], ids=lambda model: model["name"])
@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_set_by_hand_is_valid_and_for_the_model_alone(model: dict[str, Any], enabled: bool) -> None:
    values = {**DEFAULTS, "by_hand": True, "deepcache_enabled": enabled, "fbcache_enabled": enabled}
    sent = body({**values, "negative_prompt": "fog", "seed": 3, "deepcache_forecast": False}, model)
    parse(sent)
    assert sent.get("deepcache_enabled", False) == (enabled and model is UNET)
    assert ("fbcache_threshold" in sent) == (enabled and model is FLUX)
    assert ("negative_prompt" in sent) == (model is UNET)
    assert "steps" not in sent  # left to the server


@pytest.mark.parametrize("model", [UNET, FLUX], ids=lambda model: model["name"])
@pytest.mark.parametrize("speed", SPEEDS)
def test_the_speed_is_one_field_of_the_request(model: dict[str, Any], speed: float | str) -> None:
    sent = body({**DEFAULTS, "speed": speed}, model)
    parse(sent)
    said = {name: value for name, value in sent.items() if "cache" in name}
    unet: dict[str | float, dict[str, Any]] = {
        "off": {},
        "balanced": {"deepcache_enabled": True, "deepcache_preset": "balanced"},
    }
    flux: dict[str | float, dict[str, Any]] = {"off": {"fbcache_enabled": False}, "balanced": {"fbcache_enabled": True}}
    assert said == (unet if model is UNET else flux).get(speed, {"cache_speedup": speed})


@pytest.mark.parametrize("mask", [None, PIXEL])
@pytest.mark.parametrize("model", [UNET, FLUX], ids=lambda model: model["name"])
def test_a_picture_to_begin_from_and_its_mask_are_sent(model: dict[str, Any], mask: bytes | None) -> None:
    sent = body({**DEFAULTS, "speed": 3.0}, model, PIXEL, mask)
    parse(sent)
    assert (sent["img2img_enabled"], sent["img2img_denoise"], "mask" in sent) == (True, 0.6, mask is not None)
    assert ("cache_speedup" in sent) == (model is FLUX)  # DeepCache does not go with it


@pytest.mark.parametrize("model", [UNET, FLUX], ids=lambda model: model["name"])
def test_a_picture_that_a_controlnet_sees_is_sent_as_control(model: dict[str, Any]) -> None:
    chosen = {"control_model": "depth", "control_edges": False, "control_weight": 0.8, "control_span": (0.1, 0.75)}
    sent = body({**DEFAULTS, **chosen, "speed": 3.0}, model, control=PIXEL)
    parse(sent)
    image = base64.b64encode(PIXEL).decode()
    unit = {"model": "depth", "image": image, "weight": 0.8, "start": 0.1, "end": 0.75, "edges": False}
    assert sent["control"] == [unit]
    assert "img2img_enabled" not in sent
    assert sent["cache_speedup"] == 3.0  # every cache goes with it
    assert "control" not in body({**DEFAULTS, **chosen}, model)


@pytest.mark.parametrize("model", [UNET, FLUX], ids=lambda model: model["name"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"speed": "off"},
        {"speed": 3.0, "prompt": "x", "seed": 5, "steps": 7, "guidance_scale": 2.0, "hires_fix": True, "num_images": 3},
        {"by_hand": True, **PRESETS["partial"], "deepcache_schedule": "uniform", "fbcache_threshold": 0.2},
        {"loras": ["a/b"], "lora-a/b": 0.7, "upscale": "big", "seed": 0},
    ],
    ids=["as it begins", "off", "speed", "by hand", "styles"],
)
def test_the_widgets_take_a_request_back(values: dict[str, Any], model: dict[str, Any]) -> None:
    sent = body({**DEFAULTS, **values}, model)
    assert body({**DEFAULTS, **widgets(sent, model)}, model) == sent


def test_the_scenes_are_the_grammar_s() -> None:
    """The page must not import what trains the models."""
    assert tuple(map(tuple, (grammar.WEATHERS, grammar.PLACES, grammar.TIMES))) == (WEATHERS, PLACES, TIMES)
    assert scene("misty", "forest", "dawn") == str(grammar.Triple("misty", "forest", "dawn"))


@pytest.mark.parametrize("aspect", ASPECTS)
def test_an_aspect_s_size_is_the_model_s_area(aspect: str) -> None:
    width, height = size_of(ASPECTS[aspect], UNET)
    assert width * height == pytest.approx(512 * 512, rel=0.12)
    assert width / height == pytest.approx(ASPECTS[aspect], rel=0.1)
    assert aspect_of(width, height, UNET) == aspect
    assert size_of(1.5, {**UNET, "render_sizes": [[192, 128]]}) == (768, 512)


@pytest.mark.parametrize(
    ("size", "drawn"), [((768, 512), (768, 512)), ((8000, 4000), (1440, 736)), ((60, 40), (640, 416))]
)
def test_a_dropped_picture_s_size_is_one_that_can_be_drawn(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert fitting(*size, UNET) == drawn


def test_a_drop_that_is_no_picture_is_told_in_a_sentence() -> None:
    png = _png(np.zeros((40, 60, 3), np.uint8))
    assert wrong_with(png) is None
    for broken in (b"", b"GIF89a", png[:60], b"<svg/>"):
        assert "no picture that can be read" in str(wrong_with(broken))
    out = io.BytesIO()
    Image.new("1", (5000, 5000)).save(out, "PNG")
    assert "5000×5000" in str(wrong_with(out.getvalue()))


def test_reasons_stand_where_a_cache_does_not_apply() -> None:
    assert (no_deepcache(UNET), no_fbcache(FLUX)) == (None, None)
    assert "transformer" in str(no_deepcache(FLUX))
    assert "UNet" in str(no_fbcache(UNET))


@pytest.mark.parametrize(("depth", "branch"), [(0, 3), (1, 1), (2, 1), (3, 0), (11, None)])
def test_depth_cuts_as_the_contract_says_of_sd15(depth: int, branch: int | None) -> None:
    assert reuse_cost(UNET, depth)[0] == branch


def test_the_strip_tells_computed_from_reused_without_colour() -> None:
    html = strip.html("CRR C", total=6)
    assert 'aria-label="4 denoiser calls: 2 computed, 2 reused"' in html
    assert (html.count(">C<"), html.count(">R<"), html.count("dashed")) == (2, 2, 2)
    assert "<script" not in strip.html("<script>")


@pytest.mark.parametrize(("ground", "ink"), [strip.COMPUTED, strip.REUSED])
def test_letters_stand_out_from_their_cells(ground: str, ink: str) -> None:
    """WCAG 2.1, 1.4.3: 4.5 to 1."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, bright = sorted((luminance(ground), luminance(ink)))
    assert (bright + 0.05) / (dark + 0.05) >= 4.5


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_psnr_is_that_of_scikit_image() -> None:
    random = np.random.default_rng(0)
    first, second = (random.integers(0, 256, (8, 12, 3), dtype=np.uint8) for _ in range(2))
    assert psnr(_png(first), _png(second)) == pytest.approx(peak_signal_noise_ratio(first, second))
    assert math.isinf(psnr(_png(first), _png(first)))


def test_the_difference_is_amplified_and_clipped() -> None:
    first = np.zeros((1, 2, 3), np.uint8)
    second = np.array([[[1, 2, 3], [40, 0, 255]]], np.uint8)
    assert np.asarray(difference(_png(first), _png(second), 8)).tolist() == [[[8, 16, 24], [255, 0, 255]]]


def test_errors_are_the_servers_sentence_and_a_remedy() -> None:
    full = ApiError(429, "queue_full", "The queue is full.", None, "id", retry_after=5)
    assert explained(full) == "The queue is full. Try again in 5 s."
    assert "scripts/run" in explained(Unreachable("http://x cannot be reached."))
    assert "Load the page anew" in explained(ApiError(401, "unauthorized", "Send a key.", None, "id"))


def test_the_page_knows_of_the_service_its_client_alone() -> None:
    """So that its process holds neither the engine nor the models."""
    imports = [
        line
        for path in (Path(__file__).resolve().parents[2] / "app" / "ui").glob("*.py")
        for line in re.findall(r"^\s*(?:from|import) (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    ours = {name for name in imports if name.partition(".")[0] in ("app", "benchmarks", "cache", "models")}
    assert {name for name in ours if not name.startswith("app.ui")} == {"app.client"}


def test_a_run_that_was_not_drawn_again_is_no_measurement() -> None:
    def shown(seconds: float, *, reused: bool = False) -> Drawn:
        answer = {"timings": {"denoise_seconds": seconds}, "reused_run": reused}
        return Drawn(None, {}, answer, ())  # type: ignore[arg-type]  # the job is not looked at

    assert "2.00× as fast" in faster(shown(1.0), shown(2.0))
    for pair in ((shown(1.0), shown(0.0, reused=True)), (shown(0.0, reused=True), shown(2.0))):
        assert "no times to compare" in faster(*pair)
