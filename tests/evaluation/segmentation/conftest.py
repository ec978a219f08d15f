"""Images whose colour is their class."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from foveola.data.segmentation import IGNORE

COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)


@pytest.fixture
def coloured(pixel_source: Callable[..., Any]) -> Callable[..., Any]:
    """coloured(seed, count): 8 x 8 areas of three flat colours with noise, and a strip of void."""

    def make(seed: int, count: int = 6) -> Any:
        rng, images, maps = np.random.default_rng(seed), [], []
        for _ in range(count):
            labels = np.repeat(np.repeat(rng.integers(0, 3, (4, 4)), 8, 0), 8, 1).astype(np.uint8)
            noise = rng.integers(-8, 9, (32, 32, 3))
            images.append((COLOURS[labels] + noise).clip(0, 255).astype(np.uint8))
            labels[:, 28:] = IGNORE
            maps.append(labels)
        return pixel_source(images, maps, name=f"coloured-{seed}:")

    return make
