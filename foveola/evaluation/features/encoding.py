"""Images to features, batch by batch: what a pass computes, before it is stored or used."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foveola.config import UserError, key
from foveola.data.sources import Source
from foveola.evaluation.features.crops import CropsCut, by_image
from foveola.evaluation.features.names import FeatureReader, Need
from foveola.evaluation.features.reading import ImageRows
from foveola.evaluation.images import Batches, Images, MaskedConfig
from foveola.evaluation.segmentation.labelled import LabelledCut
from foveola.models.encoder import Encoder


@dataclass(frozen=True)
class FeedConfig(MaskedConfig):
    """How images become stored features."""

    store: Literal["float32", "float16"] = key("float32", "number format of stored features")


@dataclass(frozen=True, eq=False)
class Encoded:
    """Features of p images, in `wide` views each, on the CPU."""

    image_indices: Int64[Tensor, "p"]  # index in the source
    kinds: dict[str, Tensor]  # of each wanted kind [p, wide, ...]; `maps` are uint8, the others float32
    columns: dict[str, Tensor]  # `labels`; with kind `masked` `has_mask` and `readable` of the first view


class Encoding:
    """The images of a source in `1 + views` views, or squashed to `need.side`, encoded batch by batch.

    `seconds` says how long images were waited for, and how long they were encoded; `bad` are the images that
    could not be read.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: Any,
        config: FeedConfig,
        need: Need,
        views: int = 0,
        progress: bool = True,
    ) -> None:
        self.encoder, self.source, self.config, self.need = encoder, source, config, need
        self.views, self.progress = views, progress
        self.masked = "masked" in need.kinds  # otherwise no object mask is drawn
        self.bad: list[int] = []
        self.seconds = {"data_wait": 0.0, "encoder": 0.0}

    def batches(self, mine: Int64[np.ndarray, "t"]) -> Iterator[Encoded]:
        """Yield features of the images `mine`, in their order. Raises DataError for a label map of no use."""
        reader, training = FeatureReader(self.encoder, self.config.precision), self.encoder.training
        batches: Batches[ImageRows] = Batches(
            Images(self.source, mine, self._cut()),
            self.config,
            f"features of {self.source.name}",
            self.progress,
        )
        self.bad = batches.bad
        for rows in batches:
            self.seconds["data_wait"] = batches.waited
            began = perf_counter()
            images, masks, first = by_image(rows, self.views)
            kinds = self._encode(reader, images, masks)
            self.encoder.train(training)
            if "maps" in self.need.kinds:
                kinds["maps"] = rows.maps[:, None]
            self.seconds["encoder"] += perf_counter() - began
            columns = {"labels": rows.labels[first]}
            if self.masked:
                columns["has_mask"] = rows.has_mask[first]
                columns["readable"] = masks[:, 0].float().mean(dim=1)
            yield Encoded(rows.image_indices[first], kinds, columns)

    def _cut(self) -> CropsCut | LabelledCut:
        transform, patch = self.encoder.config.transform, self.encoder.patch_size
        if self.need.side is None:
            transform = transform.sized(self.need.size)
            return CropsCut(transform, patch, self.config, self.views, self.masked, self.need.crops)
        return LabelledCut(self.source, transform.squashed(self.need.side), patch)

    def _encode(self, reader: FeatureReader, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Features of p images in 1 + views views each, encoded `batch_size` at a time."""
        wanted = replace(self.need, kinds=self.need.kinds - {"maps"})
        flat, read = images.flatten(0, 1), masks.flatten(0, 1)
        size = self.config.batch_size
        parts = [reader(i, m, wanted) for i, m in zip(flat.split(size), read.split(size), strict=True)]
        joined = {kind: torch.cat([part[kind] for part in parts]) for kind in wanted.kinds}
        return {kind: x.unflatten(0, (len(images), 1 + self.views)) for kind, x in joined.items()}


def checked(x: Tensor, dtype: str, image_indices: Int64[Tensor, "p"], source: Source) -> Tensor:
    """Return features of p images as numbers of type `dtype`; label maps as they are.

    Raises UserError, naming an image, unless all are finite.
    """
    if not x.is_floating_point():
        return x
    stored = x.to(getattr(torch, dtype))
    broken = ~stored.flatten(1).isfinite().all(dim=1)
    if broken.any():
        name = source[int(image_indices[broken][0])].name
        large = " in float16 (store=float32 holds more)" if x.isfinite().all() else ""
        raise UserError(
            f"features of {int(broken.sum())} images of {source.name} are not finite{large} "
            f"(first: {name}): is the encoder damaged, or its training diverged?"
        )
    return stored
