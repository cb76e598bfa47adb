"""Attention kernels: detected without an import, put into every network for one run, and gone without a trace.

The packages need a GPU and compile for minutes. Here small real packages stand in for them, installed into a folder
with their metadata, with the functions' published signatures and PyTorch's attention inside.
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
from torch.nn.functional import scaled_dot_product_attention

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.acceleration import attention
from models.acceleration.attention import KERNELS, AttentionUnavailable, attending, unavailable
from models.generation import LoadedModel
from tests.models.test_generation import PARAMS, ignore, pixels

CODE = {
    # sageattention 2.2: heads above 128 raise, contiguous last dimension
    "sageattention": """
import torch
from torch.nn.functional import scaled_dot_product_attention
calls = []
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    if q.size(-1) > 128:
        raise ValueError(f"Unsupported head_dim: {q.size(-1)}")
    assert tensor_layout == "HND" and all(t.stride(-1) == 1 for t in (q, k, v)) and not kwargs
    calls.append(q.shape)
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale)
""",
    # spas_sage_attn 0.1: heads of 64 or 128, at least 128 queries
    "spas_sage_attn": """
from torch.nn.functional import scaled_dot_product_attention
calls = []
def spas_sage2_attn_meansim_topk_cuda(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        smooth_k=True, simthreshd1=-0.1, cdfthreshd=None, topk=0.35, pvthreshd=50, attention_sink=False,
        tensor_layout="HND", output_dtype=None, return_sparsity=False, return_lse=False):
    assert q.size(-2) >= 128 and q.size(-1) in (64, 128) and topk == 0.5
    calls.append(q.shape)
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
""",
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where both stand-ins can be installed; the kernels' rules allow the CPU and float32."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, kernel in KERNELS.items():
        loose = replace(kernel, devices=("cpu",), dtypes=("float32",))
        monkeypatch.setitem(attention.KERNELS, name, loose)  # type: ignore[arg-type]
    yield tmp_path
    for name in CODE:
        sys.modules.pop(name, None)


def install(folder: Path, name: str, code: str | None = None) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(CODE[name] if code is None else code)
    metadata = folder / f"{name}-2.2.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.2.0\n")


def installed(name: str) -> Any:
    return sys.modules[name]


STRATEGIES: dict[str, CacheStrategy] = {
    "none": NoCache(),
    "deepcache": DeepCache(interval=2, depth=2),
    "first_block": FirstBlockCache(threshold=0.5),
}


@pytest.mark.parametrize(
    ("family", "cache"), [("sd", "none"), ("sd", "deepcache"), ("flux", "none"), ("flux", "first_block")]
)
def test_sage_computes_every_call_under_every_cache_and_is_gone_afterwards(
    family: str, cache: str, packages: Path, request: pytest.FixtureRequest
) -> None:
    install(packages, "sageattention")
    model: LoadedModel = request.getfixturevalue(family)
    params, strategy = replace(PARAMS, attention="sdpa"), STRATEGIES[cache]
    before = model.generate(params, strategy, ignore)
    assert before.attention == "sdpa"
    assert "sageattention" not in sys.modules, "it is looked for without an import"
    swapped = model.generate(replace(params, attention="sage"), strategy, ignore)
    assert (swapped.attention, swapped.warnings) == ("sage", before.warnings)
    assert len(installed("sageattention").calls) > 0
    assert swapped.reports[0].decisions == before.reports[0].decisions
    difference = pixels(swapped.images).astype(int) - pixels(before.images)
    assert np.abs(difference).max() <= 1, "the same sums over tensors laid out otherwise"
    count = len(installed("sageattention").calls)
    after = model.generate(params, strategy, ignore)
    assert np.array_equal(pixels(after.images), pixels(before.images))
    assert len(installed("sageattention").calls) == count


def test_a_changed_kernel_changes_the_picture(packages: Path, sd: LoadedModel) -> None:
    """So that the test above cannot pass by an idle swap."""
    install(packages, "sageattention", CODE["sageattention"].replace("return scaled", "return 2 * scaled"))
    plain = sd.generate(replace(PARAMS, attention="sdpa"), NoCache(), ignore)
    doubled = sd.generate(replace(PARAMS, attention="sage"), NoCache(), ignore)
    assert not np.array_equal(pixels(plain.images), pixels(doubled.images))


def test_auto_takes_the_first_kernel_that_can_run(packages: Path, sd: LoadedModel) -> None:
    assert sd.generate(PARAMS, NoCache(), ignore).attention == "sdpa"
    install(packages, "spas_sage_attn")
    large = replace(PARAMS, width=128, height=128, seeds=(7,))  # 16 x 16 latents: 256 tokens in the outer level
    assert sd.generate(large, NoCache(), ignore).attention == "sparge"
    assert all(shape[-2] >= 128 for shape in installed("spas_sage_attn").calls)
    assert all(shape[-1] == 64 for shape in installed("spas_sage_attn").calls), "heads of 4 are padded to 64"
    install(packages, "sageattention")
    assert sd.generate(large, NoCache(), ignore).attention == "sage"


def test_sparge_leaves_short_sequences_to_pytorch_and_says_so_when_asked_by_name(
    packages: Path, sd: LoadedModel
) -> None:
    install(packages, "spas_sage_attn")
    large = replace(PARAMS, width=128, height=128, seeds=(7,))
    plain = sd.generate(replace(large, attention="sdpa"), NoCache(), ignore)
    sparse = sd.generate(replace(large, attention="sparge"), NoCache(), ignore)
    difference = pixels(sparse.images).astype(int) - pixels(plain.images)
    assert np.abs(difference).max() <= 1, "padding adds zeros to sums, and the scale is the heads' own"
    (sentence,) = sparse.warnings
    assert sentence.startswith("SpargeAttn computed ")
    assert "PyTorch's own" in sentence
    small = sd.generate(replace(PARAMS, attention="sparge"), NoCache(), ignore)
    assert small.attention == "sdpa"
    assert small.warnings[0].startswith("SpargeAttn computed 0 of ")


def test_calls_that_a_kernel_cannot_take_run_on_pytorchs_own(packages: Path) -> None:
    install(packages, "sageattention")
    query = torch.randn(1, 2, 5, 160)  # SD1.5's inner level
    short = torch.randn(1, 2, 5, 40)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with attending("sage", "cpu", "float32") as used:
        wide = scaled_dot_product_attention(query, query, query)
        masked = scaled_dot_product_attention(short, short, short, attn_mask=mask)
        causal = scaled_dot_product_attention(short, short, short, is_causal=True)
        scaled = scaled_dot_product_attention(short, short, short, scale=0.5)
    assert (used.swapped, used.left) == (1, 3)
    assert "computed 1 of 4 attention calls" in used.warnings[0]
    assert torch.equal(wide, scaled_dot_product_attention(query, query, query))
    assert torch.equal(masked, causal)
    assert torch.equal(scaled, scaled_dot_product_attention(short, short, short, scale=0.5))


def test_a_run_that_fails_takes_the_kernel_out_too(packages: Path) -> None:
    install(packages, "sageattention")
    tensor = torch.randn(1, 1, 4, 8)
    with pytest.raises(KeyError), attending("sage", "cpu", "float32"):
        raise KeyError
    scaled_dot_product_attention(tensor, tensor, tensor)
    assert installed("sageattention").calls == []


def test_a_package_that_cannot_be_imported_is_named_or_passed_over(packages: Path, sd: LoadedModel) -> None:
    install(packages, "sageattention", "raise ImportError('undefined symbol')")
    with pytest.raises(AttentionUnavailable, match=r"cannot be imported \(undefined symbol\). Build it again"):
        sd.generate(replace(PARAMS, attention="sage"), NoCache(), ignore)
    assert sd.generate(PARAMS, NoCache(), ignore).attention == "sdpa"


@pytest.mark.parametrize("name", KERNELS)
def test_what_stands_in_the_way_is_said_with_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable(name, "cpu", "float32") is not None
    reason = str(unavailable(name, "cpu", "float16"))
    assert "not installed: pip install" in reason
    assert "this server's device is cpu" in reason
    monkeypatch.setattr(attention, "installed", lambda kernel: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8." in str(unavailable(name, "cuda:0", "float16"))
    assert "this GPU has 7.5" in str(unavailable(name, "cuda:0", "float16"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert unavailable(name, "cuda:0", "bfloat16") is None
    assert "this model is in float32" in str(unavailable(name, "cuda:0", "float32"))
