"""Fractions of boxes in regions against counting, and boxes against frames."""

import numpy as np
import torch

from foveola.tasks.regions import centred_inside, clipped, drawn, fraction_inside


def test_share_of_boxes_in_a_region_by_counting() -> None:
    """Boxes on a grid of quarters of pixels: each quarter is counted."""
    rng = np.random.default_rng(0)
    region = torch.from_numpy(rng.random((7, 9)) < 0.4)
    fine = region.numpy().repeat(4, 0).repeat(4, 1)
    corners = rng.integers(0, (36, 28), (200, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    found = fraction_inside(region, torch.from_numpy(boxes / 4).float())
    for (x0, y0, x1, y1), share in zip(boxes, found.tolist(), strict=True):
        inner = fine[y0:y1, x0:x1]
        assert abs(share - (inner.mean() if inner.size else 0)) < 1e-6


def test_boxes_beyond_the_view() -> None:
    """What lies outside of it counts neither for the region nor for the area."""
    region = torch.ones(4, 4, dtype=torch.bool)
    boxes = torch.tensor([[-3.0, -1, 2, 5], [5, 5, 9, 9], [1, 1, 1, 3]])
    assert fraction_inside(region, boxes).tolist() == [1, 0, 0]


def test_drawn_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 1], [2.6, 1.4, 4.5, 3]])
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[0, :2] = expected[1:, 3:4] = True
    assert torch.equal(drawn(boxes, 3, 5), expected)
    assert not drawn(torch.zeros(0, 4), 3, 5).any()


def test_frames() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [-6, 0, 2, 4], [6, 2, 14, 6], [5, 3, 20, 5]])
    assert centred_inside(boxes, torch.tensor([0.0, 0, 10, 8])).tolist() == [True, False, False, False]
    frames = torch.tensor([[0.0, 0, 10, 8], [1, 1, 3, 3]])
    cut = clipped(boxes.expand(2, -1, -1), frames)
    assert cut[0].tolist() == [[0, 0, 4, 4], [0, 0, 2, 4], [6, 2, 10, 6], [5, 3, 10, 5]]
    assert cut[1].tolist() == [[1, 1, 3, 3], [1, 1, 2, 3], [3, 2, 3, 3], [3, 3, 3, 3]]
