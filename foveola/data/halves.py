"""The halves of a data set that has none: a fraction of the images of each class is for test."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64


def halves_for_test(
    contents: Sequence[bytes],
    labels: Int64[np.ndarray, "n"],
    classes: Sequence[str],
    fraction: float,
    seed: int,
) -> Bool[np.ndarray, "n"]:
    """Return which images are for test: `fraction` of the different ones, one at least, drawn by (seed,
    content) alone.

    `contents` are equal for copies of one image: these go together, and count once, in the class that is
    first of their labels. Each class (-1: of none) gives its part, as evenly as whole images allow, and
    keeps one image at least. A draw that knows contents rather than positions leaves nearly all images in
    their half when some are added or renamed: what a model was trained on stays out of its test.
    """
    order = np.argsort(labels, kind="stable")
    _, first, which = np.unique(np.array(contents)[order], return_index=True, return_inverse=True)
    of_image = np.empty(len(labels), np.int64)
    of_image[order] = which
    return _held_out([contents[i] for i in order[first]], labels[order][first], classes, fraction, seed)[
        of_image
    ]


def _held_out(
    contents: Sequence[bytes],
    labels: Int64[np.ndarray, "n"],
    classes: Sequence[str],
    fraction: float,
    seed: int,
) -> Bool[np.ndarray, "n"]:
    """`held_out`, of images that are all different."""
    drawn = np.array([_draw(seed, content) for content in contents])
    known, number, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = np.lexsort((drawn, number))
    rank = np.empty(len(drawn), np.int64)
    rank[by_class] = np.arange(len(drawn)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # The j-th drawn image of a class of n comes at (j + u) / n, u drawn for each class: so any first part of
    # all holds nearly the same fraction of every class. By its name, which it keeps when classes are added.
    names = ["" if label < 0 else f"class {classes[label]}" for label in known.tolist()]
    offsets = np.array([_draw(seed, os.fsencode(name)) for name in names])
    at = (rank + offsets[number]) / sizes[number]
    spare = rank < sizes[number] - 1
    count = min(max(1, round(fraction * len(drawn))), int(spare.sum()))
    held = np.zeros(len(drawn), bool)
    held[np.argsort(np.where(spare, at, np.inf), kind="stable")[:count]] = True
    return held


def _draw(seed: int, name: bytes) -> float:
    """Return a number that is uniform in [0, 1), from a hash."""
    return int.from_bytes(hashlib.sha256(b"%d " % seed + name).digest()[:6], "big") / 2**48
