"""LoRA and its kin: changes of the denoiser's and the text encoders' layers, beside them, for one request.

Every layer that a file changes is changed, or named in a warning, or the file is refused. The model's own weights are
never written to: see docs/decisions/lora-changes.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.base import Lora
from models.errors import AdapterFailed
from models.finite import is_finite
from models.libraries import first_line

from . import algebra, origin
from .names import Place, Places, shape, split

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .algebra import Parts

_BUNDLED = "bundle_emb."
_NAMED = 3  # layers in a warning
_LETTERS = 160  # of a key in a message
_RUNS = {"Linear", "Conv2d", "GroupNorm", "LayerNorm", "RMSNorm", "Embedding"}  # see `_run`
Change = Callable[["Tensor"], "Tensor"]
"""What a layer's input adds to its output."""


class LoraFailed(AdapterFailed):
    field = "loras"


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA as its file has it: the parts of each layer by the trainer's name for it, and what else it brings.

    `embeddings`: word → encoder → vectors, as AUTOMATIC1111 and OneTrainer bundle them. `unknown`: keys of what is no
    change of a layer that is known here. `settings`: PEFT's.
    """

    lora: Lora
    layers: Mapping[str, dict[str, Tensor]]
    embeddings: Mapping[str, Mapping[str, Tensor]]
    unknown: Sequence[str]
    trainer: str
    settings: Mapping[str, Any]

    def alpha(self, name: str, component: str) -> float | None:
        """The layer's own, else by PEFT's settings; None: its matrices are scaled already."""
        parts = self.layers[name]
        if (own := parts.get("alpha")) is not None:
            return float(own)
        patterns = self.settings.get(f"{component}.alpha_pattern") or {}
        default = self.settings.get(f"{component}.lora_alpha")
        alpha = next((value for path, value in patterns.items() if name.endswith(path)), default)
        rank_stabilised = self.settings.get(f"{component}.use_rslora") and "lora_down.weight" in parts
        return alpha * len(parts["lora_down.weight"]) ** 0.5 if alpha and rank_stabilised else alpha


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of a file with the model's layers that its rows belong to, one after the other."""

    parts: Parts
    alpha: float | None
    places: tuple[Place, ...]
    modules: tuple[nn.Module, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that the trainer had."""
        rows, *columns = zip(*map(shape, self.modules), strict=True)
        return sum(rows), *(column[0] for column in columns)

    def weight(self, device: torch.device) -> Tensor:
        """That weight, put together again; without numbers where no part asks for them."""
        import torch

        if not algebra.reads_weight(self.parts):
            return torch.empty(self.shape, device="meta")
        whole = torch.empty(self.shape, device=device)
        for place, module in zip(self.places, self.modules, strict=True):
            weight: Any = module.weight
            at = 0
            for rows in place.rows or (slice(0, len(whole)),):
                whole[rows] = weight[at : at + rows.stop - rows.start]
                at += rows.stop - rows.start
        return whole


def read(lora: Lora) -> LoraFile:
    """Raises AdapterFailed for a file that is broken, or holds numbers that are not finite."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora.path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
            header = file.metadata() or {}
        settings = _settings(header.get("lora_adapter_metadata", "{}"))
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise _failed(lora, f"its file cannot be read: {first_line(error)}") from error
    layers: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        numbers = tensor.float()
        if not is_finite([numbers]):
            raise _failed(lora, f"its {key[:_LETTERS]!r} holds numbers that are not finite.")
        if key.endswith(".alpha") and numbers.numel() != 1:
            raise _failed(lora, f"its {key[:_LETTERS]!r} is not one number.")
        if key.startswith(_BUNDLED):
            word, _, encoder = key.removeprefix(_BUNDLED).partition(".")
            embeddings.setdefault(word, {})[encoder] = numbers
        elif (named := split(key)) is not None:
            layers.setdefault(named[0], {})[named[1]] = numbers
        else:
            unknown.append(key)
    layers = {name: parts for name, parts in layers.items() if parts.keys() != {"alpha"}}
    return LoraFile(lora, layers, embeddings, unknown, origin.trainer(tensors, header), settings)


def _settings(text: str) -> dict[str, Any]:
    """PEFT's configuration by component, as diffusers writes it into the header. Raises ValueError."""
    settings: dict[str, Any] = json.loads(text)
    numbers = [value for name, value in settings.items() if name.endswith(".lora_alpha")]
    patterns = [value for name, value in settings.items() if name.endswith(".alpha_pattern")]
    if any(not isinstance(one, int | float) for one in (*numbers, *(n for each in patterns for n in each.values()))):
        raise ValueError("its alphas are no numbers")
    return settings


@contextmanager
def applied(pipeline: Any, files: Sequence[LoraFile]) -> Iterator[list[str]]:
    """`pipeline` with the changes of `files` beside its layers, each by its weight; as it was afterwards.

    Yields sentences on what was left out. Raises AdapterFailed for a file that was made for another model.
    """
    from cache.patching import shadowed

    changes: dict[nn.Module, list[Change]] = {}
    said = []
    if files:
        places = Places(pipeline)
        said = [sentence for file in files for sentence in _place(pipeline, places, file, changes)]
    with shadowed([(module, "forward", _changed(module.forward, these)) for module, these in changes.items()]):
        yield said


def _changed(forward: Callable[..., Tensor], changes: Sequence[Change]) -> Callable[..., Tensor]:
    def changed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = forward(x, *args, **kwargs)
        for change in changes:
            out = out + change(x).to(out)
        return out

    return changed


def _place(pipeline: Any, places: Places, file: LoraFile, changes: dict[nn.Module, list[Change]]) -> list[str]:
    """Adds what `file` changes to `changes`. Returns sentences on what of it was left out."""
    if file.unknown:
        reason = f"it holds {file.unknown[0][:_LETTERS]!r}, which is no change of a layer that is known here."
        raise _foreign(pipeline, file, reason)
    found = {name: places.find(name) for name in file.layers}
    missing = [name for name, ours in found.items() if not ours]
    if 2 * len(missing) >= len(found):
        reason = f"it changes {missing[0][:_LETTERS]!r}, which this model has not got." if missing else "it is empty."
        raise _foreign(pipeline, file, reason)
    placed: set[nn.Module] = set()
    twice = []
    for name, ours in found.items():
        modules = tuple(places.module(place) for place in ours)
        if not placed.isdisjoint(modules):  # some files have all their layers by the names of two trainers
            twice.append(name)
        elif ours:
            placed.update(modules)
            layer = _Layer(file.layers[name], file.alpha(name, ours[0].component), ours, modules)
            _check(pipeline, file, name, layer)
            for place, module in zip(ours, modules, strict=True):
                if weight := file.lora.weight_of(place.component):
                    dtype = places.networks[place.component].dtype
                    change = _change(file, layer, place, module, weight, pipeline._execution_device, dtype)
                    changes.setdefault(module, []).append(change)
    reasons = ((missing, "are none of this model's"), (twice, "stand there by another name too"))
    return [
        f"{len(names)} of the {len(found)} layers that the LoRA {file.lora.name!r} changes {reason} and were left out: "
        f"{', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}."
        for names, reason in reasons
        if names
    ]


def _check(pipeline: Any, file: LoraFile, name: str, layer: _Layer) -> None:
    """Raise AdapterFailed unless the file's matrices have the shape of the layers' weights, and can act there."""
    import torch

    whole = torch.empty(layer.shape, device="meta")
    try:
        made = algebra.delta({part: tensor.to("meta") for part, tensor in layer.parts.items()}, layer.alpha, whole)
        bias = algebra.bias(layer.parts)
        fits = made.shape == whole.shape and (bias is None or len(bias) == len(whole))
    except KeyError as error:
        raise _failed(file.lora, f"its {name[:_LETTERS]!r} lacks the part {error.args[0]}.") from error
    except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError):
        fits = False
    if not fits:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in layer.parts.items() if part != "alpha")
        reason = f"its {name[:_LETTERS]!r} ({shapes}) does not fit a layer of {tuple(layer.shape)}."
        raise _foreign(pipeline, file, reason)
    for place, module in zip(layer.places, layer.modules, strict=True):
        if not _RUNS & {cls.__name__ for cls in type(module).__mro__}:
            raise _failed(file.lora, f"it changes {place.path}, and no {type(module).__name__} can be changed.")
        weight: Any = module.weight
        numbers = weight.is_floating_point() and not weight.is_meta and weight.shape == shape(module)
        if algebra.reads_weight(layer.parts) and not numbers:
            reason = f"DoRA and OFT read the model's own weights, and {place.path}'s are quantised or offloaded."
            raise _failed(file.lora, reason)


def _change(
    file: LoraFile,
    layer: _Layer,
    place: Place,
    module: nn.Module,
    weight: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Change:
    """What `layer` adds in `place`, times `weight`: by two thin matrices, or by ΔW made anew in each call."""
    import torch

    def mine(rows: Tensor) -> Tensor:
        return torch.cat([rows[part] for part in place.rows]) if place.rows else rows

    def ready(tensor: Tensor) -> Tensor:
        if not is_finite([cast := tensor.to(dtype)]):
            raise _failed(file.lora, f"its numbers for {place.path} are too large for {dtype}, times {weight:g}.")
        return cast.to(device)

    bias = algebra.bias(layer.parts)
    bias = None if bias is None else ready(mine(bias) * weight)
    columns = shape(module)[1:]
    if columns and (pair := algebra.factors(layer.parts, layer.alpha)) is not None:
        down, up = pair
        down = ready(down.reshape(len(down), *columns))
        up = ready(mine(up.reshape(len(up), -1)).reshape(-1, len(down), *[1] * (len(columns) - 1)) * weight)
        return lambda x: _run(module, _run(module, x, down, None), up, bias, thin=True)
    parts = {part: tensor.to(device) for part, tensor in layer.parts.items()}

    def made(x: Tensor) -> Tensor:
        delta = algebra.delta(parts, layer.alpha, layer.weight(device))
        return _run(module, x, mine(delta) * weight, bias)

    return made


def _run(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *, thin: bool = False) -> Tensor:
    """The layer's own operation with other numbers, in which all of these are linear. thin: without its window."""
    from torch import nn
    from torch.nn import functional as F

    weight = weight.to(x if x.is_floating_point() else weight)
    bias = None if bias is None else bias.to(weight)
    match module:
        case nn.Linear():
            return F.linear(x, weight, bias)
        case nn.Conv2d():
            return F.conv2d(x, weight, bias) if thin else module._conv_forward(x, weight, bias)
        case nn.GroupNorm():
            return F.group_norm(x, module.num_groups, weight, bias, module.eps)
        case nn.LayerNorm():
            return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        case nn.RMSNorm():
            return F.rms_norm(x, module.normalized_shape, weight, module.eps)
        case nn.Embedding():
            return F.embedding(x, weight)
    raise TypeError(type(module).__name__)


def _foreign(pipeline: Any, file: LoraFile, reason: str) -> LoraFailed:
    """What to raise for a file that does not fit: for which family it was made, if that shows, else the reason."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(file.unknown, ())
    for name, parts in file.layers.items():
        shapes[name] = tuple(parts["lora_down.weight"].shape) if "lora_down.weight" in parts else ()
    theirs = origin.family(shapes)
    ours = origin.family_of(pipeline)
    if theirs is None or theirs == ours:
        return _failed(file.lora, reason)
    return LoraFailed(
        f"The LoRA {file.lora.name!r} was made for {theirs} (by {file.trainer}) and cannot be used with this model, "
        f"which is {ours}: take one that was made for {ours}, or leave it out of loras."
    )


def _failed(lora: Lora, reason: str) -> LoraFailed:
    return LoraFailed(
        f"The LoRA {lora.name!r} cannot be used with this model: {reason} "
        "Take one that was trained for it, or leave it out of loras."
    )
