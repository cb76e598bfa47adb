"""Upscale in the page's gallery, in real Chromium: the embedded model's picture, by a network that spandrel reads."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.server import SERVE, Server, running
from models import upscaling
from models.base import Upscaler
from tests.ui.test_browser import Browser, driver, folder, jobs, pytestmark, until

CPU = torch.device("cpu")
PICTURE = """const picture = document.querySelector('[data-testid=stImage] img');
return picture && picture.naturalWidth > 768 && picture.alt;"""  # it is shown at up to 1460 pixels
__all__ = ["driver", "folder", "pytestmark"]
try:
    from spandrel.architectures import ESRGAN
except Exception as missing:  # noqa: BLE001  # also a torchvision that is missing, or for another build of torch
    pytest.skip(f"the extra `upscale` is not installed: {missing}", allow_module_level=True)


def lay_network(folder: Path) -> None:
    """An ESRGAN of random weights that makes twice the width and height."""
    torch.manual_seed(0)
    network = ESRGAN.ESRGAN(num_filters=8, num_blocks=1, scale=2)
    (folder / "upscalers").mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "upscalers" / "sharp.safetensors")


def opened(server: Server, job: str) -> Image.Image:
    """Its picture."""
    answer = server.get(f"/api/jobs/{job}").json()["result"]
    with Image.open(io.BytesIO(base64.b64decode(answer["image"].rpartition(",")[2]))) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    settings = {"WAVESPEED_PAGE": "true", "WAVESPEED_DEVICE": "cpu", "WAVESPEED_JOBS_FOLDER": str(folder / "jobs")}
    lay_network(folder)
    with running(
        SERVE, **settings, WAVESPEED_UPSCALER_FOLDER=str(folder / "upscalers"), WAVESPEED_RESUME_BYTES=str(2**28)
    ) as server:
        until(lambda: httpx.get(server.url).status_code == 200, "the page")
        yield server


def test_a_picture_in_the_gallery_is_upscaled_by_a_network(driver: Any, server: Server, folder: Path) -> None:
    """The one that stands on the tab beside it: one page has the buttons of both."""
    browser = Browser(driver)
    browser.sized(1024)
    driver.get(server.url)
    browser.press("generate")
    until(lambda: browser.all(".st-key-actions button"), "the finished picture")
    [drawn] = jobs(server)
    browser.tab("Gallery")
    browser.click(f".st-key-menu-{drawn['id']} button")
    browser.press(f"upscale-card-{drawn['id']}")
    until(lambda: len(jobs(server)) == 2, "the second job")
    enlarged = jobs(server)[0]["id"]
    until(lambda: browser.all(f".st-key-upscale-{enlarged}"), "the enlarged picture")
    alt = until(lambda: driver.execute_script(PICTURE), "it on the page")
    assert alt.startswith("a stormy sea at sunset, seed ")
    driver.save_screenshot(str(folder / "upscaled.png"))
    assert "had been drawn before, and was gone on from" in browser.text()
    network = upscaling.load(Upscaler(name="sharp", path=folder / "upscalers" / "sharp.safetensors"))
    before, after = (opened(server, one) for one in (drawn["id"], enlarged))
    assert after.size == (2 * 768, 2 * 512)
    assert np.abs(np.asarray(network(before, CPU), int) - np.asarray(after, int)).max() <= 1
