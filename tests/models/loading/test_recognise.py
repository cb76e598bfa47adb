"""Each kind of file is told by its tensors, in the published sizes; what is ours of the families is as published."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest

from models.loading.recognise import PARTS, recognise
from models.loading.shapes import configurations, unusual
from tests.compatibility.checkpoint_files import CHECKPOINTS
from tests.compatibility.checkpoint_rows import MISSING, CheckpointRow
from tests.compatibility.layouts import flux_whole, holding, in_folders
from tests.models import original
from tests.models.original import header_of

FAMILIES = ("sd15", "sd21", "sdxl", "flux-schnell", "flux-dev")
PUBLISHED = {  # parameters, as the publications, their model cards or whoever counted them say
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "flux-schnell": {"transformer": 11_891_178_560, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
    "flux-dev": {"transformer": 11_901_408_320, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
}


@cache
def networks(family: str) -> SimpleNamespace:
    return original.networks(configurations(family, {}))


SERVED = {(row.model, row.layout): row for row in CHECKPOINTS if not row.refused and row.layout is not in_folders}


@pytest.mark.parametrize("row", SERVED.values(), ids=lambda row: f"{row.model} {row.kind}")
def test_a_model_is_told_by_its_tensors(row: CheckpointRow) -> None:
    found = recognise(header_of(row.layout(networks(row.model)), dict(row.header)))
    assert (found.family, found.reason) == (row.model, "")
    assert set(found.networks) == set(PARTS[row.model].values()) - row.beside.keys()
    assert unusual(row.model, found.networks) is None


@pytest.mark.parametrize(
    "row", [row for row in CHECKPOINTS if row.refused and MISSING not in row.said], ids=lambda row: row.kind
)
def test_what_is_no_model_here_is_told_why(row: CheckpointRow) -> None:
    found = recognise(header_of(row.layout(networks(row.model) if row.model else None)))
    assert row.said == f"ink.safetensors {found.reason or unusual(str(found.family), found.networks)}."


@pytest.mark.parametrize("family", FAMILIES)
def test_our_shapes_are_the_published_ones(family: str) -> None:
    made = vars(networks(family))
    counted = {name: sum(parameter.numel() for parameter in made[name].parameters()) for name in PUBLISHED[family]}
    assert counted == PUBLISHED[family]


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "sdxl-refiner", "flux-dev"])
def test_widths_read_off_the_published_tensors_are_the_published_ones(family: str) -> None:
    tensors = (flux_whole if family == "flux-dev" else original.stable_diffusion)(networks(family))
    found = recognise(header_of(tensors)).networks
    roles = {"unet": "unet", "transformer": "flux", "text_encoder": "clip_h" if family == "sd21" else "clip_l"}
    roles |= {"text_encoder_2": "t5" if family == "flux-dev" else "clip_g"}
    roles |= {"vae": "vae16" if family == "flux-dev" else "vae4"}
    read = {component: found[role] for component, role in roles.items() if role in found}  # type: ignore[index]
    expected = configurations(family, {})
    if family == "sd21":
        expected["text_encoder/config.json"]["projection_dim"] = 1024  # its last layer and projection are not run
    assert configurations(family, read) == expected


@pytest.mark.parametrize(
    ("keys", "said", "expected"),
    [
        ([], {}, (None, None)),
        (["v_pred"], {}, ("v_prediction", False)),
        (["v_pred", "ztsnr"], {}, ("v_prediction", True)),
        ([], {"modelspec.prediction_type": "v"}, ("v_prediction", None)),
        ([], {"modelspec.prediction_type": "epsilon"}, ("epsilon", None)),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False)),
    ],
)
def test_what_the_file_says_of_its_prediction(
    keys: list[str], said: dict[str, str], expected: tuple[str | None, bool | None]
) -> None:
    found = recognise(header_of(holding(dict.fromkeys(keys, (0,)), original.stable_diffusion)(networks("sdxl")), said))
    assert (found.family, found.prediction, found.terminal_snr) == ("sdxl", *expected)
