"""What is most alike to an image, an object, a box or a patch, as each side answers it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from foveola.config import UserError
from foveola.data.sample import BadImage, Sample
from foveola.data.sources import Source, decode
from foveola.embedding.index import Index
from foveola.embedding.rows import encoded_box
from foveola.embedding.search import encode_query
from foveola.explorer.sides import Side
from foveola.figures.maps import patch_under
from foveola.models.transform import Box

MOST_ROWS = 200  # rows that are found at once
INNER = 0.25  # of a patch's side: its box is drawn in by so much, lest rounding touches its neighbours


@dataclass(frozen=True)
class Question:
    """What is asked, of one image of the data.

    Attributes:
        find: which rows are searched.
        masked: whether objects and boxes are read by their patches alone, or cut out of the image.
        object: index of an object of the image; box: x0, y0, x1, y1 in the unit square; point: x, y of a
            patch. One of them at most; none of them asks with the whole image.
        own: whether rows of the same image can be found.
    """

    image: int
    find: Literal["images", "objects", "patches"] = "images"
    masked: bool = True
    object: int | None = None
    box: Box | None = None
    point: tuple[float, float] | None = None
    own: bool = False
    top: int = 24

    @classmethod
    def of(cls, values: Any, images: int) -> "Question":
        """Return the question that a page sent. Raises UserError for one that is none."""
        if not isinstance(values, Mapping):
            raise UserError("expected an object of JSON")
        given = {name: value for name, value in values.items() if value is not None}
        if unknown := given.keys() - cls.__dataclass_fields__.keys():
            raise UserError(f"unknown key {min(map(str, unknown))!r}")
        image: Any = given.get("image")
        find, top = given.get("find", "images"), given.get("top", 24)
        whole = (image, top, given.get("object", 0))
        if any(type(number) is not int for number in whole):
            raise UserError("image, object and top are whole numbers")
        if not 0 <= image < images:  # pyright: ignore[reportOptionalOperand]
            raise UserError(f"there is no image {image}: the last is {images - 1}")
        if find not in ("images", "objects", "patches"):
            raise UserError("find: expected images, objects or patches")
        if not 1 <= top <= MOST_ROWS:
            raise UserError(f"top={top}: expected 1 to {MOST_ROWS}")
        if any(type(given.get(name, False)) is not bool for name in ("masked", "own")):
            raise UserError("masked and own are true or false")
        if len(given.keys() & {"object", "box", "point"}) > 1:
            raise UserError("object, box and point: one at most")
        for name, count in (("box", 4), ("point", 2)):
            if name in given:
                given[name] = _fractions(name, given[name], count)
        if "box" in given and not (given["box"][0] < given["box"][2] and given["box"][1] < given["box"][3]):
            raise UserError("box: expected x0 < x1 and y0 < y1")
        return cls(**given)


def _fractions(name: str, values: Any, count: int) -> tuple[float, ...]:
    fits = isinstance(values, list) and len(values) == count
    if not fits or any(type(v) not in (int, float) or not 0 <= v <= 1 for v in values):
        raise UserError(f"{name}: expected {count} numbers from 0 to 1")
    return tuple(map(float, values))


@dataclass(frozen=True)
class SideAnswer:
    """What one side found: hits as `Index.describe` has them with `similarity`, and the box that was read."""

    hits: list[dict[str, Any]]
    query_box: Box | None


def sample_at(source: Source, image: int) -> tuple[Sample, Shaped[np.ndarray, "H W C"]]:
    """Return an image with its pixels. Raises UserError for one that cannot be read."""
    try:
        sample = source[image]
        return sample, decode(sample.image)
    except BadImage as error:
        raise UserError(f"image {image} cannot be read: {error}") from error


def answer(side: Side, source: Source, question: Question) -> SideAnswer:
    """Return the rows of a side that are most alike. Raises UserError, with the reason, where it has none."""
    kind = question.find
    if kind == "objects" and not question.masked:
        kind = "crops"
    index = side.index(kind)
    vector, query_box = _vector(side, source, question, index, kind)
    own = index.rows.image_index == question.image
    more = 0 if question.own else int(own.sum()) * (len(index) // len(index.rows.name))
    found = index.search(vector, question.top + more)
    hits = [
        {"similarity": round(float(cosine), 6), **index.describe(row)}
        for cosine, row in zip(found.similarities[0], found.indices[0], strict=True)
    ]
    hits = [hit for hit in hits if question.own or hit["image_index"] != question.image]
    return SideAnswer(hits[: question.top], query_box)


def _vector(
    side: Side, source: Source, question: Question, index: Index, kind: str
) -> tuple[Tensor, Box | None]:
    """The features of what is asked, and its box: those of the file where it has them, or new ones."""
    if question.point is not None:
        row, box, cell = patch_at(side, source, question.image, question.point)
        if kind == "patches" and row is not None:
            return index.vectors[row][None], box
        x, y = INNER * (box[2] - box[0]), INNER * (box[3] - box[1])
        inner = (box[0] + x, box[1] + y, box[2] - x, box[3] - y)
        return _encoded(side, source, question, index, inner if kind == "patches" else cell), box
    if question.object is not None:
        sample = source[question.image]
        if sample.objects is None or not 0 <= question.object < len(sample.objects):
            raise UserError(f"image {question.image} has no object {question.object}")
        box = _box(sample.objects.boxes[question.object])
        known = _known(side, question, index, "objects" if question.masked else "crops", question.object)
        return (_encoded(side, source, question, index, box) if known is None else known), box
    if question.box is not None:
        return _encoded(side, source, question, index, question.box), question.box
    if kind == "patches":
        raise UserError("patches are found for a patch or a box: click into the image, or draw a box")
    known = _known(side, question, index, "images", -1)
    return (_encoded(side, source, question, index, None) if known is None else known), None


def _known(side: Side, question: Question, index: Index, kind: str, number: int) -> Tensor | None:
    """The row of an image or object in features that compare with those of the index."""
    held = side.indices.get(kind)
    if held is None or held.about["features"] != index.about["features"] or held.grid or index.grid:
        return None
    if held.about["settings"]["image_size"] != index.about["settings"]["image_size"]:
        return None
    rows = held.rows
    found = np.flatnonzero((rows.image_index == question.image) & (rows.object == number))
    return held.vectors[int(found[0])][None].float() if len(found) else None


def _encoded(side: Side, source: Source, question: Question, index: Index, box: Box | None) -> Tensor:
    """New features, as `foveola.search` has them of the same pixels and box."""
    encoder = side.need()
    sample, pixels = sample_at(source, question.image)
    height, width = pixels.shape[:2]
    corners = None
    if box is not None:
        corners = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        if index.about["settings"]["rows"] == "images" and not question.masked:
            x0, y0, x1, y1 = (round(corner) for corner in corners)
            pixels, corners = pixels[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)], None
    rows = encode_query(index, Sample(pixels, sample.name), corners, lambda: encoder)[1]
    return torch.from_numpy(rows.feature.reshape(1, -1))


def _box(numbers: Any) -> Box:
    x0, y0, x1, y1 = (float(number) for number in numbers)
    return x0, y0, x1, y1


def patch_at(
    side: Side, source: Source, image: int, point: tuple[float, float]
) -> tuple[int | None, Box, Box]:
    """Return the patch under a point: its row among the patches of the side (None: of this image there are
    none), and its box in the image, twice: as it is, and clipped to the image.

    Raises UserError for a point that the encoder does not see, and where nothing tells the grid.
    """
    index, row, grid = side.indices.get("patches"), None, None
    if index is not None and index.grid is not None:
        grid = index.grid
        rows = np.flatnonzero(index.rows.image_index == image)
        row = int(rows[0]) if len(rows) else None
    if index is not None and row is not None:
        seen = _box(index.rows.box[row])
    else:
        encoder = side.sized("patches") if index is not None else side.need()
        grid, pixels = encoder.grid, sample_at(source, image)[1]
        seen = encoded_box(pixels.shape[0], pixels.shape[1], encoder.config.transform)
    assert grid is not None
    wide, high = seen[2] - seen[0], seen[3] - seen[1]
    inside = (point[0] - seen[0]) / wide, (point[1] - seen[1]) / high
    if not (0 <= inside[0] <= 1 and 0 <= inside[1] <= 1):
        raise UserError("this encoder sees the centre of the image, and no patch here: click in the frame")
    down, across = patch_under(inside, grid)
    corner = seen[0] + across * wide / grid[1], seen[1] + down * high / grid[0]
    box = (*corner, corner[0] + wide / grid[1], corner[1] + high / grid[0])
    number = None if row is None else row * grid[0] * grid[1] + down * grid[1] + across
    return number, box, _clipped(box)


def _clipped(box: Box) -> Box:
    x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in box)
    return x0, y0, x1, y1
