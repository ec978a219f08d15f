"""What the gallery and the map show: images or objects, a row each, and where the rows of features are."""

import json
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float32

from foveola.embedding.index import Index
from foveola.embedding.rows import FeatureRows
from foveola.evaluation.metrics import unit_rows
from foveola.explorer.sides import Side

SHOWN_KINDS = ("images", "objects")


class ShownRows:
    """Rows of one kind, in the order of the features of the first side that has them.

    Attributes:
        columns: names, labels, image indices, objects (-1: the image), boxes, and sizes of images.
        indices: which features stand for a row on each side (None: none): of images without features of their
            own, those of their patches.
    """

    def __init__(self, kind: str, sides: list[Side]) -> None:
        self.kind = kind
        found = [_index_of(side, kind) for side in sides]
        self.columns = next(index for index in found if index is not None).rows
        self.indices: list[Index | None] = [
            index if index is not None and _same(index.rows, self.columns) else None for index in found
        ]

    def __len__(self) -> int:
        return len(self.columns.name)

    def vectors(self, side: int) -> Float32[np.ndarray, "n D"]:
        """Return a vector of length one for each row, of a side that has them; of grids of patches their
        mean.
        """
        index = self.indices[side]
        assert index is not None
        features = index.rows.feature
        means = features.reshape(len(features), -1, features.shape[-1])
        return unit_rows(torch.from_numpy(means.mean(axis=1, dtype=np.float32))).numpy()

    @cached_property
    def row_of(self) -> dict[tuple[int, int], int]:
        """The row of an image (object -1) or of an object in it."""
        pairs = zip(self.columns.image_index.tolist(), self.columns.object.tolist(), strict=True)
        return {pair: row for row, pair in enumerate(pairs)}

    @cached_property
    def as_json(self) -> bytes:
        """All that the page needs to know of the rows: columns, labels as numbers of a list of names."""
        columns = self.columns
        labels, number = np.unique(columns.label, return_inverse=True)
        names, image = np.unique(columns.name, return_inverse=True)
        sizes = [columns.width.tolist(), columns.height.tolist()]
        made = {
            "names": names.tolist(),
            "name": image.reshape(-1).tolist(),
            "labels": labels.tolist(),
            "label": number.reshape(-1).tolist(),
            "image": columns.image_index.tolist(),
            "object": columns.object.tolist(),
            "width": sizes[0],
            "height": sizes[1],
        }
        return json.dumps(made, separators=(",", ":")).encode()


def shown_rows(sides: list[Side]) -> dict[str, ShownRows]:
    """Return rows of images, and of objects where there are features of objects."""
    kinds = [kind for kind in SHOWN_KINDS if any(_index_of(side, kind) is not None for side in sides)]
    return {kind: ShownRows(kind, sides) for kind in kinds}


def _index_of(side: Side, kind: str) -> Index | None:
    """The features that stand for rows of a kind."""
    order = ("images", "patches") if kind == "images" else ("objects", "crops")
    return next((side.indices[each] for each in order if each in side.indices), None)


def _same(a: FeatureRows, b: FeatureRows) -> bool:
    """Whether rows are of the same images and objects: patches may be of fewer images than all."""
    return np.array_equal(a.image_index, b.image_index) and np.array_equal(a.object, b.object)
