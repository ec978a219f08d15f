"""Exports of YOLO in each layout: networks that find the bright rectangle of what they get."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from jaxtyping import UInt8
from onnx import TensorProto, helper, numpy_helper

from foveola.config import UserError
from foveola.proposals.detect import DetectorConfig, detector
from foveola.proposals.onnx_models import Letterbox, OutputReading, reading_of

NAMES = str({0: "ant", 1: "bee"})


class Graph:
    """Nodes of a graph of ONNX, with the least of an algebra."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def save(
        self, path: Path, outputs: dict[str, str], square: Any, batch: Any, said: dict[str, str]
    ) -> Path:
        for name, tensor in outputs.items():
            self.nodes.append(helper.make_node("Identity", [tensor], [name]))
        shape = [batch, 3, *square]
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", [images], ends, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        helper.set_model_props(model, said)
        onnx.save(model, path)
        return path


def yolo(
    path: Path,
    layout: str,
    square: Any = (64, 64),
    batch: Any = "batch",
    masks: bool = False,
    said: dict[str, str] | None = None,
) -> Path:
    """Finds the bright rectangle as ant (0.9), once more (0.8), as bee (0.6), and as bee with little score.

    As ant its mask is what is bright, as bee it has none.
    """
    g = Graph()
    side = 64 if isinstance(square[0], str) else square[0], 64 if isinstance(square[1], str) else square[1]
    bright = g("Cast", g("Greater", g("ReduceMean", "images", axes=[1], keepdims=0), 0.9), to=1)
    ends = []
    for axis, length in ((1, side[1]), (2, side[0])):  # columns, rows
        there = g("ReduceMax", bright, axes=[axis], keepdims=0)
        index = np.arange(length, dtype=np.float32)
        first = g("Sub", float(length), g("ReduceMax", g("Mul", there, length - index), axes=[1], keepdims=1))
        ends.append((first, g("ReduceMax", g("Mul", there, index + 1), axes=[1], keepdims=1)))
    (x0, x1), (y0, y1) = ends

    def number(value: float) -> str:
        return g("Add", g("Mul", x0, 0.0), value)

    centre = [g("Mul", g("Add", low, high), 0.5) for low, high in ends]
    lengths = [g("Sub", high, low) for low, high in ends]
    found = []
    for score, label in ((0.9, 0), (0.8, 0), (0.6, 1), *[(0.1, 1)] * 8):
        weights = [1.0, 0.0] if label == 0 else [0.0, 1.0]
        scores = [score * (label == each) for each in (0, 1)]
        if layout == "end2end":
            numbers = [x0, y0, x1, y1, number(score), number(float(label))]
        elif layout == "v8":
            numbers = [*centre, *lengths, *map(number, scores)]
        else:  # an object for sure, of a class in part
            numbers = [*centre, *lengths, number(0.95), *(number(each / 0.95) for each in scores)]
        numbers += [number(weight) for weight in weights] if masks else []
        found.append(g("Unsqueeze", g("Concat", *numbers, axis=1), np.array([1])))
    boxes = g("Concat", *found, axis=1)
    outputs = {"output0": g("Transpose", boxes, perm=[0, 2, 1]) if layout == "v8" else boxes}
    if masks:
        low = g("AveragePool", g("Unsqueeze", bright, np.array([1])), kernel_shape=[4, 4], strides=[4, 4])
        shown = g("Sub", g("Mul", low, 2.0), 1.0)
        outputs["output1"] = g("Concat", shown, g("Sub", g("Mul", shown, 0.0), 1.0), axis=1)
    return g.save(path, outputs, square, batch, {"names": NAMES} if said is None else said)


def lit(height: int, width: int, box: tuple[int, int, int, int]) -> UInt8[np.ndarray, "_ _ 3"]:
    image = np.full((height, width, 3), 30, np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


LIT = (
    (100, 200, (40, 20, 120, 60)),
    (200, 100, (20, 140, 60, 180)),
    (64, 64, (8, 8, 40, 24)),
    (16, 32, (0, 0, 16, 16)),
)


@pytest.mark.parametrize("layout", ["v8", "v5", "end2end"])
@pytest.mark.parametrize("batch", [1, 3, "batch"])
def test_boxes_lie_where_things_are(layout: str, batch: Any, tmp_path: Path) -> None:
    """In images of any shape, larger and smaller than the square, in files for any number of images."""
    proposer = detector(f"onnx:{yolo(tmp_path / 'a.onnx', layout, batch=batch)}", DetectorConfig())
    assert proposer.classes == ("ant", "bee")
    found = proposer.propose([lit(*each) for each in LIT])
    for (height, width, box), each in zip(LIT, found, strict=True):
        count = 3 if layout == "end2end" else 2  # which is after NMS already
        assert each.labels.tolist() == [0, 0, 1][-count:]
        np.testing.assert_allclose(each.scores, [0.9, 0.8, 0.6] if count == 3 else [0.9, 0.6], rtol=1e-5)
        np.testing.assert_allclose(each.boxes, [box] * count, atol=1.01 * max(height, width) / 64)
        assert each.masks is None


@pytest.mark.parametrize("layout", ["v8", "v5", "end2end"])
def test_masks_lie_where_things_are(layout: str, tmp_path: Path) -> None:
    proposer = detector(f"onnx:{yolo(tmp_path / 'a.onnx', layout, masks=True)}", DetectorConfig(score=0.85))
    for (height, width, box), each in zip(LIT, proposer.propose([lit(*each) for each in LIT]), strict=True):
        assert len(each) == 1
        assert each.masks is not None
        assert each.masks.shape == (1, height, width)
        truth = lit(height, width, box)[..., 0] == 255
        assert (each.masks[0] & truth).sum() / (each.masks[0] | truth).sum() > 0.7
    (bee,) = detector(f"onnx:{tmp_path / 'a.onnx'}", DetectorConfig(classes=("bee",))).propose([lit(*LIT[0])])
    assert len(bee) == 0  # whose masks are empty


def test_a_square_need_not_be_square(tmp_path: Path) -> None:
    proposer = detector(f"onnx:{yolo(tmp_path / 'a.onnx', 'v8', square=(32, 96))}", DetectorConfig())
    for height, width, box in LIT:
        (found,) = proposer.propose([lit(height, width, box)])
        scale = max(height / 32, width / 96)
        np.testing.assert_allclose(found.boxes[0], box, atol=1.01 * scale)


def test_sizes_of_files_for_any_size(tmp_path: Path) -> None:
    """The size that is asked for, or that of the export; 64 is what this network can do."""
    said = {"names": json.dumps(["ant", "bee"]), "imgsz": "[64, 64]"}
    file = yolo(tmp_path / "a.onnx", "v8", square=("height", "width"), said=said)
    (found,) = detector(f"onnx:{file}", DetectorConfig()).propose([lit(*LIT[0])])
    (same,) = detector(f"onnx:{file}", DetectorConfig(image_size=64)).propose([lit(*LIT[0])])
    np.testing.assert_array_equal(found.boxes, same.boxes)
    with pytest.raises(UserError, match="does not run: "):
        detector(f"onnx:{file}", DetectorConfig(image_size=96))


def test_a_letterbox_is_as_worked_by_hand() -> None:
    """200 x 100 pixels in a square of 64: 64 x 32, with 16 columns of grey before it and behind it."""
    place = Letterbox.of((200, 100), (64, 64))
    assert place == Letterbox(rows=64, columns=32, top=0, left=16)
    drawn = place.draw(np.full((200, 100, 3), 255, np.uint8), (64, 64))
    assert (drawn[:, :, 16:48] == 1).all()
    assert np.unique(np.delete(drawn, range(16, 48), axis=2)).tolist() == [pytest.approx(114 / 255)]
    assert place.undo(torch.tensor([[16.0, 0, 48, 64]]), (200, 100)).tolist() == [[0, 0, 100, 200]]
    assert place.part((64, 64)).flatten().tolist() == [0.25, 0, 0.75, 1]
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    large = Letterbox.of((2, 2), (4, 4)).draw(image, (4, 4))
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = np.einsum("ij,jkc,lk->cil", weights, image, weights)
    np.testing.assert_allclose(255 * large, expected, atol=0.51)


@pytest.mark.parametrize(
    ("shapes", "classes", "layout", "expected"),
    [
        ([(1, 84, 8400)], 80, None, OutputReading("v8", 80, 0)),
        ([(1, 84, 8400)], None, None, OutputReading("v8", 80, 0)),
        ([(1, 25200, 85)], 80, None, OutputReading("v5", 80, 0)),
        ([(1, 25200, 85)], None, None, OutputReading("v5", 80, 0)),
        ([(1, 300, 6)], 80, None, OutputReading("end2end", 80, 0)),
        ([(1, 300, 6)], 1, "end2end", OutputReading("end2end", 1, 0)),
        ([(1, 300, 6)], 1, "v5", OutputReading("v5", 1, 0)),
        ([(1, 116, 8400), (1, 32, 160, 160)], 80, None, OutputReading("v8", 80, 32)),
        ([(1, 25200, 117), (1, 32, 160, 160)], 80, None, OutputReading("v5", 80, 32)),
        ([(1, 300, 38), (1, 32, 160, 160)], 80, None, OutputReading("end2end", 80, 32)),
        ([(1, 5, 8400)], 1, None, OutputReading("v8", 1, 0)),
    ],
)
def test_layouts_are_told_by_shapes(shapes: Any, classes: Any, layout: Any, expected: OutputReading) -> None:
    assert reading_of(shapes, classes, layout, "m") == expected


@pytest.mark.parametrize(
    ("shapes", "classes", "layout", "error"),
    [
        ([(1, 25200, 6)], 1, None, "may be v5 or end2end: say which"),
        ([(1, 300, 6)], None, None, "may be v5 or end2end: say which"),
        ([(1, 84, 8400)], 3, None, "which is no output of YOLO's for 3 classes"),
        ([(1, 84, 8400)], 80, "v5", "which is no output of YOLO's for 80 classes"),
        ([(1, 3, 80, 80, 85)], 80, None, r"expected YOLO's \[B, 4"),
        ([(1, 84, 8400), (1, 84, 8400)], 80, None, r"expected YOLO's \[B, 4"),
    ],
)
def test_other_outputs_are_not_read(shapes: Any, classes: Any, layout: Any, error: str) -> None:
    with pytest.raises(UserError, match=error):
        reading_of(shapes, classes, layout, "m")


def test_names_of_classes(tmp_path: Path) -> None:
    file = yolo(tmp_path / "a.onnx", "v8", said={})
    with pytest.raises(UserError, match=r"does not name its classes: say names=\[...\], or agnostic=true"):
        detector(f"onnx:{file}", DetectorConfig())
    assert detector(f"onnx:{file}", DetectorConfig(names=("a", "b"))).classes == ("a", "b")
    for layout in ("v8", "end2end"):
        yolo(file, layout, said={})
        config = DetectorConfig(agnostic=True, score=0.5, layout=layout)
        (found,) = detector(f"onnx:{file}", config).propose([lit(*LIT[0])])
        assert found.labels.tolist() == [0] * (2 if layout == "v8" else 3)
    yolo(file, "end2end", said={"names": "['ant']"})
    with pytest.raises(UserError, match="it finds class 1, and names 1 classes"):
        detector(f"onnx:{file}", DetectorConfig(layout="end2end")).propose([lit(*LIT[0])])


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = yolo(tmp_path / "a.onnx", "end2end")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(file.read_bytes()[:200])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "none.onnx", {}, "no file"),
        (damaged, {}, "cannot be read: "),
        (file, {"names": ("a", "b")}, "names has no effect"),
        (file, {"nms": 0.5}, "nms has no effect"),
        (file, {"image_size": 64}, "image_size has no effect"),
        (file, {"text": ("ant",)}, "text has no effect"),
        (yolo(tmp_path / "b.onnx", "v8", said={"names": "f()"}), {}, "is damaged: its names are"),
    ]
    for path, settings, error in cases:
        with pytest.raises(UserError, match=error) as caught:
            detector(f"onnx:{path}", DetectorConfig(**settings))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="install onnxruntime-gpu, or device=cpu"):
        detector(f"onnx:{file}", DetectorConfig(), "cuda")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'foveola\[onnx\]'"):
        detector(f"onnx:{file}", DetectorConfig())
