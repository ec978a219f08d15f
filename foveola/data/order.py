"""In which order images are read: given by (seed, epoch, position, rank) alone."""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

ORDER = 0  # tells its random stream from others of the same seed


def epoch_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "count"]:
    """Return the order in which an epoch visits `count` samples."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


@lru_cache(maxsize=2)  # of each worker: two epochs meet in what is read ahead
def order_of_rank(
    seed: int, epoch: int, count: int, shape: tuple[int, int, int], rank: int
) -> Int64[np.ndarray, "steps B"]:
    """Return what a rank reads at each step, of (steps, ranks, B): all of 10^7 images would be 80 MB in a
    worker.
    """
    order = epoch_order(seed, epoch, count)[: math.prod(shape)]
    return order.reshape(shape)[:, rank].copy()
