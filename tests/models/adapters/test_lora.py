"""LoRA against weights merged by hand, in every layout; and no trace of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cache import DeepCache, FirstBlockCache, NoCache
from models.adapters.names import COMPONENTS
from models.base import AdapterFailed, GenerationCancelled, GenerationParams, Lora, ModelSpec, Step
from models.families.sd import SD
from models.generation import LoadedModel
from models.text.encoded import TextCache

PARAMS = GenerationParams(prompt="a misty forest", width=64, height=64, steps=3, guidance_scale=3.0, seeds=(7,))

# The true change of a layer: up (out, rank) @ down (rank, in), by its component and path.
Pairs = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]


def ignore(step: Step) -> None:
    """A step hook that wants nothing."""


def pixels(drawn: Any) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in drawn.images])


@pytest.fixture(params=["sd", "flux"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    return loaded


def layers(model: LoadedModel) -> dict[tuple[str, str], nn.Module]:
    """What files in the wild change: attention and feed-forward, of denoiser and text encoder, convolutions too."""
    ends = ("to_q", "to_v", "to_out.0", "q_proj", "out_proj", "fc1", "net.0.proj", "conv1", "proj_mlp")
    return {
        (component, path): module
        for component in COMPONENTS
        if hasattr(getattr(model.pipeline, component, None), "named_modules")
        for path, module in getattr(model.pipeline, component).named_modules()
        if path.endswith(ends) and isinstance(module, nn.Linear | nn.Conv2d)
    }


def random_pairs(model: LoadedModel, seed: int = 0, rank: Callable[[int], int] = lambda index: 2 + index % 3) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, (name, module) in enumerate(layers(model).items()):
        out, *rest = module.weight.shape
        down = torch.randn(rank(index), *rest, generator=generator) * 0.3
        up = torch.randn(out, rank(index), *[1] * (len(rest) - 1), generator=generator) * 0.3
        pairs[name] = up, down
    return pairs


def kohya(pairs: Pairs) -> dict[str, torch.Tensor]:
    """Paths flattened with underscores; alphas that differ between layers, which scale by alpha / rank."""
    tensors = {}
    two = any(component == "text_encoder_2" for component, _ in pairs)
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_text_model_" if two else "lora_te_text_model_",
        "text_encoder_2": "lora_te2_",
    }
    for index, ((component, path), (up, down)) in enumerate(pairs.items()):
        name = prefixes[component] + path.replace(".", "_")
        alpha = float(1 + index % 4)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(alpha)}
        tensors[f"{name}.lora_up.weight"] = up * (len(down) / alpha)
    return tensors


def inner(path: str) -> str:
    """A text encoder's path as files spell it: transformers 5 dropped a level of some encoders."""
    return path if path.startswith("text_model.") else f"text_model.{path}"


def sgm(pairs: Pairs) -> dict[str, torch.Tensor]:
    """kohya's names for SDXL: those of the original UNet's blocks."""
    places = {
        "down_blocks.1.attentions.0.": "input_blocks_4_1_",
        "down_blocks.2.attentions.1.": "input_blocks_8_1_",
        "mid_block.attentions.0.": "middle_block_1_",
        "up_blocks.0.attentions.2.": "output_blocks_2_1_",
        "up_blocks.1.attentions.0.": "output_blocks_3_1_",
    }
    tensors = {}
    for (_, path), (up, down) in pairs.items():
        for place, theirs in places.items():
            if path.startswith(place):
                name = f"lora_unet_{theirs}{path.removeprefix(place).replace('.', '_')}"
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def diffusers_layout(pairs: Pairs) -> dict[str, torch.Tensor]:
    tensors = {}
    for (component, path), (up, down) in pairs.items():
        if component.startswith("text_encoder"):
            name = f"{component}.{inner(path)}.lora_linear_layer"
            tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        else:
            tensors |= {f"{component}.{path}.lora.down.weight": down, f"{component}.{path}.lora.up.weight": up}
    return tensors


def peft_layout(pairs: Pairs) -> dict[str, torch.Tensor]:
    tensors = {}
    for (component, path), (up, down) in pairs.items():
        name = f"{component}.{inner(path) if component.startswith('text_encoder') else path}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def bare_peft_layout(pairs: Pairs) -> dict[str, torch.Tensor]:
    """As `PeftModel.save_pretrained` writes a denoiser alone."""
    tensors = {}
    for (_, path), (up, down) in pairs.items():
        name = f"base_model.model.{path}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def saved(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Lora:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return Lora(name=name, path=path)


@contextmanager
def merged(model: LoadedModel, *changes: tuple[Pairs, float]) -> Iterator[None]:
    """The model with weight · up @ down added to its own weights, in float64."""
    modules, before = layers(model), {}
    for pairs, weight in changes:
        for name, (up, down) in pairs.items():
            own = modules[name].weight
            before.setdefault(name, own.data)
            delta = torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
            own.data = (own.data.double() + weight * delta).to(own.dtype)
    texts, model._texts = model._texts, TextCache()  # type: ignore[attr-defined]  # read by these encoders alone
    try:
        yield
    finally:
        model._texts = texts  # type: ignore[attr-defined]
        for name, data in before.items():
            modules[name].weight.data = data


def traces(model: LoadedModel) -> dict[str, Any]:
    """Everything by which a run could know what ran before it, tensors as their bytes."""
    found: dict[str, Any] = {}
    for component in COMPONENTS:
        root = getattr(model.pipeline, component, None)
        for path, module in root.named_modules() if root is not None else ():
            key = f"{component}.{path}"
            found[key] = id(module), sorted(module.__dict__), module.training, len(module._forward_hooks)
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    found[f"{key}.{name}"] = id(tensor), tensor.requires_grad, tensor.numpy(force=True).tobytes()
    return found


LAYOUTS: list[tuple[str, Callable[[Pairs], dict[str, torch.Tensor]]]] = [
    ("sd", kohya),
    ("sd", diffusers_layout),
    ("sd", peft_layout),
    ("sd", bare_peft_layout),
    ("sdxl", kohya),
    ("sdxl", sgm),
    ("sdxl", diffusers_layout),
    ("flux", peft_layout),
    ("flux", bare_peft_layout),
]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS, ids=lambda value: getattr(value, "__name__", value))
def test_each_layout_draws_what_merged_weights_draw(
    family: str, layout: Callable[[Pairs], dict[str, torch.Tensor]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    pairs = random_pairs(model)
    if layout is bare_peft_layout:
        pairs = {name: pair for name, pair in pairs.items() if name[0] in ("unet", "transformer")}
    if layout is sgm:
        spots = ("down_blocks.1.attentions.0.", "down_blocks.2.attentions.1.", "mid_block.attentions.0.")
        spots += ("up_blocks.0.attentions.2.", "up_blocks.1.attentions.0.")
        pairs = {name: pair for name, pair in pairs.items() if name[1].startswith(spots)}
    lora = saved(tmp_path, "own", layout(pairs))
    plain = pixels(model.generate(PARAMS, NoCache(), ignore))
    ours = pixels(model.generate(replace(PARAMS, loras=(replace(lora, weight=0.7),)), NoCache(), ignore))
    with merged(model, (pairs, 0.7)):
        expected = pixels(model.generate(PARAMS, NoCache(), ignore))
    # W x + B (A x) and (W + B A) x round differently: a level or two of 255 after three steps.
    assert np.abs(ours - expected).max() <= 2
    assert np.abs(ours - plain).max() > 20


def test_several_add_up_each_by_its_weight_in_either_precision(sd: LoadedModel, tmp_path: Path) -> None:
    first, second = random_pairs(sd, 1), random_pairs(sd, 2)
    unet_only = {name: pair for name, pair in second.items() if name[0] == "unet"}
    text_only = {name: pair for name, pair in first.items() if name[0] == "text_encoder"}
    halves = {name: (up.bfloat16(), down.bfloat16()) for name, (up, down) in unet_only.items()}
    loras = (
        replace(saved(tmp_path, "text", kohya(text_only)), weight=-0.5),
        replace(saved(tmp_path, "unet", peft_layout(halves)), weight=1.2),
    )
    ours = pixels(sd.generate(replace(PARAMS, loras=loras), NoCache(), ignore))
    rounded = {name: (up.float(), down.float()) for name, (up, down) in halves.items()}
    with merged(sd, (text_only, -0.5), (rounded, 1.2)):
        expected = pixels(sd.generate(PARAMS, NoCache(), ignore))
    assert np.abs(ours - expected).max() <= 2


def test_a_file_that_changes_part_of_the_text_encoder_is_read_whole(sd: LoadedModel, tmp_path: Path) -> None:
    """diffusers alone would drop such a file's q projections."""
    pairs = {name: pair for name, pair in random_pairs(sd).items() if name[1].endswith(("q_proj", "fc1"))}
    lora = saved(tmp_path, "part", kohya(pairs))
    ours = pixels(sd.generate(replace(PARAMS, loras=(lora,)), NoCache(), ignore))
    with merged(sd, (pairs, 1.0)):
        expected = pixels(sd.generate(PARAMS, NoCache(), ignore))
    assert np.abs(ours - expected).max() <= 2


def test_a_cache_sees_the_changed_network(sd: LoadedModel, flux: LoadedModel, tmp_path: Path) -> None:
    for model, strategy in ((sd, DeepCache(interval=2, depth=2)), (flux, FirstBlockCache(threshold=1.0))):
        pairs = random_pairs(model)
        lora = saved(tmp_path, model.spec.name, peft_layout(pairs))
        ours = model.generate(replace(PARAMS, loras=(lora,)), strategy, ignore)
        with merged(model, (pairs, 1.0)):
            expected = model.generate(PARAMS, strategy, ignore)
        assert ours.stages[0].cache.decisions == expected.stages[0].cache.decisions
        assert ours.stages[0].cache.reuse_cost == expected.stages[0].cache.reuse_cost
        assert ours.stages[0].cache.reused > 0
        assert np.abs(pixels(ours) - pixels(expected)).max() <= 2


def test_compiled_layers_see_the_lora_and_its_end(small_folders: dict[str, Path], tmp_path: Path) -> None:
    """Without one, with one, with two, without, with another: each time the picture is the uncompiled one.

    The files change the layers of the first level and the middle, so that no others are compiled again. Dynamo decides
    that, whatever compiles behind it; "eager" leaves the operations as they are, and the bits too.
    """
    model = LoadedModel(SD.load(ModelSpec(name="small-sd", family="sd", source=small_folders["epsilon"]), "cpu"))
    model.model.compile_backend = "eager"  # type: ignore[attr-defined]
    first, second = (
        {name: pair for name, pair in pairs.items() if name[1].startswith(("down_blocks.0.", "mid_block."))}
        for pairs in (random_pairs(model, 1), random_pairs(model, 2, lambda index: 5))
    )
    one, other = saved(tmp_path, "first", peft_layout(first)), saved(tmp_path, "second", peft_layout(second))
    chains: tuple[tuple[Lora, ...], ...] = ((), (one,), (one, other), (), (other,))
    drawn = []
    for loras in chains:
        params = replace(PARAMS, loras=loras, steps=2)
        plain = pixels(model.generate(params, NoCache(), ignore))
        assert np.array_equal(plain, pixels(model.generate(replace(params, compiled=True), NoCache(), ignore)))
        drawn.append(plain)
    assert np.array_equal(drawn[0], drawn[3])
    assert np.abs(drawn[0] - drawn[4]).max() > 20


def test_no_trace_after_success_error_and_cancel(model: LoadedModel, tmp_path: Path) -> None:
    lora = saved(tmp_path, "own", peft_layout(random_pairs(model)))
    with_it = replace(PARAMS, loras=(lora,))
    plain = pixels(model.generate(PARAMS, NoCache(), ignore))
    before = traces(model)
    changed = pixels(model.generate(with_it, NoCache(), ignore))
    assert traces(model) == before

    def stop(step: Step) -> None:
        raise GenerationCancelled

    with pytest.raises(GenerationCancelled):
        model.generate(with_it, NoCache(), stop)
    assert traces(model) == before
    misfit = saved(tmp_path, "misfit", {"transformer.x.lora_A.weight": torch.ones(1, 1)})
    with pytest.raises(AdapterFailed):
        model.generate(replace(PARAMS, loras=(lora, misfit)), NoCache(), ignore)
    assert traces(model) == before
    assert np.array_equal(pixels(model.generate(PARAMS, NoCache(), ignore)), plain)
    assert np.array_equal(pixels(model.generate(with_it, NoCache(), ignore)), changed)


def test_weight_zero_is_the_model_itself(model: LoadedModel, tmp_path: Path) -> None:
    lora = replace(saved(tmp_path, "own", peft_layout(random_pairs(model))), weight=0.0)
    off = model.generate(replace(PARAMS, loras=(lora,)), NoCache(), ignore)
    assert np.array_equal(pixels(off), pixels(model.generate(PARAMS, NoCache(), ignore)))


def widened(pairs: Pairs, component: str) -> Pairs:
    """The last layer of the component made for inputs twice as wide."""
    name = [name for name in pairs if name[0] == component][-1]
    up, down = pairs[name]
    return pairs | {name: (up, torch.cat([down, down], dim=1))}


def misfits(model: LoadedModel) -> dict[str, dict[str, torch.Tensor]]:
    pairs = random_pairs(model)
    denoiser = next(iter(pairs))[0]
    one = next(iter(peft_layout(pairs)))
    return {
        "other names": {key.replace("blocks", "layers"): tensor for key, tensor in peft_layout(pairs).items()},
        "one layer too many": peft_layout(pairs | {(denoiser, "nowhere.to_q"): (torch.ones(4, 1), torch.ones(1, 4))}),
        "other widths": peft_layout(widened(pairs, denoiser)),
        "another component's": {"prior." + key: tensor for key, tensor in peft_layout(pairs).items()},
        "no pairs": {"weights": torch.ones(3)},
        "half a pair": {one: peft_layout(pairs)[one]},
        "NaN": {key: tensor * torch.nan for key, tensor in peft_layout(pairs).items()},
        "a DoRA": {**peft_layout(pairs), one.replace("lora_A.weight", "dora_scale"): torch.ones(3)},
        "a LoKr": {one.replace("lora_A.weight", "lokr_w1"): torch.ones(3, 3)},
    }


def test_what_does_not_fit_is_named_and_leaves_no_trace(model: LoadedModel, tmp_path: Path) -> None:
    before = traces(model)
    config = dict(model.denoiser.root.config)
    for number, (kind, tensors) in enumerate(misfits(model).items()):
        lora = saved(tmp_path, f"misfit-{number}", tensors)
        with pytest.raises(AdapterFailed, match=f"'misfit-{number}'") as failure:
            model.generate(replace(PARAMS, loras=(lora,)), NoCache(), ignore)
        assert str(tmp_path) not in str(failure.value), kind
        assert traces(model) == before, kind
    assert dict(model.denoiser.root.config) == config


def test_a_broken_file_is_named(sd: LoadedModel, tmp_path: Path) -> None:
    lora = saved(tmp_path, "own", kohya(random_pairs(sd)))
    whole = lora.path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:7], b"", b"\xff" * 64, b"PK\x03\x04" + whole):
        lora.path.write_bytes(content)
        with pytest.raises(AdapterFailed, match=r"'own' cannot be used .* cannot be read"):
            sd.generate(replace(PARAMS, loras=(lora,)), NoCache(), ignore)
