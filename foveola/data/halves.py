"""The halves of a data set that has none: a share of the images of each class is for test."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64


def held_out(
    names: Sequence[bytes], labels: Int64[np.ndarray, "n"], share: float, seed: int
) -> Bool[np.ndarray, "n"]:
    """Which images are for test: `share` of them, one at least, drawn by (seed, name) alone.

    Each class gives its share, as evenly as whole images allow, and keeps one image at least. A draw that
    knows names rather than positions leaves nearly all images in their half when some are added: what a model
    was trained on stays out of its test.
    """
    drawn = np.array([_draw(seed, name) for name in names])
    _, number, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = np.lexsort((drawn, number))
    rank = np.empty(len(drawn), np.int64)
    rank[by_class] = np.arange(len(drawn)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # The j-th drawn image of a class of n comes at (j + u) / n, u drawn for each class: so any first part of
    # all holds nearly the same share of every class.
    offsets = np.array([_draw(seed, b"class %d" % i) for i in range(len(sizes))])
    at = (rank + offsets[number]) / sizes[number]
    spare = rank < sizes[number] - 1
    count = min(max(1, round(share * len(drawn))), int(spare.sum()))
    held = np.zeros(len(drawn), bool)
    held[np.argsort(np.where(spare, at, np.inf), kind="stable")[:count]] = True
    return held


def _draw(seed: int, name: bytes) -> float:
    """Uniform in [0, 1)."""
    return int.from_bytes(hashlib.sha256(b"%d " % seed + name).digest()[:6], "big") / 2**48
