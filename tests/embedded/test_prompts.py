"""Prompt weights and words behind the first window, seen by the judge: they change the picture as they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache import NoCache
from models.base import GenerationParams
from models.embedded import SPECS
from models.embedded.recipe.autoencoder import to_tensor
from models.embedded.recipe.judges import TABLES, WEIGHTS, Judge
from models.families.sd import SD
from models.generation import LoadedModel

FILLER = "a painting of a view, " * 24  # 216 tokens: three windows


@pytest.fixture(scope="module")
def tiny_sd() -> LoadedModel:
    return LoadedModel(SD.load(next(spec for spec in SPECS if spec.name == "tiny-sd"), "cpu"))


def seen(model: LoadedModel, prompt: str, table: str, word: str) -> float:
    """How sure the judge is of `word` in two pictures of the prompt, on average."""
    params = GenerationParams(
        prompt=prompt, width=128, height=128, steps=8, guidance_scale=3.0, seeds=(0, 1), batch_size=2
    )
    drawn = model.generate(params, NoCache(), lambda step: None)
    judge = Judge().eval()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    with torch.no_grad():
        logits = judge(to_tensor(np.stack([np.asarray(image) for image in drawn.images])))[list(TABLES).index(table)]
    return float(logits.softmax(-1)[:, list(TABLES[table]).index(word)].mean())


def test_a_weight_makes_its_word_stronger_or_weaker(tiny_sd: LoadedModel) -> None:
    weak = seen(tiny_sd, "a (snowy:0.3) misty island at noon", "weather", "snowy")
    strong = seen(tiny_sd, "a (snowy:1.5) misty island at noon", "weather", "snowy")
    assert weak < 0.3 < 0.6 < strong


def test_the_last_words_of_a_long_prompt_are_read(tiny_sd: LoadedModel) -> None:
    night = seen(tiny_sd, FILLER + "misty hills at night", "time", "night")
    noon = seen(tiny_sd, FILLER + "misty hills at noon", "time", "night")
    assert noon < 0.3 < 0.7 < night
