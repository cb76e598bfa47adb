"""Faces found by an ONNX file of the operator's: a detector of the YOLOv8 kind, as its published exporter writes it.

Input: (1, 3, height, width), RGB, 0 … 1, the picture scaled to fit and padded with grey around its middle. Output:
(1, 4 + classes, anchors): the box's centre and size in pixels of the input, and a score of 0 … 1 for each class.
OpenCV runs it. Nothing of the file is executed as Python, which is why no `.pt` is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.errors import DetectorFailed

from .cascade import Box

if TYPE_CHECKING:
    from PIL import Image

SCORE = 0.4  # of the best class; less is no face
OVERLAP = 0.45  # intersection over union from which two boxes are one face
SIDE = 640  # pixels of the input where the file leaves it open
_GREY = 114
_REMEDY = "WAVESPEED_FACE_DETECTOR takes a YOLOv8 or YOLO11 detector as `yolo export format=onnx` writes it."


class Yolo:
    """The network of one file. Raises DetectorFailed where the file is none, or of another shape."""

    def __init__(self, path: Path) -> None:
        import cv2

        self.name = path.name
        try:
            data = path.read_bytes()
            self._net = cv2.dnn.readNetFromONNX(np.frombuffer(data, np.uint8))
            shape, task = _described(memoryview(data))
        except OSError as error:
            raise self._failed(f"cannot be read ({error.strerror})") from error
        except (cv2.error, ValueError, IndexError) as error:
            raise self._failed("is no ONNX file that OpenCV reads") from error
        if task not in (None, "detect"):
            raise self._failed(f"was trained for the task {task!r}, not to detect")
        if len(shape) != 4 or shape[0] not in (None, 1) or shape[1] not in (None, 3):
            raise self._failed(f"takes an input of shape {_shown(shape)}, not 1 × 3 × height × width")
        self.height, self.width = shape[2] or SIDE, shape[3] or SIDE
        self._forward(np.zeros((self.height, self.width, 3), np.uint8))  # before anything is drawn for it

    def find(self, image: Image.Image) -> list[Box]:
        """The boxes of every class, largest first, within the picture."""
        import cv2

        scaled = min(self.width / image.width, self.height / image.height)
        width, height = (max(1, round(scaled * side)) for side in image.size)
        left, top = (self.width - width) // 2, (self.height - height) // 2
        canvas = np.full((self.height, self.width, 3), _GREY, np.uint8)
        small = cv2.resize(np.asarray(image.convert("RGB")), (width, height), interpolation=cv2.INTER_LINEAR)
        canvas[top : top + height, left : left + width] = small
        output = self._forward(canvas)
        scores = output[4:].max(0)
        likely = scores >= SCORE
        centres, sizes = output[:2, likely].T, output[2:4, likely].T
        corners = np.concatenate([centres - sizes / 2, sizes], 1)
        kept = np.asarray(cv2.dnn.NMSBoxes(corners.tolist(), scores[likely].tolist(), SCORE, OVERLAP), int).flatten()
        back = np.array([image.width / width, image.height / height])
        limits = np.array(image.size)
        boxes = []
        for start, size in zip(corners[kept, :2] - (left, top), sizes[kept], strict=True):
            first = np.clip(np.rint(start * back), 0, limits).astype(int)
            last = np.clip(np.rint((start + size) * back), 0, limits).astype(int)
            if (last > first).all():
                boxes.append(Box(*(int(number) for number in (*first, *(last - first)))))
        return sorted(boxes, key=lambda box: (-box.width * box.height, box))

    def _forward(self, canvas: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(4 + classes, anchors) of an RGB picture of the input's size."""
        import cv2

        levels = np.ascontiguousarray(canvas.transpose(2, 0, 1)[None], np.float32) / 255
        try:
            names = self._net.getUnconnectedOutLayersNames()
            self._net.setInput(levels)
            outputs: list[Any] = list(self._net.forward(names))
        except cv2.error as error:
            raise self._failed(f"does not run on an input of {self.width}×{self.height} pixels") from error
        shapes = " and ".join(_shown(output.shape) for output in outputs)
        if len(outputs) != 1 or outputs[0].ndim != 3 or not 5 <= outputs[0].shape[1] < outputs[0].shape[2]:
            raise self._failed(f"gives {shapes}, not one output of 1 × (4 + classes) × anchors")
        output: NDArray[np.float32] = outputs[0][0]
        if not np.isfinite(output).all() or output[4:].min() < -1e-3 or output[4:].max() > 1 + 1e-3:
            raise self._failed("gives scores that are not between 0 and 1")
        return output

    def _failed(self, what: str) -> DetectorFailed:
        return DetectorFailed(f"The face detector {self.name} {what}. {_REMEDY}")


def load(path: Path) -> Yolo:
    """The file's network, kept until the file changes. One thread at a time may use it, as a worker does."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = 0  # reading it says why
    return _load(path, changed)


@lru_cache(maxsize=1)
def _load(path: Path, changed: int) -> Yolo:
    return Yolo(path)


def _shown(shape: tuple[int | None, ...]) -> str:
    return " × ".join("?" if side is None else str(side) for side in shape)


# OpenCV reads the network but tells neither its input's shape nor what the exporter noted beside it. Both are a few
# fields deep in the file, which is a protobuf message; the numbers below are those of onnx.proto3.


def _described(model: memoryview) -> tuple[tuple[int | None, ...], str | None]:
    """Shape of the first input, None for a side that is left open, and the exporter's word for the task."""
    inputs = _inside(model, 7, 11)  # ModelProto.graph, GraphProto.input
    shape = [
        next((side for number, side in _fields(dimension) if number == 1 and isinstance(side, int)), None)
        for dimension in _inside(next(inputs, memoryview(b"")), 2, 1, 2, 1)  # type, tensor_type, shape, dim
    ]
    notes = [dict(_fields(note)) for note in _inside(model, 14)]  # metadata_props
    words = {bytes(note[1]): bytes(note[2]).decode() for note in notes if {1, 2} <= note.keys()}
    return tuple(shape), words.get(b"task")


def _inside(message: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at the end of a path of field numbers."""
    for number, value in _fields(message):
        if number == path[0] and isinstance(value, memoryview):
            yield from _inside(value, *path[1:]) if path[1:] else (value,)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protobuf message. Raises ValueError or IndexError if it is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:
                value, at = _varint(message, at)
                yield key >> 3, value
            case 1 | 5 as fixed:
                at += 8 if fixed == 1 else 4
            case 2:
                length, at = _varint(message, at)
                yield key >> 3, message[at : at + length]
                at += length
            case kind:
                raise ValueError(f"no protobuf: a field of wire type {kind}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
