"""Upscalers of the true classes at small width, through a file, in tiles, in hires-fix and after decoding."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cache import DeepCache, NoCache
from models import upscaling
from models.base import Enlargement, Upscaler
from models.errors import GenerationCancelled, UpscalerFailed
from models.generation import LoadedModel
from tests.models.stages.test_stages import picture
from tests.models.test_generation import PARAMS, ignore, pixels
from tests.models.test_together import levels

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def spandrel() -> Any:
    """Where torchvision is not installed, three names stand for it: two of spandrel's networks import them."""
    pytest.importorskip("einops", reason="the extra `upscale` is not installed")
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    stand_ins = {name: ModuleType(name) for name in names}
    for name in ("InterpolationMode", "rotate", "normalize"):
        setattr(stand_ins[names[-1]], name, None)
    with pytest.MonkeyPatch.context() as patch:
        try:
            import torchvision  # noqa: F401
        except Exception:  # noqa: BLE001  # missing, or for another build of torch
            for name, module in stand_ins.items():
                patch.setitem(sys.modules, name, module)
        return pytest.importorskip("spandrel", reason="the extra `upscale` is not installed")


@pytest.fixture(scope="module", params=["ESRGAN", "SPAN"])
def network(request: pytest.FixtureRequest, spandrel: Any) -> torch.nn.Module:
    from spandrel.architectures import ESRGAN, SPAN

    torch.manual_seed(0)
    if request.param == "ESRGAN":
        return ESRGAN.ESRGAN(num_filters=8, num_blocks=1, scale=2).eval()  # type: ignore[no-any-return]
    return SPAN.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2).eval()  # type: ignore[no-any-return]


@pytest.fixture
def saved(network: torch.nn.Module, tmp_path: Path) -> Upscaler:
    file = tmp_path / "sharp.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    return Upscaler(name="sharp", path=file)


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 24), (290, 270)], ids=["one tile", "four tiles"])
def test_a_file_enlarges_as_its_network_does(network: torch.nn.Module, saved: Upscaler, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    enlarge = upscaling.load(saved)
    enlarged = enlarge(image, CPU)
    assert (enlarge.scale, enlarged.size) == (2, (2 * size[0], 2 * size[1]))
    whole = network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)[0]
    expected = (whole.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert levels(np.asarray(enlarged), expected) <= 1
    assert expected.std() > 0


def damaged(upscaler: Upscaler, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Upscaler:
    from safetensors.torch import load_file

    save_file(change(load_file(upscaler.path)), upscaler.path)
    return upscaler


def test_what_is_no_upscaler_is_refused_with_a_sentence(saved: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved.path.read_bytes()
    for content, words in (
        (whole[: len(whole) // 2], "cannot be read"),
        (b"\x80\x04pickle", "cannot be read"),
        (b"\xff" * 64, "cannot be read"),
    ):
        saved.path.write_bytes(content)
        with pytest.raises(UpscalerFailed, match=words):
            upscaling.load(saved)
    saved.path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(upscaling, "MOST_BYTES", 64)
        with pytest.raises(UpscalerFailed, match="more than"):
            upscaling.load(saved)
    lora = {"unet.to_q.lora_A.weight": torch.zeros(2, 8), "unet.to_q.lora_B.weight": torch.zeros(8, 2)}
    with pytest.raises(UpscalerFailed, match="no upscaler"):
        upscaling.load(damaged(saved, lambda tensors: lora))
    saved.path.write_bytes(whole)
    first = next(iter(damaged(saved, lambda tensors: tensors).path.parent.iterdir()))
    assert first == saved.path
    broken = damaged(saved, lambda tensors: {name: torch.full_like(one, torch.nan) for name, one in tensors.items()})
    with pytest.raises(UpscalerFailed, match="damaged"):
        upscaling.load(broken)(picture(16, 16), CPU)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(UpscalerFailed, match="extra `upscale`"):
        upscaling.load(saved)


class Twice:
    """Stands for a network that enlarges as Lanczos does."""

    name, scale = "twice", 2

    def __call__(self, image: Image.Image, device: object, on_tile: Callable[[], None] = list) -> Image.Image:
        on_tile()
        return image.resize((2 * image.width, 2 * image.height), Image.Resampling.LANCZOS)

    def tiles(self, width: int, height: int) -> int:
        return 1


class Tiling(Enum):
    """As spandrel's."""

    SUPPORTED = 1


FILE = Upscaler(name="twice", path=Path("twice.safetensors"))


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Twice:
    enlarge = Twice()
    monkeypatch.setattr(upscaling, "load", lambda upscaler: enlarge)
    return enlarge


def test_hires_fix_enlarges_by_it(sd: LoadedModel, twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(PARAMS, width=128, height=128, hires_fix=True)
    plain = sd.generate(params, NoCache(), ignore)
    same = sd.generate(replace(params, hires_upscaler=FILE), NoCache(), ignore)
    assert np.array_equal(pixels(plain.images), pixels(same.images))
    monkeypatch.setattr(Twice, "__call__", lambda self, image, device: Image.new("RGB", (256, 256), "red"))
    other = sd.generate(replace(params, hires_upscaler=FILE), DeepCache(interval=2), ignore)
    assert other.images[0].size == (128, 128)
    assert levels(pixels(plain.images), pixels(other.images)) > 10
    assert all(stage.cache.reused for stage in other.stages)


def test_the_last_pass_enlarges_what_was_drawn(sd: LoadedModel, twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sd.generate(PARAMS, NoCache(), ignore)
    drawn = sd.generate(replace(PARAMS, upscale=FILE), NoCache(), ignore)
    expected = [twice(image, CPU) for image in plain.images]
    assert np.array_equal(pixels(drawn.images), pixels(expected))
    assert drawn.images[0].size == (128, 128)
    monkeypatch.setattr(Twice, "scale", 129)
    with pytest.raises(UpscalerFailed, match="smaller picture"):
        sd.generate(replace(PARAMS, upscale=FILE), NoCache(), ignore)


def test_an_uploaded_picture_passes_as_often_as_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def network(pixels: torch.Tensor) -> torch.Tensor:
        seen.append((pixels.shape[-1], pixels.shape[-2]))
        return pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)

    network.scale, network.tiling = 2, Tiling.SUPPORTED  # type: ignore[attr-defined]
    network.to = lambda device: network  # type: ignore[attr-defined]
    network.eval = lambda: network  # type: ignore[attr-defined]
    monkeypatch.setattr(upscaling, "load", lambda upscaler: upscaling.Enlarger("twice", network))
    image = picture(40, 24)
    told: list[tuple[int, int]] = []
    work = Enlargement(pictures=(image,), upscalers=(FILE, "Nearest"), blend=0.5, factor=4)
    (made,) = upscaling.enlarged(work, "cpu", lambda *tiles: told.append(tiles))
    assert (seen, told) == ([(40, 24), (80, 48)], [(1, 2), (2, 2)])
    assert levels(np.asarray(made), np.asarray(image.resize((160, 96), Image.Resampling.NEAREST))) <= 1
    (odd,) = upscaling.enlarged(replace(work, upscalers=(FILE,), factor=2.5), "cpu", lambda *tiles: None)
    assert odd.size == (100, 60)

    def stop(done: int, total: int) -> None:
        raise GenerationCancelled

    with pytest.raises(GenerationCancelled):
        upscaling.enlarged(work, "cpu", stop)
    monkeypatch.setattr(upscaling, "MOST_PIXELS", 160 * 96 - 1)
    seen.clear()
    with pytest.raises(UpscalerFailed, match="160×96"):
        upscaling.enlarged(work, "cpu", stop)
    assert seen == []
