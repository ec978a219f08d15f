"""Batches of canvases whose objects are rectangles."""

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from foveola.data.sample import Canvases

Corners = tuple[float, float, float, float]


def rectangles(
    boxes: Sequence[Sequence[Corners | None]],
    *,
    size: int = 64,
    mask_size: int = 32,
    aspects: Sequence[float] | None = None,
    drawn: bool = False,
) -> Canvases:
    """An image for each entry, an object for each box of it; None = the whole image.

    Corners are multiples of 1 / mask_size. Pixels are noise, or, if `drawn`, white in the first box on black.
    """
    batch, objects = len(boxes), len(boxes[0])
    masks = torch.zeros(batch, objects, mask_size, mask_size, dtype=torch.uint8)
    images = torch.randint(0, 256, (batch, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    for b, row in enumerate(boxes):
        for m, box in enumerate(row):
            x0, y0, x1, y1 = (round(side * mask_size) for side in (box or (0, 0, 1, 1)))
            masks[b, m, y0:y1, x0:x1] = 255
        if drawn:
            x0, y0, x1, y1 = (round(side * size) for side in (row[0] or (0, 0, 1, 1)))
            images[b] = 0
            images[b, :, y0:y1, x0:x1] = 255
    return Canvases(
        images=images,
        extents=torch.full((batch, 2), size),
        aspects=torch.tensor(aspects or [1.0] * batch),
        object_masks=masks,
        whole=torch.tensor([[box is None for box in row] for row in boxes]),
        object_labels=torch.full((batch, objects), -1),
        labels=torch.arange(batch),
        indices=torch.arange(batch) + 100,
    )


@pytest.fixture
def canvases() -> Callable[..., Canvases]:
    return rectangles


def flat(group: Any, where: str = "") -> dict[str, Tensor]:
    """All tensors of a batch, as "large.boxes"."""
    found = {}
    for name, value in vars(group).items():
        if isinstance(value, Tensor):
            found[where + name] = value
        elif is_dataclass(value):
            found |= flat(value, f"{where}{name}.")
    return found


@pytest.fixture
def tensors() -> Callable[[Any], dict[str, Tensor]]:
    """tensors(batch): all of them, by names such as "large.boxes"."""
    return flat
