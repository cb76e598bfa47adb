"""The page in real Chromium, at the widths of a phone, a tablet and a desk: what hands do there."""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.server import Server, running

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PATIENCE = 120.0  # seconds; only keeps a broken page from hanging the suite
SERVER = ("-m", "tests.ui.server", "page")
WIDTHS = (390, 1024, 1440)
pytest.importorskip("streamlit", reason="Streamlit, of the extra `ui`, is not installed")
selenium = pytest.importorskip("selenium", reason="Selenium is not installed")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
# What lies in a component's shadow, too.
FIND = """const look = (root, css) => { const found = root.querySelector(css); if (found) return found;
for (const one of root.querySelectorAll('*')) {
    const inner = one.shadowRoot && look(one.shadowRoot, css); if (inner) return inner; }
return null; }; return look(document, arguments[0]);"""
BANNER = "return getComputedStyle(document.querySelector('.stMainBlockContainer'), '::before').content"


def until(found: Callable[[], Any], what: str) -> Any:
    """Streamlit replaces elements while one looks at them: whatever a look raises, it is repeated."""
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(WebDriverException, httpx.TransportError, IndexError):
            if result := found():
                return result
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)


@dataclass
class Browser:
    driver: Any

    def all(self, css: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", css)
        return found

    def inner(self, css: str) -> Any:
        return until(lambda: self.driver.execute_script(FIND, css), css)

    def click(self, css: str, words: str = "") -> None:
        def clicked() -> bool:
            found = [one for one in self.all(css) if words in one.text and one.is_displayed()]  # help hides a twin
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found[0])
            found[0].click()
            return True

        until(clicked, f"{css} {words}")

    def press(self, key: str) -> None:
        self.click(f".st-key-{key} button:enabled")

    def tab(self, name: str) -> None:
        self.click("[role=tab]", name)

    def prompt(self) -> str:
        return str(self.all(".st-key-prompt textarea")[0].get_property("value"))

    def width(self) -> str:
        return str(self.all(".st-key-width input")[0].get_property("value"))

    def text(self) -> str:
        return str(self.driver.find_element("css selector", "body").text)

    def pictures(self) -> list[str]:
        """What the pictures that are loaded are called."""
        found: list[str] = self.driver.execute_script(
            "return [...document.querySelectorAll('[data-testid=stImage] img')]"
            ".filter(image => image.complete && image.naturalWidth > 0).map(image => image.alt)"
        )
        return found

    def sized(self, width: int) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        until(lambda: self.driver.execute_script("return innerWidth") == width, "the width")

    def cut_off(self) -> list[str]:
        """What reaches beyond the window's sides, but for what a scroller of its own holds."""
        found: list[str] = self.driver.execute_script(
            """return [...document.querySelectorAll('[data-testid=stMain] *')].filter(one => {
            const box = one.getBoundingClientRect();
            return box.width && box.height && (box.right > innerWidth + 1 || box.left < -1); })
            .map(one => one.className).slice(0, 5)"""
        )
        return found

    def drop(self, path: Path) -> None:
        until(lambda: self.all("input[type=file]"), "the place to drop a file")[0].send_keys(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    settings = {"WAVESPEED_PORT": "0", "WAVESPEED_DEVICE": "cpu", "WAVESPEED_JOBS_FOLDER": str(folder / "jobs")}
    with running(SERVER, **settings) as server:
        until(lambda: httpx.get(server.url).status_code == 200, "the page")
        yield server


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={folder}/chrome"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browser(driver: Any, server: Server) -> Iterator[Browser]:
    """At the page, loaded anew; whatever the browser complains of fails the test, the policy's refusals among it."""
    one = Browser(driver)
    driver.get(server.url)
    until(lambda: one.all(".st-key-generate button"), "the page")
    yield one
    complaints = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert complaints == []


def jobs(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get("/api/jobs").json()["jobs"]
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_a_picture_is_drawn_compared_and_found_in_the_gallery(browser: Browser, server: Server, width: int) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.sized(width)
    browser.click(".st-key-scene-place button", "island")
    until(lambda: "a stormy island at sunset" in browser.prompt(), "words")
    browser.press("generate")
    until(lambda: browser.all(".st-key-actions button"), "the finished picture")
    strip = until(lambda: browser.all(".wavespeed-strip")[0].get_attribute("data-decisions"), "the strip")
    assert (len(strip), strip[0], "R" in strip) == (20, "C", True)
    assert until(browser.pictures, "the picture")[0].startswith("a stormy island at sunset, seed ")
    assert browser.cut_off() == []

    browser.click(".st-key-actions button", "Redraw uncached")
    line = browser.inner("figure input[type=range]")
    figure = browser.inner("figure")
    before = browser.driver.execute_script("return arguments[0].style.getPropertyValue('--at')", figure)
    browser.driver.execute_script("arguments[0].focus()", line)
    line.send_keys(Keys.HOME)
    after = browser.driver.execute_script("return arguments[0].style.getPropertyValue('--at')", figure)
    assert (before, after) == ("", "0%")
    until(lambda: "with the cache and" in browser.text(), "the comparison")
    assert browser.cut_off() == []

    browser.tab("Gallery")
    newest = jobs(server)[0]["id"]
    until(lambda: browser.all(f".st-key-open-{newest}"), "the newest card")
    until(browser.pictures, "thumbnails")
    assert browser.cut_off() == []
    browser.click(f".st-key-menu-{newest} button")  # of the very picture that stands on the tab beside it
    until(lambda: browser.all(f".st-key-uncached-card-{newest}"), "its menu")
    assert "DuplicateElementKey" not in browser.driver.page_source
    browser.press(f"open-{newest}")
    until(lambda: browser.all(".st-key-actions button"), "the opened picture")
    assert "Traceback" not in browser.driver.page_source


@pytest.mark.parametrize("width", WIDTHS)
def test_a_picture_is_dropped_and_a_part_of_it_painted(
    browser: Browser, server: Server, folder: Path, width: int
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser.sized(width)
    broken, whole = folder / "broken.png", folder / "whole.png"
    out = io.BytesIO()
    Image.new("RGB", (480, 320), "teal").save(out, "PNG")
    whole.write_bytes(out.getvalue())
    broken.write_bytes(out.getvalue()[:100])
    browser.drop(broken)
    until(lambda: browser.text().count("no picture that can be read") == 1, "what is wrong with the file")
    browser.drop(whole)
    browser.click(".st-key-paints label")
    canvas = browser.inner("canvas")
    until(lambda: canvas.get_property("width") == 480, "the picture on the canvas")
    browser.press("generate")
    until(lambda: "Paint what is to be drawn anew first" in browser.text(), "that nothing is painted")
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    stroke = ActionChains(browser.driver).move_to_element_with_offset(canvas, -60, 0)
    stroke.click_and_hold().move_by_offset(60, 0).move_by_offset(60, 0).release().perform()
    until(lambda: "What you paint is drawn anew." in browser.text(), "the mask")
    assert browser.cut_off() == []
    browser.press("generate")
    until(lambda: browser.all(".st-key-actions button"), "the finished picture")
    asked = jobs(server)[0]["request"]
    assert (asked["width"], asked["height"]) == (640, 416)
    with Image.open(io.BytesIO(base64.b64decode(asked["mask"]))) as mask:
        painted = np.asarray(mask.convert("L")) > 128
    assert painted.shape == (320, 480)
    rows, columns = np.nonzero(painted)
    assert 110 < rows.mean() < 210  # about the middle, from left to right
    assert 200 < columns.mean() < 280
    assert np.ptp(columns) > 2 * np.ptp(rows)


def test_what_was_drawn_and_typed_outlives_the_server_s_sudden_end(driver: Any, folder: Path, tmp_path: Path) -> None:
    """kill -9, and another server at the same address with the same folder. With a key, which is given once.

    A browser that was cut off is back before the new server knows its models.
    """
    browser = Browser(driver)
    settings = {
        "WAVESPEED_DEVICE": "cpu",
        "WAVESPEED_JOBS_FOLDER": str(tmp_path / "jobs"),
        "WAVESPEED_API_KEYS": "a-key",
    }
    with running(SERVER, WAVESPEED_PORT="0", **settings) as server:
        browser.sized(1024)
        driver.get(server.url)
        until(lambda: browser.all("#key"), "the door")[0].send_keys("a-key")
        browser.click("form button")
        browser.press("generate")
        until(lambda: browser.all(".st-key-actions button"), "the finished picture")
        [kept] = server.get("/api/jobs", Authorization="Bearer a-key").json()["jobs"]
        browser.click(".st-key-scene-place button", "desert")
        browser.click(".st-key-aspect button", "1:1")
        until(lambda: browser.width() == "640", "the aspect")
        port = str(server.address[1])
    until(lambda: "The server is away." in browser.driver.execute_script(BANNER), "that the server is away")
    browser.click("[role=dialog] button")  # Streamlit's own word of it
    browser.tab("Gallery")  # which nobody hears
    until(lambda: browser.all("[role=tab][aria-selected=true]")[0].text == "Gallery", "the tab")
    assert not browser.all(f".st-key-open-{kept['id']}")
    known = tmp_path / "known"

    def greeted() -> None:
        until(lambda: "models are not known yet" in browser.text(), "that the server starts")
        known.touch()

    beside = Thread(target=greeted)
    beside.start()
    with running(SERVER, WAVESPEED_PORT=port, STARTS_WITH=str(known), **settings):
        beside.join()
        # In the page that was open all the time, without another click.
        until(lambda: browser.all(f".st-key-open-{kept['id']}"), "the picture of before")
        assert browser.driver.execute_script(BANNER) == "none"
        browser.tab("Draw")
        assert (browser.prompt(), browser.width()) == ("a stormy desert at sunset", "640")
        driver.get(server.url)  # and loaded anew
        browser.tab("Gallery")
        until(lambda: browser.all(f".st-key-open-{kept['id']}"), "the picture of before")
    driver.get_log("browser")  # a connection that breaks is complained of
