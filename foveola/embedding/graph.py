"""A graph of near neighbours (HNSW, by faiss) for indices of millions of rows, and how much it misses."""

import hashlib
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from foveola import files
from foveola.evaluation.metrics import unit_rows
from foveola.evaluation.search import nearest_rows
from foveola.failures import explain
from foveola.outside import library
from foveola.progress import show

LINKS, BUILD_WIDTH, SEARCH_WIDTH = 32, 200, 128  # edges of a node; candidates while it is made, and searched
ADDED = 65536  # rows that are normalised and added at once
RECALL_QUERIES, RECALL_AT = 1000, 10


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph, and the fraction of the exact 10 nearest rows that it finds for rows of the index itself."""

    faiss: Any
    recall: float

    def search(
        self, vectors: Float32[np.ndarray, "m D"], top: int
    ) -> tuple[Float32[np.ndarray, "m r"], Int64[np.ndarray, "m r"]]:
        """Return cosines and indices of what the graph finds for vectors of length one, nearest first."""
        self.faiss.hnsw.efSearch = max(SEARCH_WIDTH, 2 * top)
        return self.faiss.search(np.ascontiguousarray(vectors), top)


def graph_of(
    vectors: Float[Tensor, "n D"], path: Path | None, device: torch.device, progress: bool = False
) -> Graph:
    """Return the graph that is kept beside a file of features, or make it and keep it there."""
    faiss = library("faiss", "search", "method=hnsw")
    saved = None if path is None else path.with_name(f"{path.name}.hnsw.npz")
    digest = _digest(vectors)
    if saved is not None and saved.is_file():
        damaged = OSError, ValueError, EOFError, KeyError, BadZipFile  # then it is made again
        with suppress(*damaged), saved.open("rb") as file, np.load(file) as found:
            if str(found["digest"]) == digest:  # else the features were written anew since
                return Graph(faiss.deserialize_index(found["graph"]), float(found["recall"]))
    made = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    made.hnsw.efConstruction = BUILD_WIDTH
    parts = vectors.split(ADDED)
    for part in show(parts, len(parts), f"graph of {len(vectors):,} rows, part by part", progress):
        made.add(unit_rows(part).numpy())
    graph = Graph(made, _recall(made, vectors, device))
    if saved is not None:
        try:
            with files.whole(saved) as part, part.open("wb") as file:
                np.savez(file, graph=faiss.serialize_index(made), recall=graph.recall, digest=digest)
        except OSError as error:
            warnings.warn(f"the graph is not kept: {explain(error)}", stacklevel=3)
    return graph


def _recall(made: Any, vectors: Float[Tensor, "n D"], device: torch.device) -> float:
    """Return the fraction of the exact neighbours of rows, drawn from the index, that it finds."""
    count = min(RECALL_QUERIES, len(vectors))
    drawn = np.sort(np.random.default_rng(0).choice(len(vectors), count, replace=False))
    queries, top = vectors[torch.from_numpy(drawn)], min(RECALL_AT + 1, len(vectors))
    exact = nearest_rows(queries, vectors, top, device=device)[1].numpy()
    found = Graph(made, 0.0).search(unit_rows(queries).numpy(), top)[1]
    fractions = [
        len((set(e.tolist()) & set(f.tolist())) - {own}) / max(1, len(set(e.tolist()) - {own}))
        for own, e, f in zip(drawn.tolist(), exact, found, strict=True)
    ]
    return float(np.mean(fractions))


def _digest(vectors: Tensor) -> str:
    whole = hashlib.sha256(f"{LINKS} {BUILD_WIDTH} {tuple(vectors.shape)} {vectors.dtype}".encode())
    for part in vectors.split(ADDED):
        whole.update(part.numpy().tobytes())
    return whole.hexdigest()[:32]
