"""Sample and Objects: an image as read; Canvases and Instances: a batch as the loader gives it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8
from torch import Tensor

from foveola.config import UserError
from foveola.data.decoding import ImageFile, StoredFile

ObjectChoice = Literal["area", "uniform", "largest"]

IGNORE = 255  # in a label map: of no class; such pixels count nowhere

MASK_LOOKS = 64  # samples that tell whether objects have masks, or scores
SLIVER = 1e-4  # of a mask pixel: what rounding of a box leaves over its neighbour; counts as not covered


class DataError(UserError):
    """Data that cannot be used as asked for; the message is one line."""


class BadImage(DataError):  # noqa: N818 (the word for it in the design)
    """An image that cannot be read; the message is the reason alone, as whoever asked knows the name."""


@dataclass(frozen=True, eq=False)
class Objects:
    """The K >= 1 annotated objects of one image. Where none is left, `Sample.objects` is None.

    `boxes` are (x0, y0, x1, y1) in the unit square, clipped, of positive area. `areas` are fractions of the
    image: of the mask, or of the box where there is none. `labels` are class indices. `masks` holds per
    object None (the box is the mask), a bool array [H, W], a COCO RLE ({"size": [h, w], "counts": ...}) or
    polygons ({"size": [h, w], "polygons": [[x, y, x, y, ...], ...]} in pixels); None stands for boxes alone.
    `scores` of objects that no person annotated say how sure each is; they compare within one file.
    """

    boxes: Float32[np.ndarray, "K 4"]
    areas: Float32[np.ndarray, "K"]
    labels: Int64[np.ndarray, "K"] | None = None
    masks: tuple | None = None
    scores: Float32[np.ndarray, "K"] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def from_boxes(
        cls,
        boxes: Float[np.ndarray, "K 4"],
        labels: Int64[np.ndarray, "K"] | None = None,
        masks: Sequence[Any] | None = None,
        areas: Float[np.ndarray, "K"] | None = None,
        scores: Float32[np.ndarray, "K"] | None = None,
    ) -> "Objects | None":
        """Return objects from boxes in units of the image, corners in any order. Clips; drops what has no
        area.

        Returns None when nothing is left. `areas` (fractions of the image) defaults to the boxes' areas.
        """
        corners = boxes.reshape(-1, 2, 2)
        corners = np.concatenate([corners.min(1), corners.max(1)], 1).clip(0, 1).astype(np.float32)
        size = corners[:, 2:] - corners[:, :2]
        fractions = size.prod(1) if areas is None else areas.astype(np.float32)
        keep = np.flatnonzero((size > 0).all(1) & (fractions > 0))
        if not len(keep):
            return None
        return cls(
            boxes=corners[keep],
            areas=fractions[keep],
            labels=None if labels is None else labels[keep],
            masks=None if masks is None else tuple(masks[i] for i in keep.tolist()),
            scores=None if scores is None else scores[keep],
        )

    def draw(self, index: int, size: int) -> UInt8[np.ndarray, "size size"]:
        """Return the covered fraction of each pixel of a square mask canvas, times 255; exact for boxes and
        masks.

        A pixel that is touched at all gets at least 1, so that no object vanishes, however small. A mask
        without a pixel (polygons can be thinner than one) is drawn as its box.
        """
        mask = None if self.masks is None else self.masks[index]
        full = None if mask is None else full_mask(mask)
        if full is None or not full.any():
            x0, y0, x1, y1 = self.boxes[index].astype(np.float64) * size
            coverage = np.outer(_overlap(y0, y1, size), _overlap(x0, x1, size))
        else:
            rows, columns = _extent(np.any(full, axis=1)), _extent(np.any(full, axis=0))
            down = area_weights(full.shape[0], size)[:, rows]
            across = area_weights(full.shape[1], size)[:, columns]
            coverage = down @ full[rows, columns].astype(np.float32) @ across.T
        drawn = np.rint(255 * coverage).clip(0, 255)
        return np.where(coverage > SLIVER**2, np.maximum(drawn, 1), 0).astype(np.uint8)

    def draw_in_box(self, index: int, size: int) -> UInt8[np.ndarray, "size size"]:
        """Return the fraction that an object covers of each cell of a square over its own box, times 255.

        What lies outside of the box is left out. All is covered where the box is the mask, and where a mask
        has no pixel within its box (polygons can be thinner than one).
        """
        mask = None if self.masks is None else self.masks[index]
        if mask is not None:
            full = full_mask(mask)
            x0, y0, x1, y1 = self.boxes[index].astype(np.float64)
            rows, down = _cells(y0, y1, full.shape[0], size)
            columns, across = _cells(x0, x1, full.shape[1], size)
            inner = full[rows, columns]
            if inner.any():
                coverage = down @ inner.astype(np.float32) @ across.T
                return np.rint(255 * coverage).clip(0, 255).astype(np.uint8)
        return np.full((size, size), 255, np.uint8)

    def choose(self, rng: np.random.Generator, count: int, by: ObjectChoice) -> Int64[np.ndarray, "count"]:
        """Draw `count` objects, none twice before all were drawn once.

        "area": with a probability proportional to the area in the whole image (ODIS, section 3: large
        objects are seen more often); "uniform"; "largest": always the largest first.
        """
        if by == "largest":
            order = np.argsort(-self.areas, kind="stable")
            return np.resize(order, count).astype(np.int64)
        fractions = self.areas.astype(np.float64) / self.areas.sum(dtype=np.float64) if by == "area" else None
        rounds = []
        for start in range(0, count, len(self)):
            rounds.append(rng.choice(len(self), min(len(self), count - start), replace=False, p=fractions))
        return np.concatenate(rounds).astype(np.int64) if rounds else np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Sample:
    """An image as a source knows it: where its pixels are, its objects (None: not annotated), class.

    `crowds` are regions of objects that nobody told apart (COCO's `iscrowd`): they count as nothing, neither
    as objects nor as background. `objects` never holds them. `label` is the class of the image; of images
    that may have several, `labels` are all of them, perhaps none.
    """

    image: StoredFile | bytes | ImageFile | Shaped[np.ndarray, "H W C"]
    name: str
    objects: Objects | None = None
    label: int | None = None
    crowds: Objects | None = None
    labels: tuple[int, ...] | None = None

    def all_classes(self) -> set[int]:
        """Return all classes of the image: its labels, or else those of its objects."""
        if self.labels is not None:
            return set(self.labels)
        known = [each.labels for each in (self.objects, self.crowds) if each is not None]
        return {int(label) for labels in known if labels is not None for label in labels if label >= 0}


class Instances(NamedTuple):
    """The T >= 0 annotated objects of the images of a batch, those of an image together, crowds last.

    `image` is the row of the batch, `boxes` are (x0, y0, x1, y1) in the unit square, `labels` class indices
    (-1 unknown). Where `crowd` is true, a region counts as nothing. `masks` are the fractions of the cells of
    each instance's own box that it covers, times 255 (`Objects.draw_in_box`); None where objects are boxes.
    """

    image: Int64[Tensor, "T"]
    boxes: Float32[Tensor, "T 4"]
    labels: Int64[Tensor, "T"]
    crowd: Bool[Tensor, "T"]
    masks: UInt8[Tensor, "T s s"] | None

    @classmethod
    def of(
        cls, images: Sequence[tuple[Objects | None, Objects | None]], mask_size: int | None
    ) -> "Instances":
        """Return the objects and crowds of images; masks of `mask_size` cells a side. None: no masks."""
        found = [
            (row, each, bool(crowd))
            for row, both in enumerate(images)
            for crowd, each in enumerate(both)
            if each is not None
        ]
        count = sum(len(each) for _, each, _ in found)
        image, labels = np.zeros(count, np.int64), np.full(count, -1, np.int64)
        boxes, crowds = np.zeros((count, 4), np.float32), np.zeros(count, bool)
        masks = None if mask_size is None else np.zeros((count, mask_size, mask_size), np.uint8)
        end = 0
        for row, objects, crowd in found:
            part = slice(end, end + len(objects))
            image[part], boxes[part], crowds[part] = row, objects.boxes, crowd
            if objects.labels is not None:
                labels[part] = objects.labels
            if masks is not None:
                for index in range(len(objects)):
                    masks[end + index] = objects.draw_in_box(index, masks.shape[1])
            end = part.stop
        return cls(
            torch.from_numpy(image),
            torch.from_numpy(boxes),
            torch.from_numpy(labels),
            torch.from_numpy(crowds),
            None if masks is None else torch.from_numpy(masks),
        )


class Chosen(NamedTuple):
    """The M objects of each image that are trained on: which of its objects, and what is known of them.

    `which` is the index among the image's objects: the same number twice is the same object, drawn again
    since there are fewer than M. `areas` are fractions of the image; `scores` are 1 where nobody gave any.
    The image as a whole, where there are no objects, is object 0.
    """

    which: Int64[Tensor, "B M"]
    areas: Float32[Tensor, "B M"]
    scores: Float32[Tensor, "B M"]


def have_masks(source: Any) -> bool:
    """Return whether objects of a source have masks of their own, rather than boxes alone.

    The same for a run as a whole: up to `MASK_LOOKS` of its samples, spread evenly, are looked at.
    """
    return any(any(mask is not None for mask in objects.masks or ()) for objects in _looked_at(source))


def have_scores(source: Any) -> bool:
    """Return whether objects of a source have scores; as many are looked at as for `have_masks`."""
    return any(objects.scores is not None for objects in _looked_at(source))


def _looked_at(source: Any) -> Iterator[Objects]:
    spread = np.linspace(0, len(source) - 1, min(MASK_LOOKS, len(source)))
    for index in np.unique(spread.astype(int)).tolist():
        try:
            sample = source[index]
        except (BadImage, OSError):
            continue
        if sample.objects is not None:
            yield sample.objects


@dataclass(frozen=True, eq=False)
class Canvases:
    """A batch as the loader gives it. M objects per image; unknown labels are -1.

    `images` have K channels of uint8 or uint16, each in the upper left of a canvas of R x C pixels; `extents`
    are the rows and columns that it fills, which stand for the unit square, and `aspects` is width / height
    of the true images.
    `object_masks` are coverage times 255 on a square that the unit square fills. Where `whole` is true the
    object is the whole image (no annotation) and its mask is all 255. `indices` are positions in the
    source. `skipped` counts bad images that were replaced. `label_maps` (classes, IGNORE for none and beyond
    each image), `instances` and `classes` (which of all classes an image has) are there where a task reads
    them; `chosen` tells more of the objects.
    """

    images: Shaped[Tensor, "B K R C"]
    extents: Int64[Tensor, "B 2"]
    aspects: Float32[Tensor, "B"]
    object_masks: UInt8[Tensor, "B M s s"]
    whole: Bool[Tensor, "B M"]
    object_labels: Int64[Tensor, "B M"]
    labels: Int64[Tensor, "B"]
    indices: Int64[Tensor, "B"]
    skipped: int = 0
    chosen: Chosen | None = None
    label_maps: UInt8[Tensor, "B R C"] | None = None
    instances: Instances | None = None
    classes: Bool[Tensor, "B classes"] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        """The bytes of the batch, as it goes from a worker to the training process."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device | str) -> "Canvases":
        """Return the same batch on `device`; asynchronous where the memory is pinned.

        `aspects` stay on the CPU, where boxes are drawn: a GPU would have to be waited for.
        """
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, aspects=self.aspects)

    def pin_memory(self) -> "Canvases":
        """Return the same batch in page-locked memory, from which a copy to a GPU overlaps with compute."""
        return self._each(lambda tensor: tensor.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of the batch."""
        seen: list[Tensor] = []
        self._each(lambda tensor: seen.append(tensor) or tensor)
        yield from seen

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Canvases":
        def changed(value: Any) -> Any:
            if isinstance(value, Instances | Chosen):
                return type(value)(*map(changed, value))
            return change(value) if isinstance(value, Tensor) else value

        return Canvases(**{f.name: changed(getattr(self, f.name)) for f in fields(self)})


def full_mask(mask: Any) -> Bool[np.ndarray, "H W"]:
    """Return any kind of mask that `Objects.masks` may hold, as pixels of the image it was drawn on."""
    if isinstance(mask, np.ndarray):
        return mask
    from pycocotools import mask as coco

    if "polygons" in mask:
        mask = coco.merge(coco.frPyObjects(mask["polygons"], *mask["size"]))
    elif isinstance(mask["counts"], list):  # uncompressed
        mask = coco.frPyObjects(mask, *mask["size"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 on numpy 2
        return coco.decode(mask).astype(bool)


@lru_cache(maxsize=256)
def area_weights(inputs: int, outputs: int) -> Float32[np.ndarray, "outputs inputs"]:
    """Return the fraction of each output cell that each input cell covers, both dividing the same unit
    interval.
    """
    edges_in, edges_out = np.arange(inputs + 1) / inputs, np.arange(outputs + 1)[:, None] / outputs
    shared = np.minimum(edges_in[1:], edges_out[1:]) - np.maximum(edges_in[:-1], edges_out[:-1])
    weights = shared.clip(0) * outputs
    weights[weights < SLIVER] = 0
    return weights.astype(np.float32)


def _cells(
    low: float, high: float, inputs: int, outputs: int
) -> tuple[slice, Float32[np.ndarray, "outputs n"]]:
    """The input cells of the unit interval that `low` to `high` touches, and the fraction of each of
    `outputs` cells, which divide that, that each of them covers.
    """
    edges = np.linspace(low, high, outputs + 1)[:, None] * inputs
    inner = slice(int(np.floor(low * inputs)), min(int(np.ceil(high * inputs)), inputs))
    cells = np.arange(inner.start, inner.stop)
    shared = np.minimum(edges[1:], cells + 1) - np.maximum(edges[:-1], cells)
    return inner, (shared.clip(0) * (outputs / ((high - low) * inputs))).astype(np.float32)


def _overlap(start: float, end: float, size: int) -> Float[np.ndarray, "size"]:
    """The covered fraction of each of `size` unit cells by the interval from `start` to `end`."""
    cells = np.arange(size)
    shared = np.minimum(end, cells + 1) - np.maximum(start, cells)
    return np.where(shared >= min(SLIVER, (end - start) / 4), shared, 0)


def _extent(flags: Bool[np.ndarray, "N"]) -> slice:
    """Return the slice from the first true flag to the last; at least one flag is true."""
    found = np.flatnonzero(flags)
    return slice(found[0], found[-1] + 1)
