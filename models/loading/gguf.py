"""The header of a GGUF file: what its tensors are, without torch and without reading them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package has a reader of its own, which
believes the lengths that a file states; this one checks each against the file first.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

SUFFIX = ".gguf"
READABLE = frozenset(
    "F32 F16 BF16 Q8_0 Q6_K Q5_K Q5_1 Q5_0 Q4_K Q4_1 Q4_0 Q3_K Q2_K IQ4_NL IQ4_XS".split()  # noqa: SIM905
)
"""The types that diffusers turns back into numbers."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 100_000  # tensors, or keys: Flux has 780
_LONGEST = 65_535  # bytes of a name
_SHAPE_KEY = "comfy.gguf.orig_shape."  # ComfyUI-GGUF's, of a tensor that was cut into other rows to fill whole blocks


class Tensor(NamedTuple):
    """shape: as torch has it. dtype: a type of ggml by name, as `Q8_0`. rows: the shape in the file."""

    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, ...]

    def stays_packed(self, name: str) -> bool:
        """A layer that is no Linear cannot hold blocks: what is no matrix becomes numbers."""
        return len(self.shape) == 2 and self.shape == self.rows and name.endswith(".weight")

    @property
    def bytes(self) -> int:
        """That it takes, quantised as it is."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.dtype]]
        return math.prod(self.shape) // numbers * size


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors by name. Raises ValueError, in sentences, for what is no whole GGUF file; OSError."""
    with file.open("rb") as opened:
        try:
            return _Reader(opened, file.stat().st_size).tensors()
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError("The file ends within its header, or its header is damaged.") from error


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def tensors(self) -> dict[str, Tensor]:
        from gguf import GGMLQuantizationType

        if self.file.read(4) != b"GGUF":
            raise ValueError("The file does not begin as GGUF files do.")
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"The file is of version {version} of GGUF; 2 and 3 are read.")
        count, keys = self.count(), self.count()
        alignment = 32
        shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(keys):
            key, kind = self.text(), self.number("I")
            if key == "general.alignment":
                (alignment,) = self.value(kind)
            elif key.startswith(_SHAPE_KEY):
                shapes[key.removeprefix(_SHAPE_KEY)] = self.value(kind)
            else:
                self.pass_over(kind)
        found: dict[str, Tensor] = {}
        ends = 0
        for _ in range(count):
            name = self.text()
            rows = tuple(self.number("Q") for _ in range(self.number("I")))[::-1]
            kind, begin = self.number("I"), self.number("Q")
            if kind not in set(GGMLQuantizationType):
                raise ValueError(f"{name} is of type {kind}, which is no type of ggml that is known here.")
            found[name] = Tensor(shapes.get(name, rows), GGMLQuantizationType(kind).name, rows)
            if math.prod(found[name].shape) != math.prod(rows):
                raise ValueError(f"{name} has another shape than the one that it lies in.")
            ends = max(ends, begin + found[name].bytes)
        begins = -(-self.file.tell() // max(alignment, 1)) * alignment
        if begins + ends > self.size:
            raise ValueError(f"The file has {self.size} bytes and its header tells of {begins + ends}.")
        return found

    def read(self, length: int) -> bytes:
        if length > self.size - self.file.tell():
            raise ValueError("The file ends within its header.")
        return self.file.read(length)

    def number(self, form: str) -> int:
        (number,) = struct.unpack(f"<{form}", self.read(struct.calcsize(form)))
        return int(number)

    def count(self) -> int:
        if (count := self.number("Q")) > _MOST:
            raise ValueError(f"Its header tells of {count} entries.")
        return count

    def text(self) -> str:
        if (length := self.number("Q")) > _LONGEST:
            raise ValueError(f"Its header has a name of {length} bytes.")
        return self.read(length).decode()

    def value(self, kind: int) -> tuple[int, ...]:
        """A value that is an integer or integers."""
        inner, length = (self.number("I"), self.number("Q")) if kind == _ARRAY else (kind, 1)
        if inner not in _SCALARS or length > _MOST:
            raise ValueError("Its header has a shape or an alignment that is no number.")
        form = f"<{length}{_SCALARS[inner]}"
        return tuple(map(int, struct.unpack(form, self.read(struct.calcsize(form)))))

    def pass_over(self, kind: int) -> None:
        inner, length = (self.number("I"), self.number("Q")) if kind == _ARRAY else (kind, 1)
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(length):  # each takes bytes of the file, so that a length that lies ends with it
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"Its header has a value of type {inner}, which is not known here.")

    def skip(self, length: int) -> None:
        if length > self.size - self.file.tell():
            raise ValueError("The file ends within its header.")
        self.file.seek(length, 1)
