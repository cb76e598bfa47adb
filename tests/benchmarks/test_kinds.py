"""The small models of other kinds, and the table of the defaults on them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator

import pytest
import torch

from benchmarks.cache.kinds import __main__ as command
from benchmarks.cache.kinds.networks import KINDS, SIZE, WORDS, PixelTransformer, draw
from benchmarks.cache.measure import Result
from benchmarks.cache.settings import FEWER, OURS, PLAIN_REUSE
from cache import FirstBlockCache, NoCache

HELD = 4.0  # dB; 9.7 where it was chosen


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", KINDS)
def test_its_weights_fit(name: str) -> None:
    network = KINDS[name].load()
    assert not network.training
    assert KINDS[name].weights.stat().st_size < 310_000


def test_a_clean_sample_is_handed_on_as_a_velocity() -> None:
    """An Euler step to noise 0 ends at the prediction, wherever it starts."""
    torch.manual_seed(0)
    network = PixelTransformer(clean=True, patch=4, width=8, depth=2, inner=8, heads=2).eval()
    torch.nn.init.normal_(network.leave.bias)
    x, words = torch.randn(2, 3, SIZE, SIZE), torch.zeros(2, 3, len(WORDS))
    ends = [x - time * network(x, torch.full((2,), time), words)[0] for time in (0.2, 0.9)]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)  # the last layer is its bias alone


def test_the_default_gains_by_what_it_knows_of_the_sampler() -> None:
    """A network that predicts its clean sample: the last call is the picture, and what was reused before is repaid."""
    kind = KINDS["clean-transformer"]
    network = kind.load()

    def found(strategy: FirstBlockCache | NoCache, known: bool = True) -> list[float]:
        pictures, report = draw(kind, network, strategy, pictures=4, steps=kind.steps, sampler="euler", known=known)
        return command.result(OURS, "", kind.steps, (pictures, report), reference).psnr_db

    reference, _ = draw(kind, network, NoCache(), pictures=4, steps=kind.steps, sampler="euler")
    corrected, alone = found(FirstBlockCache(threshold=0.2)), found(FirstBlockCache(threshold=0.2), known=False)
    assert statistics.mean(corrected) > statistics.mean(alone) + HELD


def test_a_row_says_what_the_default_is_below_of() -> None:
    found = [
        Result(OURS, "N = 2", psnr_db=[40.0, 41.0], hit_rate=0.5, operations_speedup=2.0),
        Result(command.ALONE, "N = 2", psnr_db=[42.0, 42.5], hit_rate=0.5, operations_speedup=2.0),
        Result(PLAIN_REUSE, "low", psnr_db=[30.0, 30.0], hit_rate=0.4, operations_speedup=1.6),
        Result(PLAIN_REUSE, "high", psnr_db=[20.0, 20.0], hit_rate=0.6, operations_speedup=2.4),
        Result(FEWER, "9", psnr_db=[40.0, 41.5], operations_speedup=2.0),
        Result(OURS, "N = 9", psnr_db=[10.0, 10.0], hit_rate=0.9, operations_speedup=9.0),
    ]
    (row,) = command.rows(KINDS["v-unet"], "ddim", found)
    assert row.gains[command.ALONE] == (-1.75, -2.0, -1.5)
    assert row.gains[PLAIN_REUSE] == pytest.approx((15.5, 15.0, 16.0))
    assert row.below == [command.ALONE]
    assert str(row).startswith("v-unet | ddim | N = 2 | 0.50 | 40.5 | -1.8 [-2.0, -1.5] | +15.5")


def test_the_table_ends_in_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def results(kind: object, sampler: str, pictures: int) -> list[Result]:
        return [Result(OURS, sampler, psnr_db=[40.0] * pictures, hit_rate=0.5, operations_speedup=2.0)]

    monkeypatch.setattr(command, "results", results)
    command.main(model=["v-unet"], pictures=2)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["setting"] for row in last["rows"]] == ["ddim", "dpmpp_2m"]
    with pytest.raises(Exception, match="take clean-transformer"):
        command.main(model=["vunet"], pictures=2)
