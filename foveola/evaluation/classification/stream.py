"""Random crops encoded as they are drawn, new ones in each epoch: nothing of them is stored.

Which crops a step sees is a function of (seed, step) alone. Workers read ahead of the encoder, each rank
encodes its part of a step's images, and all ranks get all features.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foveola import distributed
from foveola.data.sample import BadImage
from foveola.data.sources import Source
from foveola.evaluation.classification.training import FeatureBatch, Order
from foveola.evaluation.features.encoding import CropsCut, FeatureReader, checked
from foveola.evaluation.features.need import FeedConfig, Need, shape_of
from foveola.evaluation.images import PARCEL, Batches, ImageRows, Images, facts_of_bad, join, slice_of_rank
from foveola.models.encoder import Encoder


class CropSchedule:
    """The crops of all steps, (index of the image, number of its crop), as `Images` takes them.

    It stands for an array [rows, 2], of which a slice is computed when it is asked for. Each step begins with
    a parcel of its own, of which the last may hold fewer rows.
    """

    def __init__(self, images: Int64[np.ndarray, "n"], order: Order, steps: int) -> None:
        self.images, self.order, self.steps = images, order, steps
        self.mine = slice_of_rank(order.batch)
        self.parcels = max(1, -(-(self.mine.stop - self.mine.start) // PARCEL))  # of a step

    def __len__(self) -> int:
        return self.steps * self.parcels * PARCEL

    def __getitem__(self, part: slice) -> Int64[np.ndarray, "r 2"]:
        step, parcel = divmod(part.start // PARCEL, self.parcels)
        epoch, rows = self.order(step)
        chosen = rows[self.mine][parcel * PARCEL : (parcel + 1) * PARCEL]
        return np.stack((self.images[chosen], np.full(len(chosen), 1 + epoch)), axis=1)


class Stream:
    """New random crops of the images `chosen` of a source in each epoch, encoded as they are drawn.

    The crop of an image in an epoch is that which a store of as many crops has for it. An image that
    cannot be read is left out of its batches; `facts` counts such images, and what was encoded.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: Source,
        chosen: Int64[np.ndarray, "n"],
        config: FeedConfig,
    ) -> None:
        self.encoder, self.source, self.chosen, self.config = encoder, source, chosen, config
        self.bad: set[int] = set()
        self.encoded = 0
        self.seconds = {"data_wait": 0.0, "encoder": 0.0, "probes": 0.0}

    def __len__(self) -> int:
        return len(self.chosen)

    def drawn(self, need: Need, batch: int, steps: int, seed: int) -> Iterator[FeatureBatch]:
        """Yield what is needed of each step's crops, and labels, on the encoder's device, to every rank.

        Raises UserError where more than 1 % of the images cannot be read, and for features that are not
        finite.
        """
        schedule = CropSchedule(self.chosen, Order(len(self.chosen), batch, seed), steps)
        transform, patch = self.encoder.config.transform.sized(need.size), self.encoder.patch_size
        cut = CropsCut(transform, patch, self.config, 0, "masked" in need.features, need.crops)
        label = f"crops of {self.source.name}"
        reading: Batches[ImageRows] = Batches(Images(self.source, schedule, cut), self.config, label, False)
        groups = groupby(reading.parcels(), lambda parcel: parcel[0] // schedule.parcels)
        reader = FeatureReader(self.encoder, self.config.precision, self.encoder.device)
        group = None
        for step in range(steps):
            group = group or next(groups, None)
            here: Iterator[ImageRows] = iter(())  # where this rank can read no image of the step
            if group is not None and group[0] == step:
                here, group = (made for _, made in group[1]), None
            x, labels = self._encode(reader, here, need)
            self.seconds["data_wait"] = reading.waited
            self.bad |= set(reading.bad)
            if (step + 1) % schedule.order.steps == 0 or step + 1 == steps:
                self._gather_bad()
            if len(labels):
                began = perf_counter()
                yield x, labels
                self.seconds["probes"] += perf_counter() - began

    def _encode(self, reader: FeatureReader, parcels: Iterator[ImageRows], need: Need) -> FeatureBatch:
        """Features of the rows of a step, this rank's encoded `batch_size` at a time, those of all ranks."""
        device, training = self.encoder.device, self.encoder.training
        parts: list[Mapping[str, Tensor]] = []
        labels, waiting, count = [torch.zeros(0, dtype=torch.int64)], list[ImageRows](), 0

        def flush() -> None:
            rows, began = join(waiting), perf_counter()
            found = reader(rows.images, rows.masks, need)
            parts.append(
                {k: checked(x, "float32", rows.image_indices, self.source) for k, x in found.items()}
            )
            labels.append(rows.labels)
            waiting.clear()
            self.seconds["encoder"] += perf_counter() - began

        for made in parcels:
            waiting.append(made)
            count += len(made.labels)
            if count >= self.config.batch_size:
                flush()
                count = 0
        if waiting:
            flush()
        self.encoder.train(training)
        joined = {}
        for feature in sorted(need.features):
            shape = shape_of(self.encoder, feature, need)
            empty = torch.zeros(0, *shape, device=device)
            joined[feature] = distributed.gather_rows(torch.cat([empty, *(part[feature] for part in parts)]))
        own = distributed.gather_rows(torch.cat(labels)).to(device)
        self.encoded += len(own)
        return joined, own

    def _gather_bad(self) -> None:
        """Know what any rank could not read; too many are an error."""
        for found in distributed.gather_objects(self.bad):
            self.bad = self.bad | found
        facts_of_bad(self._bad(), len(self.chosen), self.source)

    def _bad(self) -> Int64[Tensor, "b"]:
        return torch.tensor(sorted(self.bad), dtype=torch.int64)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the images and the pass, as those of a store."""
        bad = facts_of_bad(self._bad(), len(self.chosen), self.source)
        return {
            **bad,
            "views": "stream",
            "computed": self.encoded,
            "pass_seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }


def labels_of(source: Source, chosen: Int64[np.ndarray, "n"]) -> Int64[Tensor, "n"]:
    """Return the labels of images, none of which is decoded; -1 where there is none."""
    labels = []
    for index in chosen.tolist():
        try:
            label = source[index].label
        except BadImage:
            label = None
        labels.append(-1 if label is None else label)
    return torch.tensor(labels, dtype=torch.int64)
