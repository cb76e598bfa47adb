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
from safetensors.torch import load_file, save_file
from torch import nn

from cache import DeepCache, FirstBlockCache, NoCache
from models.adapters.lora import applied, read
from models.adapters.names import COMPONENTS, Place, Places
from models.base import GenerationParams, Lora, ModelSpec, Step
from models.errors import AdapterFailed, GenerationCancelled
from models.families.flux import FLUX
from models.families.sd import SD
from models.generation import LoadedModel
from models.text.encoded import TextCache
from tests.models.original import save_flux, unet_name

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


def peft_layout(pairs: Pairs) -> dict[str, torch.Tensor]:
    tensors = {}
    for (component, path), (up, down) in pairs.items():
        tensors |= {f"{component}.{path}.lora_A.weight": down, f"{component}.{path}.lora_B.weight": up}
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


def test_several_add_up_each_by_its_weight_in_either_precision(sd: LoadedModel, tmp_path: Path) -> None:
    first, second = random_pairs(sd, 1), random_pairs(sd, 2)
    unet_only = {name: pair for name, pair in second.items() if name[0] == "unet"}
    text_only = {name: pair for name, pair in first.items() if name[0] == "text_encoder"}
    halves = {name: (up.bfloat16(), down.bfloat16()) for name, (up, down) in unet_only.items()}
    loras = (
        replace(saved(tmp_path, "text", peft_layout(text_only)), weight=-0.5),
        replace(saved(tmp_path, "unet", peft_layout(halves)), weight=1.2),
    )
    ours = pixels(sd.generate(replace(PARAMS, loras=loras), NoCache(), ignore))
    rounded = {name: (up.float(), down.float()) for name, (up, down) in halves.items()}
    with merged(sd, (text_only, -0.5), (rounded, 1.2)):
        expected = pixels(sd.generate(PARAMS, NoCache(), ignore))
    assert np.abs(ours - expected).max() <= 2


def test_the_text_encoder_s_strength_apart(sd: LoadedModel, tmp_path: Path) -> None:
    pairs = random_pairs(sd)
    text = {name: pair for name, pair in pairs.items() if name[0] == "text_encoder"}
    unet = {name: pair for name, pair in pairs.items() if name[0] == "unet"}
    lora = saved(tmp_path, "own", peft_layout(pairs))
    for weight, text_weight in ((0.7, 0.2), (0.7, 0.0), (0.0, 0.5)):
        one = replace(lora, weight=weight, text_weight=text_weight)
        ours = pixels(sd.generate(replace(PARAMS, loras=(one,)), NoCache(), ignore))
        with merged(sd, (unet, weight), (text, text_weight)):
            expected = pixels(sd.generate(PARAMS, NoCache(), ignore))
        assert np.abs(ours - expected).max() <= 2


def test_layers_by_two_names_are_changed_once(sd: LoadedModel, tmp_path: Path) -> None:
    """OneTrainer has written files with all layers by the names of two trainers."""
    pairs = {name: pair for name, pair in random_pairs(sd).items() if name[0] == "unet"}
    other = {f"lora_unet_{path.replace('.', '_')}": pair for (_, path), pair in pairs.items()}
    tensors = peft_layout(pairs)
    for name, (up, down) in other.items():
        tensors |= {f"{name}.lora_up.weight": up.clone(), f"{name}.lora_down.weight": down.clone()}
    once = saved(tmp_path, "once", peft_layout(pairs))
    twice = saved(tmp_path, "twice", tensors)
    drawn = [sd.generate(replace(PARAMS, loras=(lora,)), NoCache(), ignore) for lora in (once, twice)]
    assert np.array_equal(pixels(drawn[0]), pixels(drawn[1]))
    assert drawn[0].warnings == []
    (said,) = drawn[1].warnings
    assert f"{len(pairs)} of the {2 * len(pairs)} layers that the LoRA 'twice' changes stand there by another" in said


def test_every_layer_of_a_published_unet_is_found_by_its_published_name(sd: LoadedModel, sdxl: LoadedModel) -> None:
    for model in (sd, sdxl):
        unet = model.pipeline.unet  # type: ignore[attr-defined]
        attends = ["Cross" in block for block in unet.config.up_block_types]
        places = Places(model.pipeline)  # type: ignore[attr-defined]
        for path in {key.rpartition(".")[0] for key in unet.state_dict()}:
            theirs = unet_name(f"{path}.weight", unet.config.layers_per_block, attends).removesuffix(".weight")
            for name in (f"diffusion_model.{theirs}", f"lora_unet_{theirs.replace('.', '_')}", f"unet.{path}", path):
                assert places.find(name) == (Place("unet", path),), name


def test_every_layer_of_flux_is_found_by_its_published_name(flux: LoadedModel, tmp_path: Path) -> None:
    """The published file has each weight in its place: what the names stand for is cut out of it by their rows."""
    transformer = flux.pipeline.transformer  # type: ignore[attr-defined]
    save_flux(transformer, tmp_path / "flux.safetensors")
    published, places, found = load_file(tmp_path / "flux.safetensors"), Places(flux.pipeline), set()  # type: ignore[attr-defined]
    for key, tensor in published.items():
        name, _, kind = key.rpartition(".")
        for place in places.find(f"diffusion_model.{name}"):
            rows = torch.cat([tensor[part] for part in place.rows]) if place.rows else tensor
            ours = f"{place.path}.{'weight' if kind == 'scale' else kind}"
            assert torch.equal(rows, transformer.state_dict()[ours])
            found.add(ours)
    assert found == transformer.state_dict().keys()


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


def test_layers_whose_weights_are_kept_in_float8(flux_spec: ModelSpec, tmp_path: Path) -> None:
    """diffusers' layerwise casting: what a LoRA or a DoRA adds is what it adds to the weights as they are kept."""
    pipeline: Any = FLUX.load(flux_spec, "cpu").pipeline
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    path = "transformer_blocks.0.attn.to_q"
    module = pipeline.transformer.get_submodule(path)
    assert module.weight.dtype == torch.float8_e4m3fn
    weight = module.weight.double()
    down, up, x = torch.randn(2, 16), torch.randn(16, 2), torch.randn(3, 16)
    magnitude = torch.rand(16) + 1
    changed = weight + up.double() @ down.double()
    turned = changed * (magnitude.double() / changed.norm(dim=1))[:, None]
    pair = {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
    dora = pair | {f"transformer.{path}.lora_magnitude_vector": magnitude}
    with torch.no_grad():
        bias = module(torch.zeros(1, 16))
        for name, tensors, expected in (("lora", pair, changed), ("dora", dora, turned)):
            with applied(pipeline, [read(saved(tmp_path, name, tensors))]):
                ours = module(x)
            assert torch.allclose(ours.double(), x.double() @ expected.T + bias.double(), rtol=1e-4, atol=1e-5)


def widened(pairs: Pairs, component: str) -> Pairs:
    """The last layer of the component made for inputs twice as wide."""
    name = [name for name in pairs if name[0] == component][-1]
    up, down = pairs[name]
    return pairs | {name: (up, torch.cat([down, down], dim=1))}


def misfits(model: LoadedModel) -> dict[str, dict[str, torch.Tensor]]:
    pairs = random_pairs(model)
    denoiser = next(iter(pairs))[0]
    whole = peft_layout(pairs)
    first = next(iter(whole)).removesuffix(".lora_A.weight")
    out, inner = (whole[f"{first}.lora_{side}.weight"].shape[at] for side, at in (("B", 0), ("A", 1)))

    def pair(rank: int, out: int, inner: int) -> dict[str, torch.Tensor]:
        return {f"{first}.lora_A.weight": torch.ones(rank, inner), f"{first}.lora_B.weight": torch.ones(out, rank)}

    return {
        "other names": {key.replace("blocks", "layers"): tensor for key, tensor in whole.items()},
        "other widths": peft_layout(widened(pairs, denoiser)),
        "as many numbers in another shape": whole | pair(1, out // 2, inner * 2),
        "another component's": {"prior." + key: tensor for key, tensor in whole.items()},
        "no pairs": {"weights": torch.ones(3)},
        "half a pair": {f"{first}.lora_A.weight": torch.ones(1, inner)},
        "NaN": {key: tensor * torch.nan for key, tensor in whole.items()},
        "no rank": whole | pair(0, out, inner) | {f"{first}.alpha": torch.ones(())},
        "two alphas": whole | {f"{first}.alpha": torch.ones(2)},
        "a DoRA's norm of another width": whole | {f"{first}.dora_scale": torch.ones(3)},
        "half a LoKr": {f"{first}.lokr_w1": torch.ones(2, 2)},
        "a change of no kind": whole | {f"{first}.a1.weight": torch.ones(3, 3)},
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
    lora = saved(tmp_path, "own", peft_layout(random_pairs(sd)))
    for settings in ("[]", "{", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": {"to_q": null}}'):
        save_file({}, lora.path, metadata={"lora_adapter_metadata": settings})
        with pytest.raises(AdapterFailed, match=r"'own' cannot be used .* cannot be read"):
            sd.generate(replace(PARAMS, loras=(lora,)), NoCache(), ignore)
    whole = saved(tmp_path, "own", peft_layout(random_pairs(sd))).path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:7], b"", b"\xff" * 64, b"PK\x03\x04" + whole):
        lora.path.write_bytes(content)
        with pytest.raises(AdapterFailed, match=r"'own' cannot be used .* cannot be read"):
            sd.generate(replace(PARAMS, loras=(lora,)), NoCache(), ignore)
