"""Encoder x source -> rows of features: images or objects, with and without masks, in a fixed order.

An image is decoded and resized once, however many rows it gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, key
from foveola.data.identity import identity_of
from foveola.data.sample import Sample
from foveola.data.sources import Source, decode
from foveola.evaluation.images import (
    Batches,
    ImageRows,
    Images,
    MaskedConfig,
    PatchMasks,
    choose_images,
    facts_of_bad,
    rows_of,
    slice_of_rank,
)
from foveola.models.encoder import Encoder
from foveola.models.transform import TransformConfig, crop_view, evaluation_view

# -- which rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtractConfig(MaskedConfig):
    """Which rows a source gives and how they are computed. Defaults: one row an image, as published."""

    rows: Literal["images", "objects"] = key("images", "one feature for each image, or for each object")
    view: Literal["image", "object"] = key(
        "image", "what the encoder sees of an object: its whole image, or a crop of it"
    )
    context: float = key(
        0.5, "view=object: the crop's side is 1 + this times the longer side of the object's box", at_least=0
    )
    pool: Literal["token", "average", "predictor"] | None = key(
        None, "what stands for an image or object: its token, or the mean of its patches or predictions"
    )

    def __post_init__(self) -> None:
        if self.view == "object" and self.rows != "objects":
            raise ValueError("view=object needs rows=objects")


def object_crop(
    box: Float32[np.ndarray, "4"], height: int, width: int, context: float
) -> tuple[int, int, int, int]:
    """Return whole pixels (x0, y0, x1, y1) of a square around an object's box, moved into the image.

    Its side is (1 + context) times the longer side of the box in true pixels. A square that is larger than
    the image in one direction is cut there, and the crop is then no longer square.
    """
    x0, y0, x1, y1 = box.astype(np.float64) * (width, height, width, height)
    side = max(1, round((1 + context) * max(x1 - x0, y1 - y0)))
    (left, right), (upper, lower) = _within(x0 + x1, side, width), _within(y0 + y1, side, height)
    return left, upper, right, lower


def _within(twice: float, side: int, extent: int) -> tuple[int, int]:
    """Both ends of a side around twice / 2, moved or else cut to lie in 0 to extent."""
    length = min(side, extent)
    start = min(max(round((twice - length) / 2), 0), extent - length)
    return start, start + length


class RowsCut:
    """Makes the rows of an image that an `ExtractConfig` asks for."""

    def __init__(self, transform: TransformConfig, patch_size: int, config: ExtractConfig) -> None:
        self.transform, self.config = transform, config
        self.masks = PatchMasks(transform, patch_size, config)

    def __call__(self, sample: Sample, index: int) -> ImageRows:
        """All rows of one image; one without annotation is one row. Raises BadImage."""
        image, objects = decode(sample.image), sample.objects
        single = self.config.rows == "objects" and objects is not None
        every = range(0 if objects is None else len(objects))
        targets = [(j,) for j in every] if single else [tuple(every)]
        if self.config.view == "object" and objects is not None:
            height, width = image.shape[:2]
            crops = [object_crop(objects.boxes[j], height, width, self.config.context) for (j,) in targets]
            views = [crop_view(image, crop, self.transform) for crop in crops]
        else:
            views = [evaluation_view(image, self.transform)]
        seen = views if len(views) == len(targets) else views * len(targets)
        masks = [self.masks(objects, target, view.box) for target, view in zip(targets, seen, strict=True)]
        rows = rows_of(sample, index, views, masks, self.masks.grid)
        if not single or objects is None:
            return rows
        rows = rows._replace(objects=torch.arange(len(objects)))
        return rows if objects.labels is None else rows._replace(labels=torch.from_numpy(objects.labels))


# -- their features ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """R rows of features, on the CPU, in the order of the source (objects in the order of their image)."""

    features: Float32[Tensor, "R D"]
    labels: Int64[Tensor, "R"]  # -1: unknown
    image_indices: Int64[Tensor, "R"]  # index of the image in its source
    objects: Int64[Tensor, "R"]  # index of the object in its image; -1: the image, or all of its objects
    has_mask: Bool[Tensor, "R"]  # False: no annotation, or none of it visible, so the whole view is read
    readable: Float32[Tensor, "R"]  # fraction of the patches that the object token may read

    def select(self, rows: Tensor) -> "FeatureTable":
        """Return the rows given by a boolean mask or by indices."""
        return FeatureTable(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def extract(
    encoder: Encoder,
    source: Source,
    *,
    masks: bool,
    config: ExtractConfig | None = None,
    progress: bool = True,
) -> FeatureTable:
    """Return features of the rows of `source`: object tokens that read their object (`masks`), or class
    tokens.
    """
    tables, _ = extract_tables(encoder, source, (masks,), config or ExtractConfig(), progress=progress)
    return tables[0]


def extract_tables(
    encoder: Encoder, source: Source, masks: Sequence[bool], config: ExtractConfig, *, progress: bool = True
) -> tuple[tuple[FeatureTable, ...], dict[str, Any]]:
    """Return one table for each entry of `masks` from one reading of the images, and facts about the data.

    Every rank reads its part of the images and gets all rows. Memory is that of the tables, one batch, and
    what the workers hold ready. Each row is encoded on its own: an object's feature does not depend on its
    neighbours.

    Raises UserError when there is no row, when more than 1 % of the images cannot be read, and for features
    that are not finite.
    """
    encoder = encoder.pooled(config.pool)
    chosen = choose_images(len(source), config.limit, config.seed)
    cut = RowsCut(encoder.config.transform, encoder.patch_size, config)
    images = Images(source, chosen[slice_of_rank(len(chosen))], cut)
    batches: Batches[ImageRows] = Batches(images, config, f"features of {source.name}", progress)
    features = [_Growing(len(images.chosen), encoder.width) for _ in masks]
    numbers, flags = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    done = [(numbers, numbers, numbers, flags, torch.zeros(0))]
    for batch in batches:
        for table, part in zip(features, _encode(encoder, batch, masks, config), strict=True):
            table.add(part)
        readable = batch.masks.float().mean(dim=1)
        done.append((batch.labels, batch.image_indices, batch.objects, batch.has_mask, readable))
    facts = facts_of_bad(batches.gathered_bad(), len(chosen), source)
    names = ("labels", "image_indices", "objects", "has_mask", "readable")
    joined = (distributed.gather_rows(torch.cat(column)) for column in zip(*done, strict=True))
    columns = dict(zip(names, joined, strict=True))
    if not len(columns["labels"]):
        raise UserError(f"{source.name}: no {config.rows} in {len(chosen)} images")
    tables = tuple(FeatureTable(distributed.gather_rows(table.rows()), **columns) for table in features)
    for table in tables:
        check_finite(table.features, table.image_indices, source)
    facts |= {
        "rows": len(columns["labels"]),
        "rows_with_mask": int(columns["has_mask"].sum()),
        "rows_reading_everything": int((columns["readable"] == 1).sum()),
        "mean_readable": round(columns["readable"].double().mean().item(), 4),
    }
    return tables, {
        "name": source.name,
        "fingerprint": identity_of(source, chosen).digest,
        "images": len(chosen),
        **facts,
    }


class _Growing:
    """Rows appended to one block of memory: there is a second copy only while the block grows."""

    def __init__(self, expected: int, width: int) -> None:
        self.block, self.count = torch.empty(expected, width), 0

    def add(self, rows: Float32[Tensor, "n D"]) -> None:
        needed = self.count + len(rows)
        if needed > len(self.block):
            larger = torch.empty(max(needed, len(self.block) * 3 // 2), self.block.shape[1])
            larger[: self.count] = self.rows()
            self.block = larger
        self.block[self.count : needed] = rows
        self.count = needed

    def rows(self) -> Float32[Tensor, "n D"]:
        return self.block[: self.count]


def _encode(
    encoder: Encoder, rows: ImageRows, masks: Sequence[bool], config: ExtractConfig
) -> list[Float32[Tensor, "R D"]]:
    every = torch.ones(len(rows.labels), dtype=torch.bool)
    plain = None
    if False in masks:  # the class token of an image is the same for all of its rows
        plain = _tokens_of(encoder, rows.images, None, config)[rows.image_of]
    masked = None
    if True in masks:
        # An object token that reads everything is the class token: where known, it is not computed again.
        new = every if plain is None else ~rows.masks.all(dim=1)
        masked = torch.zeros(len(every), encoder.width) if plain is None else plain.clone()
        masked[new] = _tokens_of(encoder, rows.images, rows.masks[new], config, rows.image_of[new])
    return [t for with_masks in masks if (t := masked if with_masks else plain) is not None]


def _tokens_of(
    encoder: Encoder,
    images: Shaped[Tensor, "V ch S S2"],
    masks: Bool[Tensor, "R N"] | None,
    config: ExtractConfig,
    image_of: Int64[Tensor, "R"] | None = None,
) -> Float32[Tensor, "R D"]:
    """Object tokens (row r reads `masks[r]` of `images[image_of[r]]`); without masks, class tokens."""
    order = torch.arange(len(images)) if image_of is None else image_of
    parts = [torch.zeros(0, encoder.width)]
    for rows in torch.arange(len(order)).split(config.batch_size):
        pixels = encoder.normalise(images[order[rows]].to(encoder.device))
        parts.append(object_tokens(encoder, pixels, None if masks is None else masks[rows], config.precision))
    return torch.cat(parts)


@torch.inference_mode()
def object_tokens(
    encoder: Encoder, pixels: Float[Tensor, "B ch H W"], masks: Bool[Tensor, "B N"] | None, precision: str
) -> Float32[Tensor, "B D"]:
    """Return one object token for each normalised image, float32 on the CPU; without masks the class
    token.
    """
    training = encoder.training
    encoder.eval()
    try:
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=precision == "bf16"):
            objects = None if masks is None else masks[:, None].to(encoder.device)
            return encoder.tokens(pixels.to(encoder.device), objects)[:, 0].float().cpu()
    finally:
        encoder.train(training)


# -- what is asked for, and trouble --------------------------------------------------------------------------


def without_objects(encoder: Encoder, pool: str | None, masks: str | bool) -> bool:
    """Return whether masks are left out though they are not forbidden: of wrapped networks only means of
    patches can have them.
    """
    return encoder.wrapped and masks == "both" and (pool or encoder.config.pool) == "token"


def mask_modes(
    masks: str | bool, train: Source | None, test: Source, encoder: Encoder, pool: str | None
) -> tuple[tuple[bool, ...], list[str]]:
    """Return which tables the setting `masks` asks for, plain first, given what the data and the encoder can
    provide; and notes.
    """
    if masks is False:
        return (False,), []
    if test.has_objects and without_objects(encoder, pool, masks):
        return (False,), ["a wrapped network has no object tokens, so whole images alone are read"]
    if not test.has_objects:
        if masks is True:
            raise UserError(f"masks=true, but {test.name} has neither boxes nor masks")
        return (False,), [f"{test.name} has neither boxes nor masks: whole images alone are read"]
    notes = []
    if train is not None and not train.has_objects:
        notes.append(f"{train.name} has neither boxes nor masks: its features are of whole images")
    return ((False, True) if masks == "both" else (True,)), notes


def check_finite(features: Float32[Tensor, "R D"], image_indices: Int64[Tensor, "R"], source: Source) -> None:
    """Raise UserError, naming an image, unless every feature is finite."""
    broken = ~torch.cat([part.isfinite().all(dim=1) for part in features.split(65536)])
    if broken.any():
        name = source[int(image_indices[broken][0])].name
        raise UserError(
            f"features of {int(broken.sum())} of {len(features)} rows of {source.name} are not finite "
            f"(first: {name}): is the encoder damaged, or its training diverged?"
        )
