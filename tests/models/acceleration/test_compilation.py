"""Compiled layers: the same pictures within rounding, under every cache, and the bytes of before when they are off.

Most tests compile with `eager`, where it is dynamo's doing alone: it traces and guards as for the default. One compiles
with `aot_eager`, which leaves out code generation only; one runs the default, Inductor, on a single layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from cache import DeepCache, FirstBlockCache, NoCache
from models.acceleration import compilation
from models.acceleration.compilation import CompilationFailed, CompiledLayers
from models.base import ModelSpec, Step
from models.errors import GenerationCancelled
from models.families.flux import FLUX
from models.families.sd import SD
from models.generation import LoadedModel
from tests.models.adapters.test_lora import peft_layout, random_pairs, saved
from tests.models.conftest import BETAS, TWO_LEVELS, save_sd
from tests.models.test_generation import PARAMS, ignore, pixels

COMPILED = replace(PARAMS, compiled=True, seeds=(7,), steps=4)
PLAIN = replace(COMPILED, compiled=False)
WIDE = replace(COMPILED, width=128)


def load(folder: Path, backend: Any = "aot_eager") -> Any:
    """A model of the caller's own: its compiled layers are kept with it."""
    loaded: Any = LoadedModel(SD.load(ModelSpec(name="random-sd", family="sd", source=folder), "cpu"))
    loaded.model.compile_backend = backend
    return loaded


@pytest.fixture(scope="module")
def model(small_folders: dict[str, Path]) -> Any:
    torch._dynamo.reset()
    return load(small_folders["epsilon"])


@pytest.fixture(scope="module")
def one_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half the layers of the small models: for tests that compile most of what they run."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = {**TWO_LEVELS, **blocks, "block_out_channels": (8,)}
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    torch.manual_seed(3)
    return save_sd(tmp_path_factory.mktemp("one") / "level", unet, {}, scheduler)


@pytest.fixture(scope="module")
def traced(one_level: Path) -> Any:
    """For what dynamo decides, whatever compiles behind it: "eager" leaves the operations as they are, and the bits."""
    return load(one_level, "eager")


@pytest.fixture(scope="module")
def wide(one_level: Path) -> Any:
    """Another one, which draws WIDE and nothing else."""
    return load(one_level, "eager")


@pytest.fixture(autouse=True)
def _counted() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "strategy", [NoCache(), DeepCache(interval=2, depth=2), DeepCache(interval=2, depth=12)], ids=str
)
def test_compiled_pictures_are_the_plain_ones_and_off_again_the_same_bytes(model: Any, strategy: Any) -> None:
    before = model.generate(PLAIN, strategy, ignore)
    compiled = model.generate(COMPILED, strategy, ignore)
    assert compiled.reports[0].decisions == before.reports[0].decisions
    # aot_eager decomposes some operations into others: float32 rounding, four steps of it.
    difference = pixels(compiled.images).astype(int) - pixels(before.images)
    assert np.abs(difference).max() <= 1
    after = model.generate(PLAIN, strategy, ignore)
    assert np.array_equal(pixels(after.images), pixels(before.images))
    assert (before.timings.compile_seconds, after.timings.compile_seconds) == (0.0, 0.0)


def test_the_reuse_pass_runs_the_same_compiled_layers(traced: Any) -> None:
    """Nothing is compiled anew for a cache: its pass is a choice among the layers."""
    traced.generate(COMPILED, NoCache(), ignore)
    torch._dynamo.utils.counters.clear()
    cached = traced.generate(COMPILED, DeepCache(interval=2, depth=1), ignore)
    assert cached.reports[0].decisions == "CRCR"
    assert cached.reports[0].settings["branch"] == 0
    assert graphs() == 0
    assert cached.timings.compile_seconds == 0.0


def test_compiling_is_timed_apart_and_happens_once_a_shape(wide: Any) -> None:
    first = wide.generate(WIDE, NoCache(), ignore)
    assert first.timings.compile_seconds > 0
    assert first.timings.denoise_seconds > 0
    assert graphs() >= len(CompiledLayers(wide.denoiser)) // 2
    again = wide.generate(WIDE, NoCache(), ignore)
    assert again.timings.compile_seconds == 0.0
    assert np.array_equal(pixels(again.images), pixels(first.images))


def test_a_picture_does_not_depend_on_the_shapes_before_it(traced: Any, wide: Any) -> None:
    """torch would compile for any shape once it has seen two; then history would show in the last bits."""
    traced.generate(COMPILED, NoCache(), ignore)
    after_others, alone = (one.generate(WIDE, NoCache(), ignore) for one in (traced, wide))
    assert np.array_equal(pixels(after_others.images), pixels(alone.images))


def test_a_cancel_leaves_the_layers_as_they_were(traced: Any) -> None:
    def stop(step: Step) -> None:
        raise GenerationCancelled

    attributes = {name: set(module.__dict__) for name, module in traced.denoiser.root.named_modules()}
    with pytest.raises(GenerationCancelled):
        traced.generate(COMPILED, DeepCache(), stop)
    assert {name: set(module.__dict__) for name, module in traced.denoiser.root.named_modules()} == attributes
    assert traced.generate(COMPILED, DeepCache(), ignore).images


def test_another_attention_kernel_composes(traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models.acceleration.test_attention import CODE, KERNELS, attention, install

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(  # type: ignore[misc]
        attention.KERNELS, "sage", replace(KERNELS["sage"], devices=("cpu",), dtypes=("float32",))
    )
    install(tmp_path, "sageattention", CODE["sageattention"])
    plain = traced.generate(replace(PLAIN, attention="sdpa"), DeepCache(interval=2), ignore)
    try:
        both = traced.generate(replace(COMPILED, attention="sage"), DeepCache(interval=2), ignore)
        assert graphs() > 0
        torch._dynamo.utils.counters.clear()
        again = traced.generate(replace(COMPILED, attention="sage"), DeepCache(interval=2), ignore)
        assert (graphs(), again.timings.compile_seconds) == (0, 0.0)
        assert np.array_equal(pixels(again.images), pixels(both.images))
    finally:
        sys.modules.pop("sageattention", None)
    assert both.attention == "sage"
    difference = pixels(both.images).astype(int) - pixels(plain.images)
    assert np.abs(difference).max() <= 1
    without = traced.generate(replace(COMPILED, attention="sdpa"), DeepCache(interval=2), ignore)
    assert without.attention == "sdpa"


def test_a_lora_composes_and_is_gone_afterwards(traced: Any, tmp_path: Path) -> None:
    before = traced.generate(COMPILED, DeepCache(interval=2), ignore)
    added = (saved(tmp_path, "style", peft_layout(random_pairs(traced))),)
    plain = traced.generate(replace(PLAIN, loras=added), DeepCache(interval=2), ignore)
    both = traced.generate(replace(COMPILED, loras=added), DeepCache(interval=2), ignore)
    assert np.array_equal(pixels(both.images), pixels(plain.images))
    assert not np.array_equal(pixels(both.images), pixels(before.images))
    after = traced.generate(COMPILED, DeepCache(interval=2), ignore)
    assert np.array_equal(pixels(after.images), pixels(before.images))


@pytest.fixture(scope="module")
def transformer(flux_folder: Path) -> Any:
    loaded: Any = LoadedModel(FLUX.load(ModelSpec(name="random-flux", family="flux", source=flux_folder), "cpu"))
    loaded.model.compile_backend = "eager"
    return loaded


def test_blocks_are_compiled_once_over_requests_of_differing_thresholds(transformer: Any) -> None:
    counts, decisions = [], []
    for threshold in (0.02, 0.3, 0.9):
        torch._dynamo.utils.counters.clear()
        strategy = FirstBlockCache(threshold=threshold)
        compiled = transformer.generate(COMPILED, strategy, ignore)
        counts.append(graphs())
        plain = transformer.generate(PLAIN, strategy, ignore)
        assert np.array_equal(pixels(compiled.images), pixels(plain.images))
        assert compiled.reports[0].decisions == plain.reports[0].decisions
        decisions.append(plain.reports[0].decisions)
    assert 0 < counts[0] < sum(map(len, transformer.denoiser.blocks)), "blocks of one class share what is compiled"
    assert counts[1:] == [0, 0]
    assert len(set(decisions)) > 1, "the thresholds are told apart"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_blocks_see_a_lora_and_its_end(transformer: Any, tmp_path: Path) -> None:
    strategy = FirstBlockCache(threshold=0.3)
    before = transformer.generate(COMPILED, strategy, ignore)
    added = (saved(tmp_path, "style", peft_layout(random_pairs(transformer))),)
    plain = transformer.generate(replace(PLAIN, loras=added), strategy, ignore)
    both = transformer.generate(replace(COMPILED, loras=added), strategy, ignore)
    assert np.array_equal(pixels(both.images), pixels(plain.images))
    assert not np.array_equal(pixels(both.images), pixels(before.images))
    torch._dynamo.utils.counters.clear()
    again = transformer.generate(replace(COMPILED, loras=(replace(added[0], weight=0.5),)), strategy, ignore)
    assert graphs() == 0
    assert not np.array_equal(pixels(again.images), pixels(both.images))
    after = transformer.generate(COMPILED, strategy, ignore)
    assert np.array_equal(pixels(after.images), pixels(before.images))


def test_a_compiler_that_fails_is_a_sentence_and_leaves_no_trace(small_folders: dict[str, Path]) -> None:
    def broken(graph: object, inputs: object) -> Any:
        raise RuntimeError("ld: cannot find -lgomp")

    loaded = load(small_folders["epsilon"], broken)
    before = loaded.generate(PLAIN, NoCache(), ignore)
    with pytest.raises(CompilationFailed, match="Leave it out"):
        loaded.generate(COMPILED, NoCache(), ignore)
    assert np.array_equal(pixels(loaded.generate(PLAIN, NoCache(), ignore).images), pixels(before.images))


def test_what_stands_in_the_way_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert compilation.unavailable("cpu", None) is None
    assert "offloaded layer by layer" in str(compilation.unavailable("cpu", "sequential"))
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    assert "install g++" in str(compilation.unavailable("cpu", None))
    assert "kept in fp8" in str(compilation.unavailable("cpu", None, "fp8"))
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert "triton" in str(compilation.unavailable("cuda:0", None))


@pytest.mark.skipif(compilation.unavailable("cpu", None) is not None, reason="no C++ compiler")
def test_the_default_compiler_runs_on_a_layer_of_a_unet(model: Any) -> None:
    whole = CompiledLayers(model.denoiser)
    layer = model.denoiser.root.get_submodule("up_blocks.0.upsamplers.0")
    whole._forwards = [(one, compiled) for one, compiled in whole._forwards if one is layer]
    inputs = (torch.randn(1, 16, 4, 4),)
    # What another run compiled is not asked for: it may have been told of another processor (ATEN_CPU_CAPABILITY).
    # Neither are processes that compile ahead, nor what vectors this processor has: a torch is imported for each.
    quick = {"compile_threads": 1, "cpp.vec_isa_ok": False}
    with (
        torch.no_grad(),
        torch._inductor.config.patch(cpp_cache_precompile_headers=False, fx_graph_cache=False, **quick),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        plain = layer(*inputs)
        with whole.attached() as built:
            compiled = layer(*inputs)
    assert built.seconds > 0
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
