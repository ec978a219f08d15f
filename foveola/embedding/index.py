"""`foveola.Index`: search among the rows of a file of features, exact, or through a graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from foveola import distributed
from foveola.config import UserError
from foveola.embedding.formats import read_features
from foveola.embedding.graph import Graph, graph_of
from foveola.embedding.rows import WHOLE, FeatureRows
from foveola.evaluation.metrics import unit_rows
from foveola.evaluation.search import nearest_rows

LARGE_INDEX = 1_000_000  # rows from which on a graph is worth its memory
CHUNK = 65536  # rows that get their length at once
KEPT_BYTES = 2**32  # of rows of length one in float32, which are kept on the device between searches


class Neighbours(NamedTuple):
    """What was found for m queries, nearest first: r = min(top, rows) each."""

    similarities: Float32[np.ndarray, "m r"]  # cosines
    indices: Int64[np.ndarray, "m r"]  # of the index, for `Index.describe`


class Index:
    """The rows of a file of features, for search by cosine. Of grids every patch is a row.

    Attributes:
        rows: what the file holds, by columns (`rows.name`, `rows.label`, `rows.box`, ...).
        about: what it says about itself; empty of an index that was made by `build`.
        vectors: the features, [rows, D] or [images * h * w, D], float32 or float16, on the CPU.
        grid: (h, w) of the patches of an image; None where rows are images or objects.
    """

    def __init__(
        self,
        rows: FeatureRows,
        about: dict[str, Any] | None = None,
        *,
        device: str | torch.device | None = None,
        path: Path | None = None,
    ) -> None:
        self.rows, self.about, self.path = rows, about or {}, path
        self.device = distributed.find_device(device)
        shape = rows.feature.shape
        self.grid: tuple[int, int] | None = (shape[1], shape[2]) if len(shape) == 4 else None
        self.vectors: Tensor = torch.from_numpy(rows.feature.reshape(-1, shape[-1]))
        self.graph: Graph | None = None
        self._unit: Tensor | None = None

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> "Index":
        """Read a file that `foveola.embed` wrote; products are computed on `device` (a GPU if there is one).

        The features are read as a whole: 1,000,000 of width 768 in float16 are 1.5 GB. Raises UserError for a
        file that is missing, damaged, or of somebody else.
        """
        rows, about = read_features(path)
        return cls(rows, about, device=device, path=Path(path).expanduser())

    @classmethod
    def build(
        cls,
        features: Any,
        names: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        boxes: Any = None,
        *,
        device: str | torch.device | None = None,
    ) -> "Index":
        """Make an index of features of your own.

        Args:
            features: an array or tensor [n, D], or [n, h, w, D] of grids of patches; float32 or float16.
            names, labels: text of each row; without names, its number.
            boxes: [n, 4], x0, y0, x1, y1 in the unit square of the image; without them, the whole image.

        Raises UserError for other shapes, and numbers that are not finite.
        """
        if isinstance(features, Tensor):
            features = features.detach().cpu()
            features = features if features.dtype == torch.float16 else features.float()
        array = np.asarray(features)
        array = array if array.dtype in (np.float32, np.float16) else array.astype(np.float32)
        if array.ndim not in (2, 4) or not len(array):
            raise UserError(f"features: expected [n, D] or [n, h, w, D], got {list(array.shape)}")
        if not np.isfinite(array).all():
            raise UserError("features: not all numbers are finite")
        count = len(array)
        for what, column in (("names", names), ("labels", labels), ("boxes", boxes)):
            if column is not None and len(column) != count:
                raise UserError(f"{what}: {len(column)} of {count} rows")
        if boxes is not None and np.shape(boxes) != (count, 4):
            raise UserError(f"boxes: expected [{count}, 4], got {list(np.shape(boxes))}")
        unknown, ones = np.full(count, -1), np.ones(count, np.float32)
        rows = FeatureRows(
            feature=np.ascontiguousarray(array),
            name=np.array([str(i) for i in range(count)] if names is None else list(names), dtype=np.str_),
            label=np.array([""] * count if labels is None else list(labels), dtype=np.str_),
            label_index=unknown,
            image_index=np.arange(count),
            object=unknown,
            box=np.tile(np.array(WHOLE, np.float32), (count, 1))
            if boxes is None
            else np.asarray(boxes, np.float32),
            width=np.zeros(count, np.int64),
            height=np.zeros(count, np.int64),
            masked=ones == 0,
            readable=ones,
        )
        return cls(rows, device=device)

    def __len__(self) -> int:
        """Rows that can be found: of grids all patches."""
        return len(self.vectors)

    def search(
        self, vectors: Any, top: int = 10, *, method: str = "exact", progress: bool = False
    ) -> Neighbours:
        """Return the `top` rows of the highest cosine with each vector.

        Args:
            vectors: an array or tensor [m, D], or [D].
            method: "exact" compares with every row, in float32, on the device of the index. "hnsw" walks
                through a graph (faiss), which is made once and kept beside the file; `graph.recall` says how
                many of the exact neighbours it finds. It is for more than a million rows. Where the graph
                finds fewer than `top` rows, a vector is compared with every row.
            progress: show how far a graph is that has to be made first.

        Raises UserError for vectors of another width, numbers that are not finite, and hnsw without faiss.
        """
        queries = torch.as_tensor(vectors)
        queries = queries[None] if queries.ndim == 1 else queries
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise UserError(
                f"vectors: expected [m, {self.vectors.shape[1]}] as the index has them, got "
                f"{list(torch.as_tensor(vectors).shape)}"
            )
        if not torch.isfinite(queries).all():
            raise UserError("vectors: not all numbers are finite")
        if top < 1:
            raise UserError(f"top={top}: expected at least 1")
        if method == "exact":
            return Neighbours(*(part.numpy() for part in self._exact(queries, top)))
        if method != "hnsw":
            raise UserError(f"method={method}: expected exact or hnsw")
        if self.graph is None:
            self.graph = graph_of(self.vectors, self.path, self.device, progress)
        near, rows = self.graph.search(unit_rows(queries).numpy(), min(top, len(self)))
        if (lost := (rows < 0).any(axis=1)).any():  # the graph has no way to as many rows
            exact = self._exact(queries[torch.from_numpy(lost)], top)
            near[lost], rows[lost] = (part.numpy() for part in exact)
        return Neighbours(near, rows)

    def _exact(self, queries: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The nearest of all rows. They get their length, and go to the device, once, where they fit."""
        if self._unit is None and 4 * self.vectors.numel() <= KEPT_BYTES:
            self._unit = torch.cat([unit_rows(part.to(self.device)) for part in self.vectors.split(CHUNK)])
        if self._unit is None:
            return nearest_rows(queries, self.vectors, top, device=self.device)
        return nearest_rows(unit_rows(queries), self._unit, top, distance="product", device=self.device)

    def describe(self, index: int | np.integer) -> dict[str, Any]:
        """Return what a row is: `name`, `label`, `image_index`, `object`, `box` in the unit square.

        Of a patch it is also `patch`, (row, column) in its grid, and `box` is that of the patch.
        """
        row, patch = divmod(int(index), self.grid[0] * self.grid[1]) if self.grid else (int(index), 0)
        rows, box = self.rows, self.rows.box[row].astype(float).tolist()
        found = {
            "name": str(rows.name[row]),
            "label": str(rows.label[row]) or None,
            "image_index": int(rows.image_index[row]),
            "object": int(rows.object[row]),
        }
        if self.grid:
            down, across = divmod(patch, self.grid[1])
            high, wide = (box[3] - box[1]) / self.grid[0], (box[2] - box[0]) / self.grid[1]
            corner = box[0] + across * wide, box[1] + down * high
            box = [*corner, corner[0] + wide, corner[1] + high]
            found["patch"] = [down, across]
        return {**found, "box": box}
