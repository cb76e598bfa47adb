"""Requests that are drawn together: each comes out as it would by itself, and hears of its own run alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.base import Generation, GenerationParams, Multiscale, Step
from models.embedded import FOLDER, SPECS
from models.errors import GenerationCancelled
from models.families.flux import FLUX
from models.families.sd import SD
from models.generation import LoadedModel
from tests.models.test_generation import FITTED, PARAMS, ignore, pixels, plain

PROMPTS = ("a fox", "a rainy day", "the sea")
LONG = ", ".join(["a misty forest at twilight"] * 20)  # more than one window of the text encoder


def requests_of(params: GenerationParams, prompts: Sequence[str] = PROMPTS) -> list[GenerationParams]:
    """Different texts and seeds; the last one has two images."""
    asked = [
        replace(params, prompt=prompt, negative_prompt=f"no. {index}", seeds=(40 + index,), batch_size=1)
        for index, prompt in enumerate(prompts)
    ]
    return [*asked[:-1], replace(asked[-1], seeds=(98, 99), batch_size=2)]


def drawn(
    model: LoadedModel,
    requests: Sequence[GenerationParams],
    strategy: CacheStrategy,
    hook: Callable[[Mapping[int, Step]], None] = lambda steps: None,
) -> list[Generation]:
    made = model.generate_together(requests, strategy, hook)
    assert all(isinstance(one, Generation) for one in made), made
    return made  # type: ignore[return-value]


def levels(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@functools.cache
def tolerance(model: LoadedModel, params: GenerationParams) -> int:
    """What the size of the batch alone changes in diffusers' own pipeline, with nothing of ours: levels of 255.

    The sums of a matrix product are taken in another order for another number of rows. The largest difference over
    these images, doubled: others round elsewhere.
    """
    four = replace(params, seeds=(40, 41, 98, 99))
    together = pixels(plain(model, four))
    alone = [pixels(plain(model, replace(params, seeds=(seed,)))) for seed in four.seeds]
    return max(2, 2 * levels(together, np.concatenate(alone)))


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("sd", NoCache()),
        ("sd", DeepCache(2, 2)),
        ("sd", DeepCache(2, 2, guidance="reuse")),
        ("sd", FITTED),
        ("flux", NoCache()),
        ("flux", FirstBlockCache(0.3)),
    ],
    ids=str,
)
def test_each_is_what_it_is_alone(family: str, strategy: CacheStrategy, request: pytest.FixtureRequest) -> None:
    model: LoadedModel = request.getfixturevalue(family)
    requests = requests_of(PARAMS)
    together, allowed = drawn(model, requests, strategy), tolerance(model, PARAMS)
    for asked, one in zip(requests, together, strict=True):
        alone = model.generate(asked, strategy, ignore)
        assert levels(pixels(one.images), pixels(alone.images)) <= allowed
        assert [report.decisions for report in one.reports] == [report.decisions for report in alone.reports]
        assert one.reports[0].item_decisions == alone.reports[0].item_decisions
        for mine, its in zip(one.reports[0].residuals, alone.reports[0].residuals, strict=True):
            assert mine == (None if its is None else pytest.approx(its, rel=1e-3))
        # A share of the batch's peak: items that decide apart owe a correction at different times.
        assert one.reports[0].cache_bytes == pytest.approx(alone.reports[0].cache_bytes, rel=0.1)
        assert one.warnings == alone.warnings
    assert [one.batches for one in together] == [[4], [], []]
    assert levels(pixels(together[0].images), pixels(together[1].images)) > 10 * allowed  # the test can fail


@pytest.mark.parametrize(
    "changes", [{"hires_fix": True}, {"multiscale": Multiscale(fullres_start=1, fullres_end=1)}], ids=str
)
def test_passes_over_the_whole_batch_are_shared(sd: LoadedModel, changes: dict[str, Any]) -> None:
    params = replace(PARAMS, width=128, height=128, **changes)
    requests = requests_of(params, PROMPTS[:2])
    allowed = tolerance(sd, params)
    for request, one in zip(requests, drawn(sd, requests, DeepCache(2, 2)), strict=True):
        alone = sd.generate(request, DeepCache(2, 2), ignore)
        assert levels(pixels(one.images), pixels(alone.images)) <= 2 * allowed  # two runs, one upon the other
        assert [report.name for report in one.stages] == [report.name for report in alone.stages]


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-flux"])
def test_the_embedded_models_pictures_too(name: str) -> None:
    (spec,) = (one for one in SPECS if one.name == name)
    family = FLUX if name == "tiny-flux" else SD
    model = LoadedModel(family.load(replace(spec, source=FOLDER / name), "cpu"))
    params = replace(PARAMS, width=128, height=128)
    requests = requests_of(params, PROMPTS[:2])
    strategy: CacheStrategy = DeepCache(3, 2) if name == "tiny-sd" else FirstBlockCache(0.1)
    allowed = tolerance(model, params)
    for request, one in zip(requests, drawn(model, requests, strategy), strict=True):
        alone = model.generate(request, strategy, ignore)
        assert levels(pixels(one.images), pixels(alone.images)) <= allowed
        assert [report.decisions for report in one.reports] == [report.decisions for report in alone.reports]


def test_texts_of_other_lengths_are_no_company(sd: LoadedModel) -> None:
    requests = requests_of(PARAMS, ("a misty forest", LONG, "the sea"))
    seen: list[Mapping[int, Step]] = []
    together = drawn(sd, requests, NoCache(), seen.append)
    assert [one.batches for one in together] == [[3], [1], []]
    assert [sorted(steps) for steps in seen] == [[0, 2]] * 4 + [[1]] * 4
    assert [step.index for steps in seen for step in [next(iter(steps.values()))]] == [0, 1, 2, 3] * 2
    assert {step.total for steps in seen for step in steps.values()} == {4}
    alone = sd.generate(requests[1], NoCache(), ignore)
    assert np.array_equal(pixels(together[1].images), pixels(alone.images))


def test_a_failed_batch_takes_no_other_with_it(sd: LoadedModel) -> None:
    requests = requests_of(PARAMS, ("a misty forest", LONG, "the sea"))

    def stop(steps: Mapping[int, Step]) -> None:
        if 0 in steps and steps[0].index == 1:
            raise GenerationCancelled

    made = sd.generate_together(requests, DeepCache(2), stop)
    assert [type(one) for one in made] == [GenerationCancelled, Generation, GenerationCancelled]
    alone = sd.generate(requests[1], DeepCache(2), ignore)
    assert isinstance(made[1], Generation)
    assert np.array_equal(pixels(made[1].images), pixels(alone.images))


def test_each_hears_its_own_decisions_and_what_its_cache_could_not_do(flux: LoadedModel) -> None:
    """With a threshold between the two items' changes, one reuses where the other computes."""
    params = replace(PARAMS, steps=8, guidance_scale=1.0)
    requests = requests_of(params)[:2]
    never = FirstBlockCache(1e-9, forecast=False)
    least = [
        min(change for change in flux.generate(one, never, ignore).reports[0].residuals if change is not None)
        for one in requests
    ]
    assert least[0] != least[1]
    strategy = FirstBlockCache(sum(least) / 2, forecast=False)
    steps: list[list[str]] = [[], []]

    def hear(each: Mapping[int, Step]) -> None:
        for index, step in each.items():
            steps[index].append(step.decision)

    together = drawn(flux, requests, strategy, hear)
    alone = [flux.generate(one, strategy, ignore) for one in requests]
    assert ["".join(letters) for letters in steps] == [one.reports[0].decisions for one in alone]
    assert [one.reports[0].decisions for one in together] == [one.reports[0].decisions for one in alone]
    assert sorted("R" in one.reports[0].decisions for one in together) == [False, True]
    for one, by_itself in zip(together, alone, strict=True):
        assert one.warnings == by_itself.warnings
        assert any("reused nothing" in sentence for sentence in one.warnings) == (one.reports[0].reused == 0)
        assert one.reports[0].predicted_speedup == by_itself.reports[0].predicted_speedup
