"""The header of a weights file: names, shapes and precisions of its tensors, read without their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.errors import ModelError

from . import gguf

DANGER = (
    "which can run any code when it is read. Take the model's .safetensors file, or convert it on a machine that you "
    "can lose."
)
UNSAFE = (".ckpt", ".pt", ".pth", ".bin", ".pickle", ".pkl")


class BadFile(ModelError):
    """The file cannot be read. The message goes on after its name: `is empty. Fetch it again.`"""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """dtype: as safetensors or ggml calls it: `F16`, `BF16`, `F8_E4M3`, `Q8_0`. bytes: of one that stays packed."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int | None = None


class Header(dict[str, TensorInfo]):
    """Tensors by name; `metadata` is what the writer said of the file."""

    def __init__(self, tensors: dict[str, TensorInfo], metadata: dict[str, str] | None = None) -> None:
        super().__init__(tensors)
        self.metadata = metadata or {}


def read_header(file: Path) -> Header:
    """Of a `.safetensors` or `.gguf` file; that the tensors fill the file is checked. Raises BadFile, OSError."""
    from safetensors import SafetensorError, safe_open

    if file.suffix.lower() in UNSAFE:
        raise BadFile(f"is refused: a {file.suffix} file is a pickle, {DANGER}")
    if file.stat().st_size == 0:
        raise BadFile("is empty. Fetch it again.")
    if file.suffix.lower() == gguf.SUFFIX:
        return Header(_of_gguf(file))
    with file.open("rb") as opened:
        if opened.read(2) in (b"PK", b"\x80\x02", b"\x80\x04"):  # what torch.save writes: a zip, once a bare pickle
            raise BadFile(f"is refused: it is a pickle under another name, {DANGER}")
    try:
        with safe_open(file, "np") as opened:
            parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  # it is no dict
            tensors = {key: TensorInfo(tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
            return Header(tensors, opened.metadata())
    except SafetensorError as error:
        raise BadFile(f"is no whole safetensors file ({error}). Fetch it again.") from error


def _of_gguf(file: Path) -> dict[str, TensorInfo]:
    try:
        tensors = gguf.read_header(file)
    except ValueError as error:
        raise BadFile(f"is no whole GGUF file: {error} Fetch it again.") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in gguf.READABLE:
            raise BadFile(
                f"holds {key} as {tensor.dtype}, which is not supported. Take a file of one of these: "
                f"{', '.join(sorted(gguf.READABLE))}."
            )
    return {
        key: TensorInfo(tensor.shape, tensor.dtype, tensor.bytes if tensor.stays_packed(key) else None)
        for key, tensor in tensors.items()
    }
