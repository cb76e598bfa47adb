"""The page in real Chromium, against the real server and tiny-sd."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import running

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PATIENCE = 120.0  # seconds; only keeps a broken page from hanging the suite
pytest.importorskip("streamlit", reason="Streamlit, of the extra `ui`, is not installed")
selenium = pytest.importorskip("selenium", reason="Selenium is not installed")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")


def until(found: Callable[[], Any], what: str) -> Any:
    """Streamlit replaces elements while one looks at them: whatever a look raises, it is repeated."""
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(WebDriverException, httpx.TransportError):
            if result := found():
                return result
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with running() as server, (tmp_path / "page.log").open("wb") as log:
        host, served = server.address
        command = [sys.executable, "-m", "app.ui", "--port", str(port), "--server", f"http://{host}:{served}"]
        page = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            until(lambda: httpx.get(f"http://127.0.0.1:{port}/_stcore/health").is_success, "the page")
            yield f"http://127.0.0.1:{port}"
        finally:
            page.kill()
            page.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/chrome"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        browser.set_window_size(1280, 900)
        yield browser
    finally:
        browser.quit()


def test_sliders_picture_strip_and_comparison(browser: Any, address: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def all_of(css: str) -> list[Any]:
        found: list[Any] = browser.find_elements(By.CSS_SELECTOR, css)
        return found

    def press(key: str) -> None:
        until(lambda: all_of(f".st-key-{key} button:enabled")[:1], key)
        until(lambda: browser.find_element(By.CSS_SELECTOR, f".st-key-{key} button").click() or True, key)

    def pictures() -> list[Any]:
        found: list[Any] = browser.execute_script(
            "return [...document.querySelectorAll('[data-testid=stImage] img')]"
            ".filter(image => image.complete && image.naturalWidth > 0).map(image => [image.alt, image.naturalWidth])"
        )
        return found

    def slide(key: str, wanted: int) -> bool:
        """By keyboard, as anybody may: the range input is only there for it, and some drivers send no key to what is
        not seen. So it gets the focus, and the keys go to what has it.
        """
        slider = browser.find_element(By.CSS_SELECTOR, f".st-key-{key} input[type=range]:enabled")
        missing = wanted - int(slider.get_property("value"))
        if missing:
            browser.execute_script("arguments[0].focus()", slider)
            if browser.switch_to.active_element == slider:
                ActionChains(browser).send_keys(Keys.ARROW_RIGHT if missing > 0 else Keys.ARROW_LEFT).perform()
        return not missing

    browser.get(address)
    press("preset-balanced")
    for key, wanted in (("deepcache_interval", 4), ("deepcache_depth", 3)):
        until(lambda key=key, wanted=wanted: slide(key, wanted), f"{key} {wanted}")

    press("generate")
    until(lambda: all_of(".st-key-cancel button"), "progress")
    until(lambda: all_of(".st-key-compare button:enabled"), "the finished picture")
    strip = until(lambda: all_of(".wavespeed-strip")[0].get_attribute("data-decisions"), "the strip")
    assert (len(strip), strip[0], strip.count("C")) == (20, "C", 5)
    assert until(pictures, "the picture")[0][1] == 768

    press("compare")
    until(lambda: "with the cache and" in browser.find_element(By.TAG_NAME, "body").text, "the comparison")
    until(lambda: len(pictures()) == 3, "three pictures")
    assert [alt.rpartition(", ")[2] for alt, _ in pictures()[:2]] == ["cached", "uncached"]
    assert "PSNR" in pictures()[2][0]
    assert "Traceback" not in browser.page_source

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    until(lambda: browser.execute_script("return innerWidth") == 390, "a phone's width")
    main = "document.querySelector('[data-testid=stMain]')"
    until(lambda: browser.execute_script(f"return {main}.scrollWidth <= {main}.clientWidth"), "a page without sideways")
