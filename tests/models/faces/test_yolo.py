"""Face detectors in ONNX files, built here: one that answers with a box wherever the picture is red."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from cache import NoCache
from models import faces
from models.base import GenerationParams, Step
from models.errors import DetectorFailed
from models.generation import LoadedModel, stages_of
from models.stages.detail import ADetailer

CELL = 32  # pixels of the network's input that share an anchor
BOX = 3 * CELL  # side of every box


def detector(
    path: Path, height: int, width: int, *, declared: list[Any] | None = None, channels: int = 3, end: str = ""
) -> Path:
    """A network whose score at an anchor is .9 of the cell's red, less its green and blue, and 0 for a second class."""
    rows, columns = height // CELL, width // CELL
    anchors = rows * columns
    boxes = [[(x + 0.5) * CELL, (y + 0.5) * CELL, BOX, BOX] for y in range(rows) for x in range(columns)]
    red = np.full((1, channels, CELL, CELL), -0.9 / CELL**2, np.float32)
    red[:, 0] *= -300 if end == "logits" else -1
    constants = {
        "red": red,
        "boxes": np.array([boxes], np.float32).transpose(0, 2, 1),
        "none": np.zeros((1, 1, anchors), np.float32),
        "flat": np.array([1, 1, anchors]),
    }
    nodes = [
        helper.make_node("Conv", ["images", "red"], ["cells"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Relu", ["cells"], ["bright"]),
        helper.make_node("Reshape", ["bright", "flat"], ["scores"]),
        helper.make_node("Concat", ["boxes", "none", "scores"], ["output0"], axis=1),
    ]
    outputs = {"output0": [1, 6, anchors]}
    if end == "turned":
        nodes.append(helper.make_node("Transpose", ["output0"], ["output1"], perm=[0, 2, 1]))
        outputs = {"output1": [1, anchors, 6]}
    elif end == "two":
        nodes.append(helper.make_node("Sigmoid", ["cells"], ["output1"]))
        outputs["output1"] = [1, 1, rows, columns]
    shape = declared or [1, channels, height, width]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name, sides in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"stride": "32", "task": "pose" if end == "pose" else "detect"})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def painted(size: tuple[int, int], cell: int, colours: dict[tuple[int, int], str]) -> Image.Image:
    """White, with squares of `cell` pixels at columns and rows."""
    image = Image.new("RGB", size, "white")
    for (x, y), colour in colours.items():
        ImageDraw.Draw(image).rectangle([x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1], fill=colour)
    return image


@pytest.mark.parametrize(
    ("network", "declared", "size", "cell", "colours", "expected"),
    [
        pytest.param(  # halved, 96 rows of grey above and below
            (320, 320),
            None,
            (640, 256),
            64,
            # One face, its weaker neighbour (they share half of what they cover), a blue, a dim one, a corner.
            {(2, 1): "#f00", (3, 1): "#c80000", (6, 1): "#00f", (6, 3): "#600000", (9, 3): "#f00"},
            [(64, 0, 192, 192), (512, 128, 128, 128)],
            id="landscape",
        ),
        pytest.param(  # doubled, 96 columns of grey at the left and right
            (320, 320),
            None,
            (64, 160),
            16,
            {(1, 5): "#f00", (3, 9): "#f00"},
            [(0, 64, 48, 48), (32, 128, 32, 32)],
            id="portrait",
        ),
        pytest.param(  # an input that is not square
            (160, 320), None, (640, 320), 64, {(4, 2): "#f00"}, [(192, 64, 192, 192)], id="oblong input"
        ),
        pytest.param(  # 640 a side where the file leaves it open
            (640, 640),
            ["batch", 3, "height", "width"],
            (320, 320),
            16,
            {(4, 2): "#f00"},
            [(48, 16, 48, 48)],
            id="open input",
        ),
        pytest.param((320, 320), None, (320, 200), 32, {}, [], id="nobody"),
    ],
)
def test_boxes_are_where_the_picture_has_them(
    tmp_path: Path,
    network: tuple[int, int],
    declared: list[Any] | None,
    size: tuple[int, int],
    cell: int,
    colours: dict[tuple[int, int], str],
    expected: list[tuple[int, int, int, int]],
) -> None:
    path = detector(tmp_path / "face.onnx", *network, declared=declared)
    assert faces.finder(path)(painted(size, cell, colours)) == [faces.Box(*box) for box in expected]


def test_the_request_s_detector_is_adetailer_s_and_else_the_cascade(tmp_path: Path) -> None:
    params = GenerationParams(prompt="a", adetailer=True)
    model: Any = None  # its sizes are for hires-fix
    assert stages_of(model, params)[-1] == ADetailer(faces.find)
    path = detector(tmp_path / "face.onnx", 320, 320)
    detailer: Any = stages_of(model, replace(params, face_detector=path))[-1]
    image = painted((320, 320), 32, {(4, 4): "#f00"})
    assert detailer.find(image) == [faces.Box(96, 96, 96, 96)]
    assert faces.find(image) == []


def test_a_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    image = painted((320, 320), 32, {(4, 4): "#f00"})
    path = detector(tmp_path / "face.onnx", 320, 320)
    first = faces.finder(path)
    assert faces.finder(path) == first
    detector(path, 160, 320)
    os.utime(path, (1, 1))
    assert faces.finder(path)(image) != first(image)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"end": "turned"}, "gives 1 × 100 × 6, not one output"),
        ({"end": "two"}, "gives 1 × 6 × 100 and 1 × 1 × 10 × 10, not one output"),
        ({"end": "pose"}, "was trained for the task 'pose'"),
        ({"channels": 1}, "takes an input of shape 1 × 1 × 320 × 320"),
        ({"declared": [1, 3, "height", "width"]}, "does not run on an input of 640×640"),
    ],
)
def test_another_network_is_refused_with_the_remedy(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    path = detector(tmp_path / "face.onnx", 320, 320, **options)
    with pytest.raises(DetectorFailed, match="yolo export format=onnx") as refused:
        faces.finder(path)
    assert f"The face detector face.onnx {said}" in str(refused.value)


def test_scores_that_are_none_are_refused(tmp_path: Path) -> None:
    find = faces.finder(detector(tmp_path / "face.onnx", 320, 320, end="logits"))
    with pytest.raises(DetectorFailed, match="scores that are not between 0 and 1"):
        find(painted((320, 320), 32, {(4, 4): "#f00"}))


@pytest.mark.parametrize("content", [b"", b"nonsense" * 40, None], ids=["empty", "nonsense", "missing"])
def test_a_broken_file_is_told_before_anything_is_drawn(sd: LoadedModel, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "face.onnx"
    if content is not None:
        path.write_bytes(content)
    params = GenerationParams(prompt="a", width=64, height=64, steps=2, seeds=(1,), adetailer=True, face_detector=path)
    steps: list[Step] = []
    with pytest.raises(DetectorFailed) as refused:
        sd.generate(params, NoCache(), steps.append)
    assert ("cannot be read" if content is None else "is no ONNX file") in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    assert refused.value.field == "adetailer"
    assert steps == []
