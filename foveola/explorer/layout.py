"""Rows of features as points of a plane, by UMAP or principal components, made once and kept.

As a program of its own, `python -m foveola.explorer.layout ROWS.npy OUT.npy` makes a map by UMAP: it takes
minutes, in which the page must answer.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
from jaxtyping import Float32

from foveola import files
from foveola.config import UserError
from foveola.figures.pca import Basis

NEAR = 15  # neighbours of a point that UMAP keeps near it
FEWEST_ROWS = 8  # rows below which there is nothing for UMAP to lay out
CHUNK_ROWS = 65536  # rows in float64 at a time
MAP_METHODS = ("umap", "pca")


def has_umap() -> bool:
    """Return whether UMAP is installed."""
    return find_spec("umap") is not None


def pca_map(vectors: Float32[np.ndarray, "n D"]) -> Float32[np.ndarray, "n 2"]:
    """Return the first two principal components of rows, on one scale; 0 for one that is not there."""
    count = min(2, vectors.shape[1])
    parts = [vectors[start : start + CHUNK_ROWS] for start in range(0, len(vectors), CHUNK_ROWS)]
    basis = Basis.fit_chunks(lambda: parts, count)
    points = np.zeros((len(vectors), 2), np.float32)
    points[:, :count] = np.concatenate([basis.project(part) * basis.scale for part in parts])
    return points


def umap_map(vectors: Float32[np.ndarray, "n D"]) -> Float32[np.ndarray, "n 2"]:
    """Return UMAP's map by cosine, from the principal components on; the same rows give the same map."""
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = umap.UMAP(
            n_neighbors=min(NEAR, len(vectors) - 1), metric="cosine", init="pca", random_state=0, n_jobs=1
        )
        return np.asarray(made.fit_transform(vectors), np.float32)


class Layouts:
    """Maps of rows by name and method. What takes long is made beside the page, and asked for again."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.made: dict[tuple[Hashable, str], Any] = {}  # a map, a UserError, or None while it is made
        self.processes: list[subprocess.Popen[bytes]] = []

    def get(
        self, rows: Hashable, method: str, make: Callable[[], np.ndarray], beside: Path | None
    ) -> Float32[np.ndarray, "n 2"] | None:
        """Return the map of the rows with this name; None while it is made. `make` gives their features, and
        `beside` is the file of them, next to which maps are kept by a digest of the rows.

        Raises UserError for a method that is none, cannot be had, or has failed.
        """
        if method not in MAP_METHODS:
            raise UserError(f"unknown map {method!r}; known: {', '.join(MAP_METHODS)}")
        if method == "umap" and not has_umap():
            raise UserError("maps by UMAP need umap-learn; pip install 'foveola[map]'")
        name = rows, method
        with self.lock:
            if name in self.made:
                found = self.made[name]
                if isinstance(found, UserError):
                    raise found
                return found
            vectors = make()
            if method == "umap" and len(vectors) < FEWEST_ROWS:
                raise UserError(f"{len(vectors)} rows are too few for UMAP, which needs {FEWEST_ROWS}")
            digest = _digest(vectors)
            path = None if beside is None else beside.with_name(f"{beside.name}.{method}-{digest}.npy")
            self.made[name] = _read(path, len(vectors))
            if self.made[name] is not None:
                return self.made[name]
            if method == "umap":
                Thread(target=self._beside, args=(name, vectors, path), daemon=True).start()
                return None
            self.made[name] = pca_map(vectors)
            _keep(self.made[name], path)
            return self.made[name]

    def close(self) -> None:
        """End what is still at work."""
        for process in self.processes:
            process.terminate()

    def _beside(self, name: tuple[Hashable, str], vectors: np.ndarray, path: Path | None) -> None:
        """Make a map by UMAP in another process."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows, out = Path(folder) / "rows.npy", Path(folder) / "map.npy"
                np.save(rows, vectors)
                words = [sys.executable, "-m", "foveola.explorer.layout", str(rows), str(out)]
                root = str(Path(__file__).resolve().parents[2])
                paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
                process = subprocess.Popen(
                    words, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE
                )
                self.processes.append(process)
                errors = process.communicate()[1].decode(errors="replace").strip().splitlines()
                made = _read(out, len(vectors))
            if made is None:
                reason = errors[-1] if errors else f"it ended with {process.returncode}"
                raise UserError(f"UMAP has failed: {reason}")
            _keep(made, path)
            self.made[name] = made
        except UserError as error:
            self.made[name] = error
        except OSError as error:
            self.made[name] = UserError(f"UMAP has failed: {error}")


def _digest(vectors: np.ndarray) -> str:
    return hashlib.sha256(repr(vectors.shape).encode() + vectors.tobytes()).hexdigest()[:12]


def _read(path: Path | None, count: int) -> Float32[np.ndarray, "n 2"] | None:
    """A map that is kept; None where there is none, or a damaged one."""
    if path is None or not path.is_file():
        return None
    with suppress(OSError, ValueError, EOFError):
        found = np.load(path, allow_pickle=False)
        if found.shape == (count, 2) and found.dtype == np.float32 and np.isfinite(found).all():
            return found
    return None


def _keep(points: np.ndarray, path: Path | None) -> None:
    """Write a map beside its features, where that is possible: a map that is not kept costs time alone."""
    if path is None:
        return
    with suppress(OSError), files.whole(path) as part, part.open("wb") as file:
        np.save(file, points)


if __name__ == "__main__":
    np.save(sys.argv[2], umap_map(np.load(sys.argv[1])))
