"""Writes the LoRAs and embeddings of `files.py` at the width of a small model, and merges them by hand.

The formulas stand here in numpy and float64, apart from those of `models/adapters/algebra.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tests.compatibility.embedding_files import EmbeddingRow
from tests.compatibility.lora_files import LoraRow

Arrays = dict[str, np.ndarray]
RANK = 4
STRENGTH = 2.0  # of a change, beside the weight that it changes
SPLIT = {"lora_down.weight", "lora_up.weight"}
SETTINGS = {"unet": 8.0, "attn2.to_k": 2.0, "text_encoder": 6.0}  # as in files.SETTINGS


def parts_of(algebra: str, weight: np.ndarray, rng: np.random.Generator) -> Arrays:
    """Random parts for a weight (out, in, …); what they make of it is STRENGTH times as large."""
    out, inner, *window = weight.shape if weight.ndim > 1 else (*weight.shape, 1)
    flat = inner * int(np.prod(window))

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    lora = {"lora_down.weight": normal(RANK, inner, *window), "lora_up.weight": normal(out, RANK, *[1] * len(window))}
    core = {f"hada_t{number}": normal(RANK, RANK, *window) for number in "12"}
    lokr = {"lokr_w1": normal(2, 2), "lokr_w2": normal(out // 2, inner // 2, *window)}
    match algebra.split():
        case ["mid"]:
            down = normal(RANK, inner, *[1] * len(window))
            parts = {**lora, "lora_down.weight": down, "lora_mid.weight": normal(RANK, RANK, *window)}
        case ["loha"]:
            parts = {
                f"hada_w{n}_{ab}": normal(*shape)
                for n in "12"
                for ab, shape in (("a", (out, RANK)), ("b", (RANK, flat)))
            }
        case ["loha", "tucker"]:
            factors = {f"hada_w{n}_{ab}": normal(RANK, size) for n in "12" for ab, size in (("a", out), ("b", inner))}
            parts = {**factors, **core}
        case ["lokr"]:
            parts = lokr
        case ["lokr", "low-rank"]:
            parts = {"lokr_w1_a": normal(2, 1), "lokr_w1_b": normal(1, 2)}
            parts |= {"lokr_w2_a": normal(out // 2, RANK), "lokr_w2_b": normal(RANK, flat // 2)}
        case ["lokr", "tucker"]:
            parts = {"lokr_w1": lokr["lokr_w1"], "lokr_w2_a": normal(RANK, out // 2)}
            parts |= {"lokr_w2_b": normal(RANK, inner // 2), "lokr_t2": normal(RANK, RANK, *window)}
        case ["oft", *rescaled]:
            parts = {"oft_blocks": normal(out // 4, 4, 4) * 0.2}
            if rescaled:
                parts["rescale"] = 1 + 0.2 * normal(out, *[1] * (weight.ndim - 1))
            return parts
        case ["boft"]:
            return {"oft_blocks": normal(2, out // 4, 4, 4) * 0.2}
        case ["whole" | "norm" as kind]:
            names = ("diff", "diff_b") if kind == "whole" else ("w_norm", "b_norm")
            return {names[0]: normal(*weight.shape) * np.sqrt((weight**2).mean()), names[1]: normal(out) * 0.1}
        case _:
            parts = lora
    first = next(name for name in ("lora_up.weight", "hada_w1_a", "lokr_w2", "lokr_w2_a") if name in parts)
    parts[first] = parts[first] * STRENGTH * np.linalg.norm(weight) / np.linalg.norm(change(parts, None, weight))
    if algebra.startswith("dora"):
        axis = 1 if algebra.endswith("input") else 0
        norm = norms(weight + change(parts, None, weight), axis)
        parts["dora_scale"] = norm * (1 + 0.2 * normal(*norm.shape))
    return parts


def norms(weight: np.ndarray, axis: int) -> np.ndarray:
    """Of each output (axis 0) or input (axis 1), with as many axes as the weight."""
    others = tuple(one for one in range(weight.ndim) if one != axis)
    lengths: np.ndarray = np.sqrt((weight**2).sum(axis=others, keepdims=True))
    return lengths


def change(parts: Mapping[str, np.ndarray], alpha: float | None, weight: np.ndarray) -> np.ndarray:
    """ΔW by hand."""
    delta = _change(parts, alpha, weight).reshape(weight.shape)
    if (magnitude := parts.get("dora_scale")) is None:
        return delta
    axis = 1 if magnitude.shape[0] == 1 else 0
    decomposed = (weight + delta) / norms(weight + delta, axis)
    return decomposed * magnitude.reshape([-1 if one == axis else 1 for one in range(weight.ndim)]) - weight


def _change(parts: Mapping[str, np.ndarray], alpha: float | None, weight: np.ndarray) -> np.ndarray:
    def scale(rank: int) -> float:
        return 1.0 if alpha is None else alpha / rank

    if "lora_down.weight" in parts:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        up, rank = up.reshape(len(up), -1), len(down)
        if "lora_mid.weight" in parts:
            product = np.einsum("oa,abxy,bi->oixy", up, parts["lora_mid.weight"], down.reshape(rank, -1))
        else:
            product = up @ down.reshape(rank, -1)
        return product * scale(rank)
    if "hada_w1_a" in parts:
        sides = []
        for number in "12":
            a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
            core = parts.get(f"hada_t{number}")
            sides.append(a @ b if core is None else np.einsum("ao,abxy,bi->oixy", a, core, b))
        return sides[0] * sides[1] * scale(RANK)
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_w2" in parts:
            return np.kron(one.reshape(2, 2, *[1] * (parts["lokr_w2"].ndim - 2)), parts["lokr_w2"])
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        if "lokr_t2" in parts:
            other = np.einsum("ao,abxy,bi->oixy", a, parts["lokr_t2"], b)
            return np.kron(one[:, :, None, None], other) * scale(RANK)
        return np.kron(one, a @ b) * scale(RANK)
    if "oft_blocks" in parts:
        return turned(parts["oft_blocks"], alpha or 0.0, weight) * parts.get("rescale", 1.0) - weight
    return parts["diff"] if "diff" in parts else parts["w_norm"]


def turned(blocks: np.ndarray, constraint: float, weight: np.ndarray) -> np.ndarray:
    skewed = blocks - blocks.swapaxes(-1, -2)
    if constraint:
        skewed = skewed * min(1.0, constraint * len(weight) / np.sqrt((skewed**2).sum()))
    identity, size = np.eye(blocks.shape[-1]), blocks.shape[-1]
    rows = weight.reshape(len(weight), -1)
    if blocks.ndim == 3:
        done = [
            ((identity + q) @ np.linalg.inv(identity - q)).T @ rows[at * size : (at + 1) * size]
            for at, q in enumerate(skewed)
        ]
        return np.concatenate(done).reshape(weight.shape)
    for level, factor in enumerate(skewed):  # a butterfly: rows that lie 2^level · size / 2 apart are turned together
        stride = 2**level * size // 2
        order = [
            base + step + half * stride
            for base in range(0, len(rows), 2 * stride)
            for step in range(stride)
            for half in (0, 1)
        ]
        after = rows.copy()
        for at, q in enumerate(factor):
            mine = order[at * size : (at + 1) * size]
            after[mine] = (identity + q) @ np.linalg.inv(identity - q) @ rows[mine]
        rows = after
    return rows.reshape(weight.shape)


class Written:
    """A row's file for a model: its tensors, and what the trainer's matrices add to each layer by hand."""

    def __init__(self, row: LoraRow, pipeline: Any) -> None:
        rng = np.random.default_rng(0)
        dtype = getattr(torch, row.dtype)
        self.tensors = {key: torch.ones(shape, dtype=dtype) for key, shape in row.odd.items()}
        self.changes: list[tuple[Any, np.ndarray, np.ndarray | None]] = []
        for index, (name, targets) in enumerate(row.layers.items()):
            swapped = targets.startswith("swapped:")
            pairs = [target.split(":") for target in targets.removeprefix("swapped:").split()]
            modules = [_module(getattr(pipeline, component), path) for component, path in pairs]
            whole = np.concatenate([module.weight.detach().double().numpy() for module in modules])
            whole = np.roll(whole, len(whole) // 2, axis=0) if swapped else whole
            text = pairs[0][0].startswith("text")
            alpha, saved = self._alpha(row, index, name, pairs[0][0])
            parts = {}
            made = parts_of(row.algebra, whole, rng)
            if modules[0].bias is None:
                made.pop("diff_b", None)
            for part, array in made.items():
                array = array.reshape(-1) if row.suffixes[0].get("dora_scale") and part == "dora_scale" else array
                tensor = torch.from_numpy(array).to(dtype)
                self.tensors[f"{name}.{row.suffixes[text].get(part, part)}"] = tensor
                parts[part] = tensor.double().numpy()
            if saved:
                self.tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
            delta = change(parts, alpha, whole)
            bias = next((parts[part] for part in ("diff_b", "b_norm") if part in parts), None)
            delta = np.roll(delta, len(delta) // 2, axis=0) if swapped else delta
            ends = np.cumsum([len(module.weight) for module in modules])[:-1]
            for module, rows in zip(modules, np.split(delta, ends), strict=True):
                self.changes.append((module, rows, bias))

    def _alpha(self, row: LoraRow, index: int, name: str, component: str) -> tuple[float | None, bool]:
        """The layer's alpha, and whether it stands beside its matrices."""
        if row.algebra == "lora settings":
            return SETTINGS.get(next((end for end in SETTINGS if name.endswith(end)), component)), False
        if row.algebra.startswith("oft") or row.algebra == "boft":
            return (0.0 if "rescaled" in row.algebra else 0.01), True
        if (row.suffixes[0] and row.algebra != "lora alpha") or row.algebra in ("whole", "norm"):
            return None, False
        return float(1 + index % 4), True


def _module(network: Any, path: str) -> Any:
    """transformers 5 has dropped the level `text_model` of some encoders."""
    return network.get_submodule(path if not hasattr(network, "text_model") else f"text_model.{path}")


def vectors(row: EmbeddingRow, pipeline: Any, word: str) -> dict[str, torch.Tensor]:
    """Those of the tokens of a word that the model knows, so that the picture is that word's; else random ones."""
    made = {}
    encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
    if hasattr(pipeline, "tokenizer_2"):
        encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    for (key, (count, width)), (tokenizer, model) in zip(row.tensors.items(), encoders * 2, strict=False):
        table = model.get_input_embeddings().weight.detach()
        known = table[tokenizer(word[:count]).input_ids[1:-1]]
        assert len(known) == count
        made[key] = (torch.ones(count, width) if width else known).to(getattr(torch, row.dtype))
    return made
