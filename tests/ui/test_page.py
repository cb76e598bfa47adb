"""The page's logic by Streamlit's AppTest, against the fake server over HTTP."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.ui.gallery import Drawn
from app.ui.run import Run
from benchmarks.server import Server, running

AppTest = pytest.importorskip("streamlit.testing.v1", reason="Streamlit, of the extra `ui`, is not installed").AppTest
PAGE = Path(__file__).resolve().parents[2] / "app" / "ui" / "page.py"
PATIENCE = 60.0  # seconds; only keeps a broken page from hanging the suite
SERVER = ("-m", "tests.ui.server")
SETTINGS = {"WAVESPEED_DEVICE": "cpu", "WAVESPEED_PORT": "0"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    def adapters(folder: Path) -> None:
        for kind in ("loras", "embeddings"):
            (folder / kind).mkdir()
            (folder / kind / "ours.safetensors").touch()

    with running(SERVER, prepare=adapters, **SETTINGS) as server:
        yield server


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Server], Any]]:
    monkeypatch.setattr("app.ui.connection.visitor", lambda: (None, "127.0.0.1"))  # AppTest has no browser's headers
    pages = []

    def one(server: Server) -> Any:
        page = AppTest.from_file(str(PAGE), default_timeout=PATIENCE)
        page.secrets |= {"address": server.url, "token": "nobody-s"}
        pages.append(page.run())
        return page

    yield one
    for page in pages:
        page.session_state["connection"].server.close()


@pytest.fixture
def page(server: Server, opened: Callable[[Server], Any]) -> Any:
    return opened(server)


def finish(page: Any) -> Any:
    run: Run | None = page.session_state["run"]
    assert run is None or run.ended.wait(PATIENCE)  # None: it ended while the page was drawn, which took it over
    page.run()
    assert not page.exception
    return page


def draw(page: Any, **values: Any) -> Any:
    for name, value in values.items():
        page.session_state[name] = value
    page.run()
    page.button(key="generate").click().run()
    return page


def shown(page: Any) -> Drawn:
    drawn: Drawn = page.session_state["shown"]
    return drawn


def small(page: Any, **values: Any) -> Drawn:
    finish(draw(page, width=64, height=64, **values))
    return shown(page)


def of_job(page: Any, name: str, drawn: Drawn) -> Any:
    return page.button(key=f"{name}-{drawn.job.id}")


def test_balanced_as_it_comes_is_drawn_and_compared(page: Any) -> None:
    drawn = small(page)
    cache = drawn.answer["cache"]
    assert (cache["strategy"], cache["interval"], cache["depth"]) == ("deepcache", 3, 2)
    assert any(f'data-decisions="{cache["decisions"]}"' in html.value for html in page.html)
    of_job(page, "uncached", drawn).click().run()
    finish(page)
    plain = shown(page).plain
    assert plain is not None
    assert (plain.answer["seeds"], plain.answer["cache"]["strategy"]) == (drawn.answer["seeds"], "none")
    assert any("with the cache" in html.value for html in page.html)


def test_the_knobs_are_in_the_slider_s_place_and_a_preset_sets_them(page: Any) -> None:
    assert not page.select_slider(key="speed").disabled
    page.toggle(key="by_hand").set_value(True).run()
    assert page.select_slider(key="speed").disabled
    page.button(key="preset-partial").click().run()
    assert page.slider(key="deepcache_window").value == (200, 800)
    page.button(key="preset-max_speed").click().run()
    values = [page.slider(key=f"deepcache_{name}").value for name in ("interval", "depth", "window")]
    assert values == [5, 3, (0, 1000)]
    cache = small(page).answer["cache"]
    assert (cache["interval"], cache["depth"], cache["decisions"]) == (5, 3, "CRRRR" * 4)


def test_a_transformer_has_its_own_knobs(page: Any) -> None:
    page.selectbox(key="model").set_value("flux").run()
    page.toggle(key="by_hand").set_value(True).run()
    assert not page.slider(key="fbcache_threshold").disabled
    assert page.text_input(key="negative_prompt").disabled
    assert small(page).answer["cache"]["strategy"] == "first_block"


def test_a_scene_is_clicked_together(page: Any) -> None:
    def rows() -> list[Any]:
        return [page.pills(key=f"scene-{part}").value for part in ("weather", "place", "time")]

    assert rows() == ["stormy", "sea", "sunset"]
    page.pills(key="scene-place").set_value("island").run()
    assert page.text_area(key="prompt").value == "a stormy island at sunset"
    page.text_area(key="prompt").set_value("a misty desert").run()
    assert rows() == ["misty", "desert", None]
    page.pills(key="scene-time").set_value("dawn").run()
    assert page.text_area(key="prompt").value == "a misty desert at dawn"


def test_examples_stand_where_the_model_knows_no_scenes(page: Any) -> None:
    page.selectbox(key="model").set_value("slow").run()
    example = page.pills(key="example").options[1]
    page.pills(key="example").set_value(example).run()
    assert page.text_area(key="prompt").value == example


def test_an_aspect_sets_the_size_and_follows_it(page: Any) -> None:
    assert page.pills(key="aspect").value == "3:2"
    page.pills(key="aspect").set_value("1:1").run()
    assert (page.number_input(key="width").value, page.number_input(key="height").value) == (640, 640)
    page.number_input(key="width").set_value(328).run()
    assert page.pills(key="aspect").value is None


def test_several_pictures_are_one_batch_and_each_can_be_gone_on_with(page: Any) -> None:
    drawn = small(page, num_images=3, seed=7)
    assert drawn.answer["seeds"] == [7, 8, 9]
    assert len(drawn.answer["cache"]["decisions"].split()) == 1
    page.pills(key=f"number-{drawn.job.id}").set_value(2).run()
    of_job(page, "begin", drawn).click().run()
    assert page.session_state["source"] == drawn.pictures[2]


def test_a_seed_is_kept_and_let_go_of(page: Any) -> None:
    seed = small(page).answer["seeds"][0]
    page.button(key="keep").click().run()
    assert page.number_input(key="seed").value == seed
    assert small(page).answer["seeds"] == [seed]
    page.button(key="again").click().run()
    finish(page)
    assert shown(page).answer["seeds"] != [seed]
    assert page.number_input(key="seed").value is None


def test_adapters_are_picked(page: Any) -> None:
    page.multiselect(key="loras").set_value(["ours"]).run()
    page.slider(key="lora-ours").set_value(0.5).run()
    page.pills(key="embedding").set_value("ours").run()
    assert page.text_area(key="prompt").value.endswith(" ours")
    assert small(page).request["loras"] == [{"name": "ours", "weight": 0.5}]


def test_a_refusal_is_the_servers_sentence_told_once(page: Any) -> None:
    finish(draw(page, width=100))
    assert [error.value for error in page.error] == [
        "width must be a multiple of 8 for fine; 100 is not. 96 would be one, or 104."
    ]


def test_the_gallery_outlives_the_page(server: Server, page: Any, opened: Callable[[Server], Any]) -> None:
    first = small(page, prompt="a *starry* sea", steps=3, seed=11)
    other = opened(server)  # another tab, or this one loaded anew
    other.session_state["tab"] = "Gallery"
    other.run()
    assert any(f"open-{first.job.id}" == button.key for button in other.button)
    of_job(other, "open", first).click().run()
    assert other.session_state["tab"] == "Draw"
    assert shown(other).pictures == first.pictures
    other.session_state["prompt"] = "something else"
    of_job(other, "reuse", first).click().run()
    assert (other.text_area(key="prompt").value, other.number_input(key="steps").value) == ("a *starry* sea", 3)
    assert other.number_input(key="seed").value == 11
    of_job(other, "delete", first).click().run()
    page.session_state["tab"] = "Gallery"  # the first tab is told in its place, and goes on
    page.run()
    assert not any(f"open-{first.job.id}" == button.key for button in page.button)
    page.session_state["tab"] = "Draw"
    page.run()
    of_job(page, "uncached", first).click().run()
    finish(page)
    assert "no such job" in page.error[0].value


def test_a_mask_that_was_not_painted_is_asked_for(page: Any) -> None:
    drawn = small(page)
    of_job(page, "begin", drawn).click().run()
    assert page.select_slider(key="speed").disabled
    page.toggle(key="paints").set_value(True).run()
    page.button(key="generate").click().run()
    assert [error.value for error in page.error] == [
        "Paint what is to be drawn anew first, or switch the painting off."
    ]
    page.session_state["mask"] = drawn.pictures[0]
    page.toggle(key="paints").set_value(False).run()
    finish(page.button(key="generate").click().run())
    assert shown(page).request["img2img_enabled"] is True
    assert "mask" not in shown(page).request


def test_a_dropped_picture_restores_its_settings(page: Any) -> None:
    drawn = small(page, prompt="a sea at dawn", steps=5, seed=3)
    page.session_state["prompt"] = "something else"
    page.run()
    page.file_uploader[0].set_value(("a.png", drawn.pictures[0], "image/png")).run()
    assert page.session_state["source"] == drawn.pictures[0]
    page.button(key="restore").click().run()
    assert page.session_state["source"] is None
    assert (page.text_area(key="prompt").value, page.number_input(key="steps").value) == ("a sea at dawn", 5)
    page.file_uploader[0].set_value(("a.png", drawn.pictures[0][:80], "image/png")).run()
    assert ["no picture that can be read" in error.value for error in page.error] == [True]


def dropped(page: Any) -> bytes:
    Image.new("RGB", (96, 64), "teal").save(out := io.BytesIO(), "PNG")
    page.file_uploader[0].set_value(("a.png", out.getvalue(), "image/png")).run()
    return out.getvalue()


def test_a_dropped_picture_steers_a_controlnet(page: Any) -> None:
    picture = dropped(page)
    page.toggle(key="paints").set_value(True).run()
    assert page.select_slider(key="speed").disabled
    page.segmented_control(key="use").set_value("control").run()
    assert not page.select_slider(key="speed").disabled  # DeepCache goes with it
    assert not any(slider.key == "img2img_denoise" for slider in page.slider)
    page.slider(key="control_span").set_value((0.0, 0.75)).run()
    drawn = small(page)
    encoded = base64.b64encode(picture).decode()
    unit = {"model": "tiny-sd-edges", "image": encoded, "weight": 1.0, "start": 0.0, "end": 0.75, "edges": True}
    assert drawn.request["control"] == [unit]
    assert "img2img_enabled" not in drawn.request
    assert drawn.answer["cache"]["strategy"] == "deepcache"
    of_job(page, "reuse", drawn).click().run()  # settings without pictures, as of one that was drawn over
    assert page.session_state["source"] is None
    assert "control" not in small(page).request


def test_control_is_no_choice_where_no_controlnet_is_listed(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped(page)
    page.segmented_control(key="use").set_value("control").run()
    connection = page.session_state["connection"]
    none = {**connection.adapters, "controlnets": []}
    monkeypatch.setattr(connection.server, "adapters", lambda: none)
    connection.adapters = none
    page.run()
    assert not any(group.key == "use" for group in page.segmented_control)
    assert page.slider(key="img2img_denoise").value == 0.6
    assert page.run().select_slider(key="speed").disabled


def test_a_job_under_way_is_followed_by_a_page_loaded_anew(
    opened: Callable[[Server], Any],
) -> None:
    with running(SERVER, **SETTINGS) as server:  # its worker hangs from here on
        page = draw(opened(server), model="hangs", width=64, height=64)
        assert page.button(key="generate").disabled
        again = opened(server)
        assert again.button(key="generate").disabled
        again.button(key="cancel").click().run()
        finish(again)
        finish(page)
        assert (again.info[0].value, page.error[0].value) == ("Cancelled.", "The job was cancelled.")
        assert not page.button(key="generate").disabled
        page.text_area(key="prompt").set_value("an island at noon").run()
    page.button(key="generate").click().run()  # the server is gone
    finish(page)
    assert [error.value for error in page.error] == [
        "The server does not answer. If it was ended, start it again: scripts/run."
    ]
    assert page.text_area(key="prompt").value == "an island at noon"


def test_telemetry_shows_what_the_server_counts(page: Any) -> None:
    page.session_state["tab"] = "Telemetry"
    page.run()
    assert {"Waiting", "Drawing", "VRAM", "DeepCache hit rate"} <= {metric.label for metric in page.metric}
    assert not page.exception
