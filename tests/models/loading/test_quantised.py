"""Small weights: each kind against the numbers that it stands for, put into a plain network by hand."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cache import DeepCache, FirstBlockCache, NoCache
from models.base import LoadHooks, ModelSpec
from models.errors import LoadFailed
from models.families import FAMILIES
from models.generation import LoadedModel
from models.loading import gguf, quantised
from models.loading.footprint import network_bytes
from models.tuning.nearness import psnr
from tests.models import original
from tests.models.adapters.test_lora import peft_layout, random_pairs, saved
from tests.models.conftest import TEXT_WIDTH
from tests.models.loading.quantising import Tensors, narrow_flux, save_gguf, save_scaled
from tests.models.test_generation import PARAMS as FOUR_STEPS
from tests.models.test_generation import ignore, pixels

WIDTH = 32  # a block of GGUF's
PARAMS = replace(FOUR_STEPS, steps=4, guidance_scale=1.0)


@pytest.fixture(scope="module")
def whole(family_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux pipeline whose rows fill GGUF's blocks."""
    folder = tmp_path_factory.mktemp("flux") / "whole"
    shutil.copytree(family_folders["flux-dev"], folder)
    torch.manual_seed(5)
    FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def published(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """Its transformer under the published names."""
    file = tmp_path_factory.mktemp("published") / "flux.safetensors"
    transformer: Any = FluxTransformer2DModel.from_pretrained(whole / "transformer")
    original.save_flux(transformer, file)
    return load_file(file)


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with narrow_flux(WIDTH):
        yield


def load(spec: ModelSpec) -> Any:
    return LoadedModel(FAMILIES[spec.family].load(spec, "cpu"))


def flux(file: Path, whole: Path, **changes: Any) -> ModelSpec:
    return ModelSpec(name="small", family="flux-dev", source=file, config=whole, **changes)


def by_hand(meant: Tensors, whole: Path, tmp_path: Path) -> Any:
    """The pipeline with a plain transformer of these numbers."""
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, tmp_path / "meant.safetensors")
    return load(flux(tmp_path / "meant.safetensors", whole))


def draws_the_same(one: Any, other: Any, params: Any = PARAMS, levels: int = 1) -> None:
    """Without a cache and with the family's own, which has to reuse something."""
    strategy = FirstBlockCache(threshold=0.5) if hasattr(one.pipeline, "transformer") else DeepCache(interval=2)
    for cache in (NoCache(), strategy):
        drawn, expected = (model.generate(params, cache, ignore) for model in (one, other))
        difference = pixels(drawn.images).astype(int) - pixels(expected.images)
        assert np.abs(difference).max() <= levels
        assert drawn.reports[0].decisions == expected.reports[0].decisions
    assert drawn.reports[0].reused > 0
    assert pixels(drawn.images).std() > 0


# --- GGUF


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16"])
def test_gguf_draws_what_its_numbers_draw(kind: str, published: Tensors, whole: Path, tmp_path: Path) -> None:
    prefix = quantised.PREFIX if kind in ("Q8_0", "Q4_1") else ""
    meant = save_gguf(published, tmp_path / "flux.gguf", kind, prefix)
    model = load(flux(tmp_path / "flux.gguf", whole))
    layer = model.denoiser.root.transformer_blocks[0].attn.to_q
    assert type(layer).__name__ == "GGUFLinear"
    draws_the_same(model, by_hand(meant, whole, tmp_path))


def test_gguf_with_rows_that_fill_no_block(family_folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a UNet 8 to 16 wide: its matrices are cut into other rows, as ComfyUI-GGUF cuts SDXL's."""
    source = family_folders["sd15"]
    unet: Any = UNet2DConditionModel.from_pretrained(source / "unet")
    attends = ["Cross" in block for block in unet.config.up_block_types]
    tensors = {original.unet_name(key, 2, attends): value for key, value in unet.state_dict().items()}
    meant = save_gguf(tensors, tmp_path / "unet.gguf", "Q8_0")
    model = load(ModelSpec(name="unet", family="sd15", source=tmp_path / "unet.gguf", config=source))
    plain = load(ModelSpec(name="plain", family="sd15", source=source))
    names = {key: original.unet_name(key, 2, attends) for key in unet.state_dict()}
    plain.pipeline.unet.load_state_dict({key: meant[name] for key, name in names.items()})
    draws_the_same(model, plain, replace(PARAMS, guidance_scale=3.0))


def test_a_header_says_what_was_written(published: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "flux.gguf"
    save_gguf(published, file, "Q4_0")
    header = gguf.read_header(file)
    assert {name: info.shape for name, info in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in published.items()
    }
    reader = package.GGUFReader(file)
    assert {name: (info.dtype, info.bytes) for name, info in header.items()} == {
        tensor.name: (tensor.tensor_type.name, tensor.n_bytes) for tensor in reader.tensors
    }
    assert {"Q4_0", "F32"} == {info.dtype for info in header.values()}


def test_the_readable_kinds_are_those_of_diffusers() -> None:
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    assert {"F32", "F16"} | {kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES} == gguf.READABLE


def test_a_quantisation_that_nobody_reads_here_is_named(published: Tensors, whole: Path, tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "odd.gguf", "flux")
    kind = package.GGMLQuantizationType.IQ1_S
    numbers, size = package.GGML_QUANT_SIZES[kind]
    writer.add_tensor("double_blocks.0.img_mlp.0.weight", np.zeros((4, size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf.read_header(tmp_path / "odd.gguf")["double_blocks.0.img_mlp.0.weight"].shape == (4, numbers)
    with pytest.raises(LoadFailed, match=r"img_mlp.0.weight as IQ1_S, which is not supported. Take a file of one of"):
        load(flux(tmp_path / "odd.gguf", whole))
    content = (tmp_path / "odd.gguf").read_bytes()
    marked = struct.pack("<IQ", kind, 0)
    (tmp_path / "odd.gguf").write_bytes(content.replace(marked, struct.pack("<IQ", 200, 0)))
    with pytest.raises(LoadFailed, match=r"is of type 200, which is no type of ggml"):
        load(flux(tmp_path / "odd.gguf", whole))


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("bytes") / "two.gguf"
    tensors = {"double_blocks.0.img_mlp.0.weight": torch.randn(4, 32), "odd.weight": torch.randn(4, 24)}
    save_gguf(tensors, file, "Q8_0")
    return file.read_bytes()


@given(data=st.data())
def test_no_damage_of_a_header_is_more_than_a_sentence(
    small_gguf: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(small_gguf)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(content[:cut])
    with suppress(ValueError):
        assert sum(info.bytes for info in gguf.read_header(file).values()) <= cut


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-40], r"bytes and its header tells of"),
        (lambda content: content[:40], r"ends within its header"),
        (lambda content: b"PK\3\4" + content[4:], r"does not begin as GGUF files do"),
        (lambda content: content[:8] + struct.pack("<Q", 2**40) + content[16:], r"tells of 1099511627776 entries"),
        (lambda content: content[:24] + struct.pack("<Q", 2**40) + content[32:], r"a name of 1099511627776 bytes"),
    ],
)
def test_a_damaged_gguf_is_refused(damage: Any, reason: str, small_gguf: bytes, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(damage(small_gguf))
    with pytest.raises(LoadFailed, match=f"{reason}.*Fetch it again"):
        load(flux(tmp_path / "bad.gguf", whole))


# --- fp8


@pytest.mark.parametrize(("names", "rows"), [("old", False), ("new", False), ("new", True)])
def test_scaled_fp8_draws_what_its_numbers_draw(
    names: str, rows: bool, published: Tensors, whole: Path, tmp_path: Path
) -> None:
    meant = save_scaled(published, tmp_path / "flux.safetensors", names, rows)
    draws_the_same(load(flux(tmp_path / "flux.safetensors", whole)), by_hand(meant, whole, tmp_path), levels=0)


def test_a_scaled_checkpoint_of_all_networks(family_folders: dict[str, Path], tmp_path: Path) -> None:
    source = family_folders["sd15"]
    plain = load(ModelSpec(name="plain", family="sd15", source=source))
    original.save_stable_diffusion(plain.pipeline, tmp_path / "whole.safetensors")
    meant = save_scaled(load_file(tmp_path / "whole.safetensors"), tmp_path / "scaled.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, tmp_path / "meant.safetensors")
    one, other = (
        load(ModelSpec(name=name, family="sd15", source=tmp_path / f"{name}.safetensors", config=source))
        for name in ("scaled", "meant")
    )
    assert not torch.equal(
        one.pipeline.text_encoder.get_submodule("encoder.layers.0.mlp.fc1").weight,
        plain.pipeline.text_encoder.get_submodule("encoder.layers.0.mlp.fc1").weight,
    ), "the text encoder is in fp8 too"
    draws_the_same(one, other, replace(PARAMS, guidance_scale=3.0), levels=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_read(dtype: torch.dtype, published: Tensors, whole: Path, tmp_path: Path) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in published.items()}, tmp_path / "flux.safetensors")
    meant = {name: tensor.to(dtype).float() for name, tensor in published.items()}
    draws_the_same(load(flux(tmp_path / "flux.safetensors", whole)), by_hand(meant, whole, tmp_path), levels=0)


FC = "double_blocks.0.img_mlp.0"


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        ({f"{FC}.weight_scale_2": torch.tensor(1.0)}, rf"{FC}.weight_scale_2, a part of a quantisation"),
        ({f"{FC}.pre_quant_scale": torch.ones(4)}, rf"{FC}.pre_quant_scale"),
        ({"txt_in.scale_weight": torch.tensor(1.0)}, r"txt_in.scale_weight"),  # beside a matrix that is not in fp8
        ({f"{FC}.weight.absmax": torch.ones(4)}, rf"{FC}.weight.absmax"),
        ({"txt_in.weight": torch.zeros(4, 4, dtype=torch.int8)}, r"txt_in.weight"),
        ({f"{FC}.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)}, rf"{FC}.comfy_quant"),
        ({f"{FC}.scale_weight": torch.ones(2, 3)}, r"the scale of .* shape \(2, 3\)"),
        ({f"{FC}.scale_weight": torch.ones(1, 4 * WIDTH)}, r"the scale of .* shape \(1, 128\)"),
        ({f"{FC}.scale_weight": torch.ones(1, dtype=torch.uint8)}, r"the scale of .* torch.uint8"),
    ],
)
def test_what_other_quantisers_leave_is_refused_by_name(
    added: Tensors, reason: str, published: Tensors, whole: Path, tmp_path: Path
) -> None:
    save_scaled(published, tmp_path / "flux.safetensors")
    save_file(load_file(tmp_path / "flux.safetensors") | added, tmp_path / "flux.safetensors")
    with pytest.raises(LoadFailed, match=reason):
        load(flux(tmp_path / "flux.safetensors", whole))


# --- what a network is kept in


def sizes(network: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux-dev"])
def test_weights_kept_in_fp8_draw_what_they_draw_in_float32(family: str, family_folders: dict[str, Path]) -> None:
    spec = ModelSpec(name="mine", family=family, source=family_folders[family])
    kept, plain = load(replace(spec, quantization="fp8")), load(spec)
    networks = [name for name in ("unet", "transformer", "text_encoder_2") if hasattr(kept.pipeline, name)]
    networks = [name for name in networks if name != "text_encoder_2" or family.startswith("flux")]
    for name in networks:
        small, wide = getattr(kept.pipeline, name), getattr(plain.pipeline, name)
        wide.load_state_dict({key: tensor.float() for key, tensor in small.state_dict().items()})
        matrices = [key for key, tensor in small.named_parameters() if tensor.dtype == torch.float8_e4m3fn]
        assert len(matrices) >= 10
        assert sizes(small) < 0.6 * sizes(wide)
    # DeepCache's own measure of a UNet and the sampler know nothing of it.
    draws_the_same(kept, plain, replace(PARAMS, guidance_scale=3.0), levels=0)


def test_the_file_of_a_small_network_is_counted_as_it_is_kept(whole: Path) -> None:
    heard: list[int] = []
    spec = ModelSpec(name="mine", family="flux-dev", source=whole, quantization="fp8")
    model = FAMILIES["flux-dev"].load(spec, "cpu", LoadHooks(room=heard.append))
    parts = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert sum(heard) == pytest.approx(sum(map(sizes, parts)), rel=0.03)
    assert network_bytes(whole, 2, {"transformer": "nf4"})["transformer"] < network_bytes(whole, 2)["transformer"] / 2


@pytest.mark.parametrize(
    ("quantization", "device", "reason"),
    [
        ("int8", "cpu", "needs the package torchao: pip install .[int8]."),
        ("nf4", "cuda", "needs the package bitsandbytes: pip install .[nf4]."),
    ],
)
def test_a_package_that_is_missing_is_said(
    quantization: Any, device: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    assert quantised.unavailable("fp8", device) is None
    assert reason in str(quantised.unavailable(quantization, device))


def test_nf4_needs_a_gpu(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: object())
    with pytest.raises(LoadFailed, match="'nf4' needs a CUDA GPU and this server's device is cpu: take 'int8' or"):
        load(ModelSpec(name="mine", family="sd", source=sd_folder, quantization="nf4"))


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao, an extra, is not installed")
@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_int8_draws_what_its_numbers_draw(whole: Path) -> None:
    spec = ModelSpec(name="mine", family="flux-dev", source=whole)
    kept, plain = load(replace(spec, quantization="int8")), load(spec)
    for name in ("transformer", "text_encoder_2"):
        small = getattr(kept.pipeline, name)
        for path, module in getattr(plain.pipeline, name).named_modules():
            if isinstance(module, torch.nn.Linear):
                weight = small.get_submodule(path).weight
                rows = module.weight.abs().amax(1, keepdim=True) / 127.5
                assert type(weight).__name__ == "Int8Tensor"
                assert (weight.dequantize() - module.weight).abs().le(rows * 0.6).all()
                module.weight.data = weight.dequantize()
    draws_the_same(kept, plain)


# --- with LoRAs


def weights_of(kind: str, published: Tensors, whole: Path, tmp_path: Path) -> tuple[Any, Any]:
    """The model of that kind, and a plain one of the numbers that it stands for."""
    if kind == "gguf":
        meant = save_gguf(published, tmp_path / "flux.gguf", "Q8_0")
        return load(flux(tmp_path / "flux.gguf", whole)), by_hand(meant, whole, tmp_path)
    if kind == "scaled":
        meant = save_scaled(published, tmp_path / "flux.safetensors")
        return load(flux(tmp_path / "flux.safetensors", whole)), by_hand(meant, whole, tmp_path)
    spec = ModelSpec(name="mine", family="flux-dev", source=whole)
    kept, plain = load(replace(spec, quantization=kind)), load(spec)
    for name in ("transformer", "text_encoder_2"):
        state = getattr(kept.pipeline, name).state_dict().items()
        numbers = {key: tensor.dequantize() if kind == "int8" else tensor.float() for key, tensor in state}
        getattr(plain.pipeline, name).load_state_dict(numbers)
    return kept, plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "gguf",
        "scaled",
        "fp8",
        pytest.param("int8", marks=pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is an extra")),
    ],
)
def test_a_lora_on_small_weights_is_the_one_merged_by_hand(
    kind: str, published: Tensors, whole: Path, tmp_path: Path
) -> None:
    model, plain = weights_of(kind, published, whole, tmp_path)
    before = pixels(model.generate(PARAMS, NoCache(), ignore).images)
    pairs = random_pairs(plain)
    added = saved(tmp_path, "style", peft_layout(pairs))
    for (component, path), (up, down) in pairs.items():
        getattr(plain.pipeline, component).get_submodule(path).weight.data += added.weight * (up @ down)
    params = replace(PARAMS, loras=(added,))
    expected = pixels(plain.generate(PARAMS, NoCache(), ignore).images)
    drawn = model.generate(params, NoCache(), ignore)
    assert np.abs(pixels(drawn.images).astype(int) - expected).max() <= 1
    assert psnr(pixels(drawn.images), before) < 40, "the LoRA changes the picture"
    cached = model.generate(params, FirstBlockCache(threshold=0.5), ignore)
    assert cached.reports[0].reused > 0
    assert np.array_equal(pixels(model.generate(PARAMS, NoCache(), ignore).images), before)


@pytest.mark.parametrize("kind", ["gguf", "scaled"])
def test_small_weights_are_compiled_once(kind: str, published: Tensors, whole: Path, tmp_path: Path) -> None:
    model, _ = weights_of(kind, published, whole, tmp_path)
    model.model.compile_backend = "eager"
    torch._dynamo.reset()
    counts = []
    for threshold in (0.1, 0.5, 0.9):
        torch._dynamo.utils.counters.clear()
        strategy = FirstBlockCache(threshold=threshold)
        compiled = model.generate(replace(PARAMS, compiled=True), strategy, ignore)
        counts.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
        assert np.array_equal(pixels(compiled.images), pixels(model.generate(PARAMS, strategy, ignore).images))
    assert counts[0] > 0
    assert counts[1:] == [0, 0]
