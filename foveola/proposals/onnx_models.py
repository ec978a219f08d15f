"""YOLO-style detectors as ONNX files, `onnx:FILE`, by onnxruntime: letterbox, layouts of outputs, prototypes.

Layouts, with boxes in pixels of the letterbox: "v8" [B, 4 + C, N] (centre, size, scores of classes), "v5"
[B, N, 5 + C] (the score of there being an object before those of classes), "end2end" [B, N, 6] (corners,
score, class; after NMS). Exports of segmentation have M more numbers for each box, and prototypes of masks
[B, M, h, w] as a second output.
"""

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import interpolate

from foveola.config import ConfigError, UserError
from foveola.geometry import sample
from foveola.proposals.found import FoundInImage, ImagePixels, OpenedDetector
from foveola.zoo.foreign import import_library, one_line

GREY = 114  # of what lies beside an image in its letterbox, in YOLO's training and exports
USUAL_SIDE = 640  # of the square, where the file takes any
MOST_BOXES = 300  # boxes of an image after NMS


@dataclass(frozen=True)
class Letterbox:
    """Where an image lies in the square that a network gets: its size there, and the pixels before it."""

    rows: int
    columns: int
    top: int
    left: int

    @classmethod
    def of(cls, size: tuple[int, int], square: tuple[int, int]) -> "Letterbox":
        """Fit an image of `size` (rows, columns) into the middle of `square`, larger or smaller."""
        scale = min(square[0] / size[0], square[1] / size[1])
        rows, columns = (max(round(side * scale), 1) for side in size)
        return cls(rows, columns, round((square[0] - rows) / 2 - 0.1), round((square[1] - columns) / 2 - 0.1))

    def draw(self, image: ImagePixels, square: tuple[int, int]) -> Float32[np.ndarray, "3 H W"]:
        """Return the square in [0, 1]: the image, resized bilinearly without antialiasing, on grey."""
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        resized = interpolate(pixels, (self.rows, self.columns), mode="bilinear").round()[0]
        drawn = torch.full((3, *square), float(GREY))
        drawn[:, self.top : self.top + self.rows, self.left : self.left + self.columns] = resized
        return (drawn / 255).numpy()

    def undo(self, boxes: Float[Tensor, "K 4"], size: tuple[int, int]) -> Float[Tensor, "K 4"]:
        """Return boxes in pixels of the square as boxes in pixels of the image."""
        scale = boxes.new_tensor([size[1] / self.columns, size[0] / self.rows] * 2)
        return (boxes - boxes.new_tensor([self.left, self.top] * 2)) * scale

    def part(self, square: tuple[int, int]) -> Float[Tensor, "1 1 4"]:
        """Return the box of the image in the unit square of the letterbox."""
        x0, y0 = self.left / square[1], self.top / square[0]
        return torch.tensor([[[x0, y0, x0 + self.columns / square[1], y0 + self.rows / square[0]]]])


@dataclass(frozen=True)
class OutputReading:
    """How outputs are read: their layout, the number of classes and of prototypes (0: boxes alone)."""

    layout: str
    classes: int
    prototypes: int
    nameless: bool = False  # all classes are one

    def boxes(
        self, output: Float[Tensor, "_ _"], score: float, iou: float
    ) -> tuple[Float[Tensor, "K 4"], Float[Tensor, "K"], Tensor, Float[Tensor, "K M"]]:
        """Return boxes (corners) that score more, scores, classes, and weights of prototypes, best first."""
        rows = (output.T if self.layout == "v8" else output).float()
        if self.layout == "end2end":
            kept = rows[rows[:, 4] > score]
            kept = kept[kept[:, 4].argsort(descending=True, stable=True)]
            return kept[:, :4], kept[:, 4], kept[:, 5].long(), kept[:, 6:]
        first = 4 if self.layout == "v8" else 5
        scores, labels = rows[:, first : first + self.classes].max(dim=1)
        if self.layout == "v5":
            scores = scores * rows[:, 4]
        there = scores > score
        rows, scores, labels = rows[there], scores[there], labels[there]
        centre, half = rows[:, :2], rows[:, 2:4] / 2
        boxes = torch.cat([centre - half, centre + half], dim=1)
        nms = import_library("torchvision.ops", "onnx").batched_nms
        kept = nms(boxes, scores, labels, iou)[:MOST_BOXES]
        return boxes[kept], scores[kept], labels[kept], rows[kept, first + self.classes :]


def reading_of(
    shapes: Sequence[tuple[int, ...]], classes: int | None, layout: str | None, where: str
) -> OutputReading:
    """Return how outputs of these shapes are read.

    Args:
        classes: their number, where it is known.
        layout: as the user says it; None: as shapes tell.

    Raises UserError for other outputs, and where shapes tell several layouts.
    """
    maps = [shape for shape in shapes if len(shape) == 4]
    boxes = [shape for shape in shapes if len(shape) == 3]
    seen = ", ".join(map(str, shapes))
    if len(boxes) != 1 or len(maps) > 1 or len(shapes) != len(boxes) + len(maps):
        raise UserError(
            f"{where} gives {seen}: expected YOLO's [B, 4 + C, N], [B, N, 5 + C] or [B, N, 6], and perhaps "
            "[B, M, h, w]"
        )
    prototypes, (_, second, third) = maps[0][1] if maps else 0, boxes[0]
    fits = {
        "v8": second - 4 - prototypes,
        "v5": third - 5 - prototypes,
        "end2end": classes or 1 if third == 6 + prototypes else 0,
    }
    if classes is None:  # numbers of a box are fewer than boxes
        wide = second < third
        possible = [name for name, count in fits.items() if count > 0 and (name == "v8") == wide]
    else:
        possible = [name for name, count in fits.items() if count == classes]
    if layout is not None:
        possible = [layout] if fits[layout] > 0 and (classes is None or fits[layout] == classes) else []
    if not possible:
        known = "unknown classes" if classes is None else f"{classes} classes"
        raise UserError(f"{where} gives {seen}, which is no output of YOLO's for {known}; names= says them")
    if len(possible) > 1:
        raise ConfigError(f"layout: {where} gives {seen}, which may be {' or '.join(possible)}: say which")
    return OutputReading(possible[0], fits[possible[0]], prototypes)


def open_onnx(
    text: str,
    names: tuple[str, ...] | None,
    agnostic: bool,
    options: dict[str, Any],
    device: torch.device,
) -> OpenedDetector:
    """Open a file of ONNX.

    Args:
        names: of the classes, where the file does not say them.
        agnostic: whether names are not needed.
        options: `nms`, `image_size` and `layout` as the user gives them; None where not.

    Raises UserError, in one line, for what cannot be read or is no such detector, and where the square's size
    or the classes are not known.
    """
    path, where = Path(text), f"onnx:{text}"
    if not path.is_file():
        raise UserError(f"{where}: no file {path}")
    session = _session(path, where, device)
    metadata = session.get_modelmeta().custom_metadata_map
    square = _square(session, metadata, options["image_size"], where)
    own = _names(metadata.get("names"), where)
    if own is not None and names is not None:
        raise ConfigError(f"names has no effect: {where} has names of its own")
    names = own or names
    network = _Network(session, square, where)
    shapes = [tuple(each.shape) for each in network(np.zeros((1, 3, *square), np.float32))]
    reading = reading_of(shapes, None if names is None else len(names), options["layout"], where)
    if names is None:
        if not agnostic:
            raise UserError(f"{where} does not name its classes: say names=[...], or agnostic=true")
        names, reading = ("object",), replace(reading, nameless=True)
    iou = 0.7 if options["nms"] is None else options["nms"]

    def find(images: Sequence[ImagePixels], score: float) -> list[FoundInImage]:
        letterboxes = [Letterbox.of((image.shape[0], image.shape[1]), square) for image in images]
        drawn = [letterbox.draw(image, square) for letterbox, image in zip(letterboxes, images, strict=True)]
        outputs = network(np.stack(drawn))
        found = next(each for each in outputs if each.ndim == 3)
        maps = next((each for each in outputs if each.ndim == 4), [None] * len(images))
        return [
            _found(reading, output, protos, image, letterbox, square, score, iou)
            for output, protos, image, letterbox in zip(found, maps, images, letterboxes, strict=True)
        ]

    reads = {"nms"} if reading.layout != "end2end" else set()
    reads |= {"names", "layout"} | ({"image_size"} if network.any_size else set())
    identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return OpenedDetector(names, find, identity, score=0.25, one_size=True, reads=frozenset(reads))


def _found(
    reading: OutputReading,
    output: Tensor,
    prototypes: Tensor | None,
    image: ImagePixels,
    letterbox: Letterbox,
    square: tuple[int, int],
    score: float,
    iou: float,
) -> FoundInImage:
    """What is found in an image, with masks where there are prototypes: cut at its pixels and at its box."""
    size = (image.shape[0], image.shape[1])
    boxes, scores, labels, weights = reading.boxes(output, score, iou)
    if reading.nameless:
        labels = torch.zeros_like(labels)
    elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < reading.classes:
        raise UserError(f"it finds class {int(labels.max())}, and names {reading.classes} classes")
    boxes = letterbox.undo(boxes, size)
    if prototypes is None:
        return FoundInImage(boxes, scores, labels)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    part = letterbox.part(square)
    for mask, each, box in zip(masks, weights, boxes.tolist(), strict=True):
        logits = torch.einsum("m,mhw->hw", each, prototypes.float())
        x0, y0, x1, y1 = (max(round(side), 0) for side in box)
        cut = sample(logits[None, None], part, None, size, "linear")[0, 0, 0] > 0
        mask[y0:y1, x0:x1] = cut[y0:y1, x0:x1]
    return FoundInImage(boxes, scores, labels, masks)


class _Network:
    """A session of onnxruntime on batches of any number."""

    def __init__(self, session: Any, square: tuple[int, int], where: str) -> None:
        self.session, self.where = session, where
        (given,) = session.get_inputs()
        self.name, self.dtype = given.name, np.float16 if "float16" in given.type else np.float32
        self.batch = given.shape[0] if isinstance(given.shape[0], int) else None
        self.any_size = not isinstance(given.shape[2], int)

    def __call__(self, images: Float32[np.ndarray, "B 3 H W"]) -> list[Tensor]:
        """Return the outputs for all images; those of a file for a fixed number go through it in parts."""
        step = self.batch or len(images)
        parts = []
        for start in range(0, len(images), step):
            block = images[start : start + step]
            filled = np.concatenate([block, np.repeat(block[-1:], step - len(block), axis=0)])
            try:
                outputs = self.session.run(None, {self.name: filled.astype(self.dtype)})
            except Exception as error:  # of the runtime, which has no list of them
                raise UserError(f"{self.where} does not run: {one_line(error)}") from error
            parts.append([torch.from_numpy(np.asarray(each)) for each in outputs])
        return [torch.cat(each)[: len(images)] for each in zip(*parts, strict=True)]


def _session(path: Path, where: str, device: torch.device) -> Any:
    runtime = import_library("onnxruntime", "onnx")
    provider = "CPUExecutionProvider"
    if device.type == "cuda":
        provider = "CUDAExecutionProvider"
        if provider not in runtime.get_available_providers():
            raise UserError(
                f"{where}: this onnxruntime runs on no GPU: install onnxruntime-gpu, or device=cpu"
            )
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3  # errors are raised
    options = [{"device_id": device.index or 0}] if device.type == "cuda" else [{}]
    try:
        session = runtime.InferenceSession(
            str(path), settings, providers=[provider], provider_options=options
        )
    except Exception as error:
        raise UserError(f"{where} cannot be read: {one_line(error)}") from error
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] not in (3, "channels") or "float" not in inputs[0].type:
        given = ", ".join(f"{each.type} {each.shape}" for each in inputs)
        raise UserError(f"{where} takes {given}: expected one input of images, float [B, 3, H, W]")
    return session


def _square(session: Any, metadata: dict[str, str], side: int | None, where: str) -> tuple[int, int]:
    """Rows and columns that the network gets: those of the file, those that are asked for, or the usual."""
    rows, columns = session.get_inputs()[0].shape[2:]
    if isinstance(rows, int) and isinstance(columns, int):
        return rows, columns
    if side is not None:
        return side, side
    known = _literal(metadata.get("imgsz"))
    if (
        isinstance(known, list | tuple)
        and len(known) == 2
        and all(isinstance(n, int) and n > 0 for n in known)
    ):
        return known[0], known[1]
    return USUAL_SIDE, USUAL_SIDE


def _names(text: str | None, where: str) -> tuple[str, ...] | None:
    """The names in the metadata of an export: a dict by index, or a list, as Python or JSON writes them."""
    if text is None:
        return None
    known = _literal(text)
    if isinstance(known, dict) and set(known) == set(range(len(known))):
        known = [known[index] for index in range(len(known))]
    if not isinstance(known, list | tuple) or not known or not all(isinstance(name, str) for name in known):
        raise UserError(f"{where} is damaged: its names are {text[:60]!r}")
    return tuple(known)


def _literal(text: str | None) -> Any:
    """The plain value that a text writes, never run; None where it is none."""
    try:
        found = None if text is None else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if isinstance(found, dict):  # JSON has keys of text
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: v for key, v in found.items()}
    return found
