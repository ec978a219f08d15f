"""Images to rows of features with what each is of, read and encoded as evaluations do, part by part."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor

from foveola.config import UserError, key
from foveola.data.sample import Sample
from foveola.data.sources import Source, decode
from foveola.evaluation.classification.linear import joined_features, joined_width, split_features
from foveola.evaluation.features.encoding import FeatureReader, checked
from foveola.evaluation.features.need import check_features, need, shape_of
from foveola.evaluation.features.table import ExtractConfig, RowsCut, object_tokens
from foveola.evaluation.images import PARCEL, Batches, ImageRows, Images, MaskedConfig, join
from foveola.models.encoder import Encoder
from foveola.models.transform import Box, TransformConfig, image_crop

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# Of objects, what can be read of their patches alone.
OBJECT_FEATURES = ("token", "average", "predictor")


@dataclass(frozen=True)
class EmbedConfig(MaskedConfig):
    """Which rows a file has, and how they are computed. Defaults: one row an image, as k-NN reads it."""

    rows: Literal["images", "objects", "patches"] = key(
        "images", "one row for each image, for each object, or for each image the features of all its patches"
    )
    features: str | None = key(
        None,
        "token, token4 (last 4 blocks), average, token+average, predictor, attention, ...; null = the "
        "encoder's own pooling",
    )
    masks: bool | None = key(
        None,
        "read only the patches of the object, or of all objects of the image; null = true for rows=objects",
    )
    view: Literal["image", "object"] = key(
        "image", "what the encoder sees of an object: its whole image, or a crop of it"
    )
    context: float = key(
        0.5, "view=object: the crop's side is 1 + this times the longer side of the object's box", at_least=0
    )
    image_size: int | None = key(
        None, "pixels a side of the square that is encoded; null = the encoder's crop", at_least=1
    )
    store: Literal["float32", "float16"] = key("float32", "number format of the features in the file")

    def __post_init__(self) -> None:
        if self.view == "object" and self.rows != "objects":
            raise ValueError("view=object needs rows=objects")
        if self.rows == "patches" and self.features not in (None, "patches"):
            raise ValueError(f"rows=patches are patches: leave out features={self.features}")

    def unread(self) -> dict[str, str]:
        """Return keys that change nothing with these settings, and why."""
        idle = {}
        if self.limit is None:
            idle["seed"] = "it draws the images that limit= leaves"
        if self.view != "object":
            idle["context"] = "it is for view=object"
        if self.rows == "patches":
            idle["masks"] = "all patches are written, whatever objects cover"
        if self.masks is False or (self.masks is None and self.rows != "objects"):
            idle |= dict.fromkeys(("mask_canvas", "min_coverage"), "no mask is read: masks=true reads them")
        return idle

    def masked(self, source: Source) -> bool:
        """Return whether rows of a source are read with masks. Raises UserError for objects that it lacks."""
        wanted = self.rows == "objects" if self.masks is None else self.masks
        if (wanted or self.rows == "objects") and not source.has_objects:
            asked = "rows=objects" if self.rows == "objects" else "masks=true"
            raise UserError(f"{asked}, but {source.name} has neither boxes nor masks")
        return wanted


class FeatureRows(NamedTuple):
    """n rows of a file, or of a part of it, as NumPy arrays by the names of the columns."""

    feature: np.ndarray  # [n, D], or [n, h, w, D] of patches; float32 or float16
    name: np.ndarray  # of the image, as its source has it; text
    label: np.ndarray  # name of the class of the image or object; "" = unknown; text
    label_index: Int64[np.ndarray, "n"]  # -1 = unknown
    image_index: Int64[np.ndarray, "n"]  # in the source
    object: Int64[np.ndarray, "n"]  # index of the object in its image; -1 = the image
    box: Float32[np.ndarray, "n 4"]  # of what the row is about, in the unit square of its image
    width: Int64[np.ndarray, "n"]  # of the image, in pixels
    height: Int64[np.ndarray, "n"]
    masked: Shaped[np.ndarray, "n"]  # whether only the patches of the object were read; bool
    readable: Float32[np.ndarray, "n"]  # fraction of the patches that were read


class _Cut(NamedTuple):
    """What a worker sends of some images: the rows of evaluations, and what else the file says of them."""

    image_indices: Int64[Tensor, "R"]
    rows: dict[str, Tensor]  # of `ImageRows`
    names: tuple[str, ...]
    boxes: Float32[Tensor, "R 4"]
    sizes: Int64[Tensor, "R 2"]


class RowsWithNames:
    """Makes the rows of an image as evaluations make them, with names, boxes, and sizes."""

    def __init__(self, transform: TransformConfig, patch: int, config: EmbedConfig, masked: bool) -> None:
        self.transform, self.masked, self.rows = transform, masked, config.rows
        names = ("view", "context", "mask_canvas", "min_coverage")
        settings: dict[str, Any] = {name: getattr(config, name) for name in names}
        kind = "objects" if config.rows == "objects" else "images"
        self.cut = RowsCut(transform, patch, ExtractConfig(rows=kind, **settings))

    def __call__(self, sample: Sample, index: int) -> _Cut:
        """All rows of one image. Raises BadImage."""
        image = decode(sample.image)
        objects = sample.objects if self.masked or self.rows == "objects" else None
        rows = self.cut(replace(sample, image=image, objects=objects), index)
        height, width = image.shape[:2]
        boxes = torch.tensor([WHOLE]).repeat(len(rows.labels), 1)
        if self.rows == "objects" and objects is not None:
            boxes = torch.from_numpy(objects.boxes)
        elif self.rows == "patches":
            boxes = torch.tensor([encoded_box(height, width, self.transform)])
        names, sizes = (sample.name,) * len(boxes), torch.tensor([[width, height]]).repeat(len(boxes), 1)
        return _Cut(rows.image_indices, rows._asdict(), names, boxes, sizes)


def encoded_box(height: int, width: int, transform: TransformConfig) -> Box:
    """Return the box of an image, of a size in pixels, that the encoder sees."""
    (high, wide), (top, left) = image_crop(height, width, transform)
    side = transform.crop
    return left / wide, top / high, (left + side) / wide, (top + side) / high


class Embedding:
    """The rows of a source by an encoder, as an `EmbedConfig` asks for them.

    Raises UserError for features that the encoder has not, and objects that the source has not.
    """

    def __init__(
        self, encoder: Encoder, source: Source, config: EmbedConfig, *, progress: bool = False
    ) -> None:
        side = config.image_size
        self.encoder = encoder if side is None else encoder.sized(side, "image_size")
        self.source, self.config, self.progress = source, config, progress
        self.masked = config.masked(source)
        self.features = "patches" if config.rows == "patches" else config.features or encoder.config.pool
        self.reader = FeatureReader(self.encoder, config.precision)
        if config.rows == "patches":
            width = shape_of(self.encoder, "patches", need("patches"))[-1]
            self.parts, self.shape = [("patches", 1)], (*self.encoder.grid, width)
        else:
            self.parts = split_features(self.features)
            self.shape = (joined_width(self.encoder, self.features),)
        names = [name for name, _ in self.parts]
        check_features(self.encoder, names, max(layers for _, layers in self.parts))
        if self.masked:
            for name in names:
                if name not in OBJECT_FEATURES:
                    known = ", ".join(OBJECT_FEATURES)
                    raise UserError(f"features={name} of the patches of an object: valid are {known}")
            check_features(self.encoder, ["masked"] if "token" in names else [], 1)

    def read(self, chosen: Int64[np.ndarray, "n"], together: int) -> Iterator[tuple[int, FeatureRows]]:
        """Yield (number, rows) of each `together` images (a multiple of 8) of `chosen`, in their order.

        An image that cannot be read has no row. What is encoded at once never goes beyond a part, so the
        numbers of a part depend on nothing but its images.
        """
        transform, patch = self.encoder.config.transform, self.encoder.patch_size
        cut = RowsWithNames(transform, patch, self.config, self.masked)
        label = f"features of {self.source.name}"
        images = Images(self.source, chosen, cut)
        batches: Batches[_Cut] = Batches(images, self.config, label, self.progress)
        groups = groupby(batches.parcels(), lambda parcel: parcel[0] // (together // PARCEL))
        group = next(groups, None)
        for number in range(-(-len(chosen) // together)):
            parts = [self._rows([])]  # of a part in which no image can be read there is no more
            if group is not None and group[0] == number:
                parts += [self._rows(waiting) for waiting in self._batches(made for _, made in group[1])]
                group = next(groups, None)
            yield number, joined_rows(parts)

    def _batches(self, parcels: Iterator[_Cut]) -> Iterator[list[_Cut]]:
        waiting: list[_Cut] = []
        for parcel in parcels:
            waiting.append(parcel)
            if sum(len(each.names) for each in waiting) >= self.config.batch_size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _rows(self, parcels: list[_Cut]) -> FeatureRows:
        """The rows of one batch."""
        if not parcels:
            none = np.zeros(0, np.int64)
            feature, text = np.zeros((0, *self.shape), self.config.store), np.zeros(0, "<U1")
            empty = np.zeros(0, np.float32)
            ends = none, none, none.astype(bool), empty
            return FeatureRows(feature, text, text, none, none, none, np.zeros((0, 4), np.float32), *ends)
        made = join(parcels)
        rows = ImageRows(**made.rows)
        found = checked(self._encode(rows), self.config.store, rows.image_indices, self.source)
        classes = self.source.classes
        labels = [
            "" if label < 0 else str(label) if classes is None else classes[label]
            for label in rows.labels.tolist()
        ]
        whole = torch.ones(len(rows.labels))
        return FeatureRows(
            feature=found.reshape(-1, *self.shape).numpy(),
            name=np.array(made.names, dtype=np.str_),
            label=np.array(labels, dtype=np.str_),
            label_index=rows.labels.numpy(),
            image_index=rows.image_indices.numpy(),
            object=rows.objects.numpy(),
            box=made.boxes.numpy(),
            width=made.sizes[:, 0].numpy(),
            height=made.sizes[:, 1].numpy(),
            masked=rows.has_mask.numpy() & self.masked,
            readable=(rows.masks.float().mean(dim=1) if self.masked else whole).numpy(),
        )

    def _encode(self, rows: ImageRows) -> Float32[Tensor, "R ..."]:
        size = self.config.batch_size
        if self.masked:
            numbers = torch.arange(len(rows.labels)).split(size)
            return torch.cat([self._objects(rows.images[rows.image_of[i]], rows.masks[i]) for i in numbers])
        names, layers = {name for name, _ in self.parts}, max(layers for _, layers in self.parts)
        wanted = need(*names, layers=layers)
        every = torch.ones(len(rows.images), rows.masks.shape[1], dtype=torch.bool)
        training, found = self.encoder.training, []
        for images, masks in zip(rows.images.split(size), every.split(size), strict=True):
            x = self.reader(images, masks, wanted)
            found.append(x["patches"] if "patches" in names else joined_features(x, self.features))
        self.encoder.train(training)
        return torch.cat(found)[rows.image_of]

    def _objects(self, images: Tensor, masks: Tensor) -> Float32[Tensor, "b D"]:
        """What the patches of one object give of each image."""
        columns, training = [], self.encoder.training
        for name, layers in self.parts:
            if name == "token" and layers > 1:
                found = self.reader(images, masks, need("masked", layers=layers))["masked"].flatten(1)
            else:
                pixels = self.encoder.normalise(images.to(self.encoder.device))
                found = object_tokens(self.encoder.pooled(name), pixels, masks, self.config.precision)
            columns.append(found)
        self.encoder.train(training)
        return torch.cat(columns, dim=1)


def joined_rows(parts: list[FeatureRows]) -> FeatureRows:
    """Return the rows of several parts, at least one, one after the other."""
    return FeatureRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
