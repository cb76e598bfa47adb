"""Plans by hand: small numbers whose sums can be done in the head, and Flux's published ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.base import Offload
from models.loading.plan import RESERVE, Plan, Sizes, Work, choose, streamed

SIZES = Sizes(
    {"text_encoder": 30, "text_encoder_2": 50, "unet": 200, "vae": 10},
    {"text_encoder_2": [10] * 4, "unet": [20, 40, 40, 40, 20]},
)
WORK = Work(text=1, denoise=20, decode=60, tiled=15)


def memory(room: int) -> int:
    """Of which so much is left beside the reserve."""
    return round(room / (1 - RESERVE) + 1)


@pytest.mark.parametrize(
    ("room", "offload", "moved", "tiled"),
    [
        (350, "none", set(), False),  # 290 of weights, and the decode
        (349, "text", {"text_encoder", "text_encoder_2"}, False),
        (270, "text", {"text_encoder", "text_encoder_2"}, False),  # 210 and the decode
        (269, "model", {"text_encoder", "text_encoder_2", "unet", "vae"}, False),
        (220, "model", {"text_encoder", "text_encoder_2", "unet", "vae"}, False),  # 200 and a step
    ],
)
def test_the_cheapest_plan_that_fits_is_chosen(room: int, offload: str, moved: set[str], tiled: bool) -> None:
    plan = choose(SIZES, WORK, memory(room))
    assert (plan.offload, plan.moved, plan.tiled, plan.kept) == (offload, moved, tiled, {})
    assert plan.need(SIZES, WORK) <= room


def test_the_denoiser_stays_for_the_decode_where_it_can() -> None:
    """It makes room for the text alone: the autoencoder is always there."""
    work = replace(WORK, text=20, decode=22)
    plan = choose(SIZES, work, memory(232))
    assert plan == Plan(offload="model", moved=frozenset({"text_encoder", "text_encoder_2", "unet"}))
    assert plan.peaks(SIZES, work) == {"text": 10 + 50 + 20, "denoise": 10 + 200 + 20, "decode": 10 + 200 + 22}


@pytest.mark.parametrize(
    ("room", "kept", "denoise"),
    [
        (218, 2, 160 + 20),  # three of 40 are streamed through two slots: fewer would free nothing
        (180, 2, 160 + 20),
        (179, 1, 140 + 20),
        (159, 0, 120 + 20),
    ],
)
def test_as_many_blocks_are_kept_as_there_is_room_for(room: int, kept: int, denoise: int) -> None:
    plan = choose(SIZES, WORK, memory(room))
    assert (plan.offload, plan.kept) == ("group", {"unet": kept})
    assert plan.peaks(SIZES, WORK) == {"text": 51, "denoise": denoise, "decode": 70}


def test_blocks_are_kept_at_both_ends() -> None:
    assert [streamed("abcde", kept) for kept in range(6)] == [list(x) for x in ("abcde", "bcde", "bcd", "cd", "c", "")]


def test_tiles_come_where_the_decode_alone_does_not_fit() -> None:
    plan = choose(SIZES, replace(WORK, decode=400), memory(310))
    assert (plan.offload, plan.tiled) == ("none", True)
    assert "tiles" in plan.words(SIZES)


@pytest.mark.parametrize("offload", ["none", "text", "model", "group"])
def test_the_operators_choice_is_kept(offload: Offload) -> None:
    assert choose(SIZES, WORK, 10**6, offload).offload == offload
    assert choose(SIZES, WORK, 0, offload).offload == offload


def test_where_nothing_fits_the_least_is_taken() -> None:
    plan = choose(SIZES, WORK, 1)
    assert (plan.offload, plan.kept["unet"], plan.tiled) == ("group", 0, False)  # a step needs more than the decode


@pytest.mark.parametrize(("bits", "gigabytes"), [(16, 12.5), (8.5, 12.5), (4.5, 8)])
def test_flux_by_the_bytes_that_its_files_have(bits: float, gigabytes: float) -> None:
    """In half precision, 8 and 4 bits (GGUF's Q8_0 and Q4_0); the text encoder in half precision."""

    def taken(parameters: float) -> int:
        return int(parameters * bits / 8)

    blocks = [taken(340e6)] * 19 + [taken(141.6e6)] * 38
    t5 = [386_000_000] * 24
    others = {"text_encoder": 246_000_000, "text_encoder_2": 9_525_000_000, "vae": 168_000_000}
    sizes = Sizes({**others, "transformer": taken(11.9e9)}, {"text_encoder_2": t5, "transformer": blocks})
    work = Work(text=210_000_000, denoise=830_000_000, decode=1_620_000_000, tiled=1_380_000_000)
    plan = choose(sizes, work, int(gigabytes * 1e9))
    assert plan.need(sizes, work) < gigabytes * 1e9
    each_step = plan.copied_each_step(sizes)
    assert {16: 13e9 < each_step < 16e9, 8.5: 0 < each_step < 3e9, 4.5: each_step == 0}[bits]
    row = plan.row(sizes, work, int(gigabytes * 1e9))
    assert sum(one["bytes"] for one in row["networks"].values()) == sum(sizes.weights.values())
    assert row["networks"]["text_encoder_2"]["where"] == ("streamed" if gigabytes == 8 else "moved")


def test_two_denoisers_take_turns() -> None:
    """A refiner's beside the model's: the larger of the two is the peak, and both are moved."""
    sizes = Sizes({**SIZES.weights, "refiner_text_encoder_2": 50, "refiner_unet": 150}, SIZES.blocks)
    work = WORK.beside(Work(text=2, denoise=30, decode=1, tiled=1))
    assert work == Work(text=2, denoise=30, decode=60, tiled=15)
    assert choose(sizes, work, memory(550)).offload == "none"  # 490 of weights, and the decode
    assert choose(sizes, work, memory(420)).moved == sizes.texts  # 360 and the decode
    plan = choose(sizes, work, memory(269))
    assert (plan.offload, plan.moved) == ("model", {*sizes.weights})
    assert plan.peaks(sizes, work) == {"text": 52, "denoise": 230, "decode": 70}
    assert "the unet, the refiner_unet and the autoencoder" in plan.words(sizes)
