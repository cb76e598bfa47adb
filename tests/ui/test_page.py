"""The page's logic by Streamlit's AppTest, against the fake server over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from app.ui.history import Drawn

from app.ui.run import Run
from benchmarks.server import Server, running

AppTest = pytest.importorskip("streamlit.testing.v1", reason="Streamlit, of the extra `ui`, is not installed").AppTest
PAGE = Path(__file__).resolve().parents[2] / "app" / "ui" / "page.py"
PATIENCE = 60.0  # seconds; only keeps a broken page from hanging the suite
KEY = "a-key"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(("-m", "tests.e2e.fake_server"), WAVESPEED_DEVICE="cpu", WAVESPEED_API_KEYS=KEY) as server:
        yield server


def address(server: Server) -> str:
    host, port = server.address
    return f"http://{host}:{port}"


@pytest.fixture
def opened() -> Iterator[Callable[[], Any]]:
    pages = []

    def one() -> Any:
        pages.append(AppTest.from_file(str(PAGE), default_timeout=PATIENCE).run())
        return pages[-1]

    yield one
    for page in pages:
        page.session_state["connection"].server.close()


@pytest.fixture
def page(server: Server, opened: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WAVESPEED_UI_SERVER", address(server))
    monkeypatch.setenv("WAVESPEED_UI_API_KEY", KEY)
    return opened()


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


def test_deepcache_is_drawn_with_the_sliders_and_compared(page: Any) -> None:
    page.toggle(key="deepcache_enabled").set_value(True).run()
    page.slider(key="deepcache_interval").set_value(5)
    page.slider(key="deepcache_depth").set_value(3)
    finish(draw(page, width=64, height=64))
    drawn = shown(page)
    cache = drawn.answer["cache"]
    assert (cache["interval"], cache["depth"], cache["decisions"]) == (5, 3, "CRRRR" * 4)
    assert any(f'data-decisions="{cache["decisions"]}"' in html.value for html in page.html)
    page.button(key="compare").click().run()
    finish(page)
    plain = shown(page).plain
    assert plain is not None
    assert (plain.answer["seeds"], plain.answer["cache"]["strategy"]) == (drawn.answer["seeds"], "none")
    assert any("with the cache" in html.value for html in page.html)
    assert page.button(key="compare").disabled


def test_presets_set_the_sliders_and_enable(page: Any) -> None:
    page.button(key="preset-partial").click().run()
    assert page.toggle(key="deepcache_enabled").value is True
    assert page.slider(key="deepcache_window").value == (200, 800)
    page.button(key="preset-max_speed").click().run()
    values = [page.slider(key=f"deepcache_{name}").value for name in ("interval", "depth", "window")]
    assert values == [5, 3, (0, 1000)]


def test_what_a_model_cannot_use_is_disabled_and_says_why(page: Any) -> None:
    deepcache, first_block = page.toggle(key="deepcache_enabled"), page.toggle(key="fbcache_enabled")
    assert (deepcache.disabled, first_block.disabled) == (False, True)
    page.selectbox(key="model").set_value("flux").run()
    assert page.toggle(key="deepcache_enabled").disabled
    assert page.slider(key="deepcache_interval").disabled
    assert not page.slider(key="fbcache_threshold").disabled
    assert any("DeepCache works on UNet models" in info.value for info in page.info)
    finish(draw(page, width=64, height=64))
    assert shown(page).answer["cache"]["strategy"] == "first_block"


def test_a_refusal_is_the_servers_sentence(page: Any) -> None:
    finish(draw(page, width=100))
    assert [error.value for error in page.error] == [
        "width must be a multiple of 8 for fine; 100 is not. 96 would be one, or 104."
    ]


def test_history_puts_settings_back(page: Any) -> None:
    finish(draw(page, width=64, height=64, prompt="a *starry* sea", steps=3, seed=None))
    first = shown(page)
    finish(draw(page, width=128, prompt="something else", steps=5, seed=9))
    page.session_state["tab"] = "History"
    page.run()
    page.button(key=f"reuse-{first.number}").click().run()
    assert (page.text_area(key="prompt").value, page.number_input(key="width").value) == ("a *starry* sea", 64)
    assert page.number_input(key="seed").value == first.answer["seeds"][0]
    assert shown(page) is first


def test_a_running_picture_can_be_cancelled(opened: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with running(("-m", "tests.e2e.fake_server"), WAVESPEED_DEVICE="cpu") as server:  # its worker hangs from here on
        monkeypatch.setenv("WAVESPEED_UI_SERVER", address(server))
        page = opened()
        draw(page, model="hangs", width=64, height=64)
        assert page.button(key="generate").disabled
        page.button(key="cancel").click().run()
        finish(page)
    assert page.info[0].value == "Cancelled."
    assert not page.button(key="generate").disabled


def test_telemetry_shows_what_the_server_counts(page: Any) -> None:
    page.session_state["tab"] = "Telemetry"
    page.run()
    assert {"Waiting", "Drawing", "VRAM", "DeepCache hit rate"} <= {metric.label for metric in page.metric}
    assert not page.exception


def test_a_missing_key_is_asked_for_and_then_used(
    server: Server, opened: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAVESPEED_UI_SERVER", address(server))
    page = opened()
    assert "Authorization: Bearer" in page.error[0].value
    page.text_input(key="api_key").set_value(KEY).run()
    assert not page.error
    assert page.button(key="generate").label == "Generate"


def test_a_server_that_is_away_is_said_and_what_was_typed_is_kept(
    opened: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(("-m", "tests.e2e.fake_server"), WAVESPEED_DEVICE="cpu") as server:
        monkeypatch.setenv("WAVESPEED_UI_SERVER", address(server))
        page = opened()
        page.text_area(key="prompt").set_value("an island at noon").run()
    page.button(key="generate").click().run()
    finish(page)
    assert any("scripts/run" in error.value for error in page.error)
    assert page.text_area(key="prompt").value == "an island at noon"
    assert not page.exception
