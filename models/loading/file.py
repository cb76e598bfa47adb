"""A checkpoint in one `.safetensors` or `.gguf` file, in its first publication's layout, and parts that lie apart.

diffusers converts the networks. What a file holds, and under which names, is found here (`recognise.py`), because
diffusers knows fewer layouts, guesses a family, and drops in silence what it does not know.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base import Hub, ModelSpec, Quantization
from models.errors import LoadFailed

from . import gguf
from .header import BadFile
from .quantised import PREFIX, descaled, loading, read_gguf, tensor_bytes
from .recognise import PARTS, WORDS, Network, Recognised, recognise_file
from .shapes import unusual

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors", ".gguf")
_OLD_CLIP = re.compile(r"(embeddings|encoder|final_layer_norm)\.")  # before transformers 4.0 `text_model.` was not said
_OWN = {"sd": ("sd15", "sd21"), "flux": ("flux-schnell", "flux-dev", "flux-fill")}  # families of no one shape
_UNUSED = {  # what the published files hold beside the network that the family runs
    "clip_l": r"text_projection(\.weight)?",
    "clip_h": r"text_projection|transformer\.resblocks\.23\..*",  # its last layer is not read
    "t5": r"decoder\..*|lm_head\..*",
}
_WORDS, _ALSO_WORDS = "shared.weight", "encoder.embed_tokens.weight"  # T5's one matrix, under either name or both
_SD2_PREDICTS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_SPREAD = 0.09


@dataclass(frozen=True, slots=True)
class Part:
    """A network of a model, and the file that it is in."""

    file: Path
    network: Network

    @property
    def quantised(self) -> bool:
        """Whether the file itself holds small weights, which stay as they are."""
        return self.file.suffix.lower() == gguf.SUFFIX

    def takes(self, quantization: Quantization | None) -> bool:
        """Whether this network can be kept so: T5, from a file of its own, in fp8 alone."""
        return self.network.role in ("unet", "flux") or (self.network.role == "t5" and quantization == "fp8")

    def bytes(self, itemsize: int, quantization: Quantization | None = None) -> int:
        """Of its weights, at `itemsize` a number, or quantised."""
        return sum(
            info.bytes or tensor_bytes(name, info.shape, itemsize, quantization)
            for name, info in self.network.tensors.items()
        )


def single_file(spec: ModelSpec) -> Path | None:
    """The checkpoint, if the model is a single file."""
    source = spec.source
    if isinstance(source, Hub) or source.is_dir():
        return None
    return source if spec.config is not None or source.suffix.lower() in SUFFIXES else None


def contents(spec: ModelSpec, file: Path) -> Recognised:
    """What the file holds. Raises LoadFailed."""
    try:
        return recognise_file(file)
    except FileNotFoundError as error:
        raise LoadFailed(f"The model {spec.name!r} cannot be read: {file} is missing.") from error
    except BadFile as error:
        raise LoadFailed(f"The model {spec.name!r} cannot be read: {file} {error}") from error
    except OSError as error:
        raise LoadFailed(f"The model {spec.name!r} cannot be read: {file}: {error.strerror}.") from error


def check_family(spec: ModelSpec, file: Path) -> None:
    """Raise LoadFailed unless the file is of the spec's family; `sd` and `flux` take each of theirs."""
    found = contents(spec, file)
    if found.family is None:
        raise LoadFailed(f"The model {spec.name!r} is not served: {file} {found.reason}.")
    if spec.config is None and (odd := unusual(found.family, found.networks)):
        raise LoadFailed(f"The model {spec.name!r} is not served: {file} {odd}.")
    if spec.family != found.family and found.family not in _OWN.get(spec.family, ()):
        raise LoadFailed(
            f"The model {spec.name!r} at {spec.source} is not of family {spec.family!r}: by its tensors it is "
            f"{found.family!r}. Name the right family, or another file."
        )


def parts_of(spec: ModelSpec, file: Path) -> dict[str, Part]:
    """Component → where it is, of those that lie in the checkpoint or in files of their own. Raises LoadFailed."""
    own = contents(spec, file)
    roles = PARTS[own.family or spec.family]
    parts = {name: Part(file, own.networks[role]) for name, role in roles.items() if role in own.networks}
    for name, other in spec.parts.items():
        if name in roles:
            found = contents(spec, other).networks
            if (network := found.get(roles[name])) is None:
                held = " and ".join(WORDS[role] for role in found) or "none that is known here"
                raise LoadFailed(
                    f"The model {spec.name!r} needs {WORDS[roles[name]]} as its {name}, and {other} holds {held}."
                )
            parts[name] = Part(other, network)
    return parts


def missing_part(spec: ModelSpec, component: str) -> LoadFailed:
    """The error for a component that lies nowhere."""
    role = PARTS[spec.family].get(component) if spec.family in PARTS else None
    return LoadFailed(
        f"The model {spec.name!r} lacks its {component}{f', {WORDS[role]}' if role else ''}: put the file into the "
        f"folder of checkpoints, or name it as {component} in the models file."
    )


def load_part(spec: ModelSpec, part: Part, component: str, network_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The network, its shape by the configuration of `component` in `folder`.

    Raises LoadFailed for a tensor too many; ValueError for one too few. The libraries would pass over both.
    """
    tensors = read_tensors(spec, part, dtype)
    written = part.network.tensors
    expected = sum(math.prod(written[name if name in written else _ALSO_WORDS].shape) for name in tensors)
    try:
        network = _converted(spec, part, tensors, component, network_class, folder, dtype)
    except NotImplementedError as error:  # torch, about tensors that were left without data
        raise ValueError(f"{part.file.name} lacks tensors that its {component} has.") from error
    lacking = [name for name, tensor in network.named_parameters() if tensor.is_meta]
    if lacking:
        raise ValueError(f"{part.file.name} lacks tensors that its {component} has, {lacking[0]} first.")
    taken = _numbers(network)
    if taken != expected:
        raise LoadFailed(
            f"{part.file.name} holds {expected} numbers for its {component}, and the network takes {taken}: some of "
            "its tensors belong to another kind of model. Take the file from its source again, or another one."
        )
    return network


def _numbers(network: Any) -> int:
    """Of its weights, also where they are packed."""
    from torch import nn

    found = {}
    for module in network.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                packed = isinstance(module, nn.Linear) and name == "weight"
                found[id(tensor)] = module.out_features * module.in_features if packed else tensor.numel()
    return sum(found.values())


def read_tensors(spec: ModelSpec, part: Part, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The network's tensors by their names in it: fp8 in `dtype`, a GGUF file's matrices as they are.

    Raises LoadFailed for what this cannot make numbers of.
    """
    from safetensors import safe_open

    unused = re.compile(_UNUSED.get(part.network.role, "(?!)"))
    names = {name: part.network.prefix + name for name in part.network.tensors if not unused.fullmatch(name)}
    if part.quantised:
        return read_gguf(part.file, names)
    with safe_open(part.file, "pt") as opened:
        tensors = {name: opened.get_tensor(key) for name, key in names.items()}
    tensors = descaled(spec.name, tensors, dtype)
    if (words := tensors.pop(_ALSO_WORDS, None)) is not None:
        tensors.setdefault(_WORDS, words)
    return tensors


def _converted(
    spec: ModelSpec,
    part: Part,
    tensors: dict[str, torch.Tensor],
    component: str,
    network_class: Any,
    folder: Path,
    dtype: torch.dtype,
) -> Any:
    from diffusers.loaders import single_file_utils

    where = {"config": str(folder), "subfolder": component, "local_files_only": True}
    role = part.network.role
    match role:
        case "unet" | "flux":
            state = {(PREFIX if role == "unet" else "") + name: tensor for name, tensor in tensors.items()}
            small = loading("gguf" if part.quantised else spec.quantization, dtype)
            return network_class.from_single_file(state, **where, dtype=dtype, **small)
        case "vae4" | "vae16":
            return network_class.from_single_file(tensors, **where, dtype=dtype)
        case "t5":
            state = {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in tensors.items()}
            state[f"text_encoders.t5xxl.transformer.{_ALSO_WORDS}"] = tensors[_WORDS]
            network = single_file_utils.create_diffusers_t5_model_from_checkpoint(
                network_class, state, **where, torch_dtype=dtype
            )
            network.encoder.embed_tokens = network.shared
            return network
        case _:
            named = any("resblocks" in name for name in tensors)
            prefix = "cond_stage_model.transformer."
            if named:
                prefix = "conditioner.embedders.1.model." if role == "clip_g" else "cond_stage_model.model."
            state = {
                f"{prefix}text_model.{name}" if not named and _OLD_CLIP.match(name) else prefix + name: tensor
                for name, tensor in tensors.items()
            }
            return single_file_utils.create_diffusers_clip_model_from_ldm(
                network_class, state, **where, torch_dtype=dtype
            )


def predicts(spec: ModelSpec, file: Path) -> tuple[str | None, bool]:
    """What the network predicts, None where nothing says it, and whether its schedule ends in pure noise.

    The spec goes before the file's keys. Where both are silent and no configuration speaks, SD2's weights show it: one
    bias is spread wider in those trained on velocities, by the measure that ComfyUI takes too.
    """
    from safetensors import safe_open

    found = contents(spec, file)
    prediction: str | None = spec.prediction_type or found.prediction
    if prediction is None and spec.config is None and found.family == "sd21" and file.suffix.lower() != gguf.SUFFIX:
        with safe_open(file, "pt") as opened:
            bias = opened.get_tensor(found.networks["unet"].prefix + _SD2_PREDICTS)
        prediction = "v_prediction" if float(bias.float().std(unbiased=False)) > _SD2_SPREAD else "epsilon"
    terminal = found.terminal_snr if spec.rescale_betas_zero_snr is None else spec.rescale_betas_zero_snr
    return prediction, bool(terminal)
