"""The `webuiapi` package, made for AUTOMATIC1111's web UI, against a server on a socket."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import webuiapi
from PIL import Image

from benchmarks.server import Server, wait_for
from models.embedded import CONTROLNETS
from tests.clients.conftest import KEY

CACHED = {"deepcache_enabled": True, "deepcache_schedule": "uniform"}


def client_of(server: Server, **options: Any) -> Any:
    host, port = server.address
    return webuiapi.WebUIApi(host=host, port=port, **options)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    client = client_of(server)
    yield client
    client.session.close()


def cache_of(result: Any) -> Any:
    return result.info["wavespeed"]["cache"]


def test_its_defaults_draw(client: Any) -> None:
    result = client.txt2img(prompt="a misty forest", seed=258)
    assert (result.image.format, result.image.size) == ("PNG", (512, 512))
    assert result.image.getpixel((0, 0)) == (2, 1, 14)
    assert (result.info["sampler_name"], result.info["seed"], result.info["steps"]) == ("Euler a", 258, 20)
    assert result.info["sd_model_name"] == "tiny-sd"
    assert result.info["infotexts"] == [result.image.text["parameters"]]
    assert (cache_of(result)["strategy"], result.parameters["sampler_name"]) == ("none", "Euler a")


@pytest.mark.parametrize(
    "values",
    [
        {"alwayson_scripts": {"WaveSpeed": {"args": [CACHED]}}},
        {"override_settings": CACHED},
        {
            "override_settings": {"deepcache_schedule": "uniform"},
            "alwayson_scripts": {"wavespeed": {"args": [{"deepcache_enabled": True}]}},
        },
    ],
)
def test_cache_settings_get_through(client: Any, values: dict[str, Any]) -> None:
    result = client.txt2img(prompt="a", n_iter=2, batch_size=1, steps=6, sampler_name="DPM++ 2M Karras", **values)
    assert (cache_of(result)["decisions"], cache_of(result)["hit_rate"]) == ("CRRCRR CRRCRR", 0.6667)
    assert len(result.images) == len(result.info["all_seeds"]) == len(result.info["infotexts"]) == 2
    assert result.parameters["scheduler"] == "karras"


def test_a_payload_of_one_s_own_takes_them_as_fields(client: Any) -> None:
    payload = {"prompt": "a", "steps": 6, **CACHED}
    result = client.custom_post("txt2img", payload, baseurl=True)
    assert cache_of(result)["hit_rate"] == 0.6667


def test_a_model_is_chosen_by_override_settings(client: Any) -> None:
    chosen = {"sd_model_checkpoint": "tiny-flux", "samples_format": "webp"}
    result = client.txt2img(prompt="a", sampler_name="Euler", override_settings=chosen)
    assert (result.info["sd_model_name"], result.image.format) == ("tiny-flux", "WEBP")
    assert cache_of(result)["strategy"] == "first_block"
    with pytest.raises(RuntimeError, match="unknown_model"):
        client.txt2img(prompt="a", override_settings={"sd_model_checkpoint": "v1-5-pruned.ckpt"})


def test_a_picture_is_drawn_over(client: Any) -> None:
    picture = Image.new("RGB", (96, 64), "red")
    result = client.img2img(images=[picture], prompt="a", width=192, height=128, denoising_strength=0.5)
    assert result.image.size == (192, 128)
    assert result.parameters["denoising_strength"] == 0.5
    with pytest.raises(RuntimeError, match="resize_mode to 1"):
        client.img2img(images=[picture], prompt="a")
    assert client.img2img(images=[picture], prompt="a", resize_mode=1).image.size == (512, 512)
    within = {"images": [picture], "mask_image": Image.new("L", picture.size, 255), "width": 192, "height": 128}
    with pytest.raises(RuntimeError, match="inpainting_fill can only be 1"):  # the package says 0 of itself
        client.img2img(**within, prompt="a")
    assert client.img2img(**within, prompt="a", inpainting_fill=1).image.size == (192, 128)


def test_pictures_are_enlarged(client: Any) -> None:
    picture = Image.effect_mandelbrot((40, 24), (-2, -1, 1, 1), 50).convert("RGB")
    result = client.extra_single_image(picture, upscaler_1="Nearest", upscaling_resize=3)
    assert result.image.tobytes() == picture.resize((120, 72), Image.Resampling.NEAREST).tobytes()
    assert result.info == "<p>Postprocess upscale by: 3, Postprocess upscaler: Nearest</p>"
    both = client.extra_batch_images([picture, picture.rotate(180)], upscaler_1="Lanczos", resize_mode=1)
    assert [image.size for image in both.images] == [(512, 512)] * 2
    with pytest.raises(RuntimeError, match="no upscaler"):
        client.extra_single_image(picture, upscaler_1="R-ESRGAN 4x+")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"restore_faces": True}, "adetailer"),
        ({"styles": ["ink"]}, "into the prompt"),
        ({"sampler_name": "DPM adaptive"}, "DPM\\+\\+ 2M"),
        ({"sampler_name": "DDIM"}, "eta 0"),
        ({"enable_hr": True}, "Lanczos"),
        ({"sag": webuiapi.Sag()}, "no script"),
        ({"adetailer": [webuiapi.ADetailer(ad_model="face_yolov8n.pt")]}, "no script"),
        ({"controlnet_units": [webuiapi.ControlNetUnit(module="depth_midas")]}, "Make the map yourself"),
        ({"width": 513}, "multiple of 8"),
        ({"override_settings": {"deepcache_intervall": 3}}, "no setting"),
        ({"alwayson_scripts": {"WaveSpeed": {"args": [{"steps": 5}]}}}, "give it once"),
    ],
)
def test_what_would_change_nothing_is_refused(client: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words) as refused:
        client.txt2img(**{"prompt": "a", "alwayson_scripts": {}, **values})
    assert refused.value.args[0] == 422


def test_lists_are_what_its_helpers_expect(client: Any) -> None:
    assert client.util_get_current_model() == "tiny-sd"
    assert {"tiny-sd", "tiny-flux"} < set(client.util_get_model_names())
    assert {"Euler a", "DPM++ 2M", "UniPC"} < set(client.util_get_sampler_names())
    assert {"karras", "automatic"} < set(client.util_get_scheduler_names())
    assert client.get_scripts() == {"txt2img": ["wavespeed"], "img2img": ["wavespeed"]}
    assert (client.get_loras(), client.get_sd_vae()) == ([], [])
    assert [one["name"] for one in client.get_upscalers()] == ["None", "Lanczos", "Nearest"]
    assert client.get_options()["sd_model_checkpoint"] == "tiny-sd"
    assert client.set_options(client.get_options()) is None
    assert "override_settings" in client.set_options({"samples_format": "webp"})["error"]["message"]
    assert list(client.get_memory()) == ["ram", "cuda"]
    assert client.get_cmd_flags()["api"] is True
    assert client.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert client.refresh_checkpoints() is None
    assert (client.controlnet_model_list(), client.controlnet_module_list()) == ([*CONTROLNETS], ["none", "canny"])


def test_what_is_switched_off_is_no_obstacle(client: Any) -> None:
    units = [webuiapi.ControlNetUnit(enabled=False)] * 2
    off = {"controlnet_units": units, "adetailer": [webuiapi.ADetailer()], "alwayson_scripts": {}}
    result = client.txt2img(prompt="a", save_images=True, **off)
    assert any("save_images" in warning for warning in result.info["wavespeed"]["warnings"])


def test_a_model_is_set_for_what_follows(client: Any) -> None:
    client.util_set_model("tiny-flux")
    try:
        client.util_wait_for_ready()
        assert client.util_get_current_model() == "tiny-flux"
        assert client.txt2img(prompt="a", sampler_name="Euler").info["sd_model_name"] == "tiny-flux"
    finally:
        client.set_options({"sd_model_checkpoint": None})
    assert client.util_get_current_model() == "tiny-sd"


def test_a_picture_tells_its_settings(client: Any) -> None:
    drawn = client.txt2img(prompt="a misty forest", seed=7)
    assert client.png_info(drawn.image).info == drawn.info["infotexts"][0]


def test_progress_is_one_s_own_and_interrupt_ends_it(server: Server, client: Any) -> None:
    client.util_wait_for_ready()
    assert client.interrupt() == {}

    def draw() -> Any:
        other = client_of(server)
        try:
            slow = {"sd_model_checkpoint": "slow", "live_previews_enable": True}
            other.txt2img(prompt="a", steps=150, n_iter=10, sampler_name="Euler", override_settings=slow)
        finally:
            other.session.close()

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw)
        wait_for(lambda: client.get_progress()["progress"] > 0, 60, "a step")
        seen = client.get_progress()
        assert (seen["state"]["job_count"], seen["state"]["sampling_steps"]) == (1, 1500)
        assert seen["eta_relative"] > 0
        client.interrupt()
        with pytest.raises(RuntimeError, match="cancelled"):
            drawing.result()
    wait_for(lambda: client.get_progress()["state"]["job_count"] == 0, 60, "an empty desk")


def test_a_user_s_password_is_the_key(locked: Server) -> None:
    stranger = client_of(locked, username="x", password="wrong")
    friend = client_of(locked, username="whoever", password=KEY)
    try:
        with pytest.raises(RuntimeError, match="unauthorized"):
            stranger.txt2img(prompt="a")
        assert friend.txt2img(prompt="a").image.size == (512, 512)
    finally:
        stranger.session.close()
        friend.session.close()
