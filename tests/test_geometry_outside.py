"""Views that reach out of their image, label maps, boxes and masks of instances: against loops in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from foveola.geometry import boxes_in_views, masks_in_views, pixels_inside, sample, sample_labels


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes_anywhere(count: int, seed: int = 0) -> Tensor:
    """Boxes [count, 4] that overlap the unit square, from tiny to several times as large."""
    uniform = torch.rand(3, count, 2, generator=seeded(seed))
    side = 0.02 * (4 / 0.02) ** uniform[0]
    low = -side + (1 + side) * (0.02 + 0.96 * uniform[1])
    return torch.cat((low, low + side), dim=1)


def some_flips(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)) < 0.5


@pytest.mark.parametrize("kernel", ["bicubic", "linear", "area"])
@pytest.mark.parametrize(
    "padding", [(0, 5, 0, 3), (2, 1, 4, 0), (30, 40, 0, 100)]
)  # left, right, top, bottom
def test_a_padded_view_is_the_view_of_the_image_alone_between_zeros(kernel: str, padding: tuple[int, ...]):
    """Cells that lie inside are what they would be if the view ended at the border of the image.

    `padding` is left, right, above and below.
    """
    rows, columns, (left, right, top, bottom) = 12, 9, padding
    shapes = torch.tensor([[17, 23], [31, 6]])
    square = torch.full((2, 2, 31, 23), 1000.0)
    for field, (high, wide) in zip(square, shapes.tolist(), strict=True):
        field[:, :high, :wide] = torch.rand(2, high, wide, generator=seeded(high))
    inner = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 3, 4)
    outer = inner + torch.tensor([-left / columns, -top / rows, right / columns, bottom / rows])
    flips = torch.tensor([[False, True, False], [True, True, False]])
    blur = torch.tensor([[0.0, 1.5, 0.7], [2.0, 0.0, 0.3]])
    longest = float((outer[..., 2:] - outer[..., :2]).max())
    size = (top + rows + bottom, left + columns + right)
    padded = sample(square, outer, flips, size, kernel, blur, shapes, longest)
    alone = sample(square, inner, flips, (rows, columns), kernel, blur, shapes)
    for b in range(2):
        for v in range(3):
            start = right if flips[b, v] else left
            part = padded[b, v, :, top : top + rows, start : start + columns]
            assert (part - alone[b, v]).abs().max() < 2e-5
            rest = padded[b, v].clone()
            rest[:, top : top + rows, start : start + columns] = 0
            assert not rest.any()
            assert pixels_inside(outer, flips, size)[b, v].tolist() == [
                start,
                top,
                start + columns,
                top + rows,
            ]


def test_boxes_that_stay_inside_are_sampled_as_ever():
    field = torch.rand(1, 3, 20, 20, generator=seeded())
    boxes = boxes_anywhere(60).clamp(0, 1)[None]
    flips, blur = some_flips(1, 60), torch.rand(1, 60, generator=seeded(1)) * 2
    plain = sample(field, boxes, flips, (7, 9), blur=blur)
    assert (plain - sample(field, boxes, flips, (7, 9), blur=blur, outside=3.0)).abs().max() < 1e-5
    assert torch.equal(pixels_inside(boxes, flips, (7, 9)), torch.tensor([0, 0, 9, 7]).expand(1, 60, 4))


def centres(low: float, high: float, size: int, cells: int, flip: bool) -> list[float]:
    """Where the centres of output cells lie, in source cells."""
    found = [(low + (high - low) * (i + 0.5) / size) * cells for i in range(size)]
    return found[::-1] if flip else found


def test_label_maps_are_cut_by_the_pixel_under_each_centre_in_a_thousand_views():
    shapes = torch.tensor([[13, 21], [20, 8], [5, 5], [16, 16]])
    maps = torch.randint(0, 250, (4, 20, 21), generator=seeded(), dtype=torch.uint8)
    boxes, flips = boxes_anywhere(1000).view(4, 250, 4), some_flips(4, 250)
    ours = sample_labels(maps, boxes, flips, (6, 7), 255, shapes)
    compared = 0
    for b, (rows, columns) in enumerate(shapes.tolist()):
        for box, flip, found in zip(boxes[b].double().tolist(), flips[b].tolist(), ours[b], strict=True):
            ys = centres(box[1], box[3], 6, rows, False)
            xs = centres(box[0], box[2], 7, columns, flip)
            for i, y in enumerate(ys):
                for j, x in enumerate(xs):
                    if min(abs(y - round(y)), abs(x - round(x))) < 1e-4:
                        continue  # on an edge, where rounding decides
                    compared += 1
                    inside = 0 <= y < rows and 0 <= x < columns
                    assert found[i, j] == (maps[b, int(y), int(x)] if inside else 255)
    assert compared > 41_000


def test_label_maps_by_hand():
    maps = torch.tensor([[[1, 2, 3, 4]]], dtype=torch.uint8)
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.25, 0.0, 0.75, 1.0], [-0.5, 0.0, 1.5, 2.0]]])
    two = sample_labels(maps, boxes, None, (1, 4), 255)
    assert two[0].tolist() == [[[1, 2, 3, 4]], [[2, 2, 3, 3]], [[255, 2, 4, 255]]]
    flipped = sample_labels(maps, boxes[:, 1:], torch.tensor([[True, True]]), (2, 4), 9)
    assert flipped[0].tolist() == [[[3, 3, 2, 2]] * 2, [[9, 4, 2, 9], [9] * 4]]


def test_boxes_and_masks_of_instances_in_a_thousand_views():
    count, cells, (rows, columns) = 1000, 5, (8, 11)
    views, flips = boxes_anywhere(count, 1), some_flips(count)
    boxes = boxes_anywhere(count, 2).clamp(0, 1)
    masks = torch.randint(0, 256, (count, cells, cells), generator=seeded(3)).to(torch.uint8)
    masks[::2] = torch.where(masks[::2] > 100, 255, 0)
    cut = boxes_in_views(boxes, views, flips, (rows, columns))
    pasted = masks_in_views(masks, boxes, views, flips, (rows, columns))
    assert 0.02 < pasted.float().mean() < 0.9
    for n in range(count):
        box, view = boxes[n].double().tolist(), views[n].double().tolist()
        sides = (view[2] - view[0], view[3] - view[1])
        x0, x1 = ((x - view[0]) / sides[0] * columns for x in (box[0], box[2]))
        y0, y1 = ((y - view[1]) / sides[1] * rows for y in (box[1], box[3]))
        if flips[n]:
            x0, x1 = columns - x1, columns - x0
        np.testing.assert_allclose(cut[n], [x0, y0, x1, y1], rtol=1e-4, atol=1e-3)
        down = overlaps(y0, y1, rows, cells, False)
        across = overlaps(x0, x1, columns, cells, bool(flips[n]))
        coverage = down @ (masks[n].double().numpy() / 255) @ across.T
        sure = np.abs(coverage - 0.5) > 3e-3
        np.testing.assert_array_equal(pasted[n].numpy()[sure], (coverage >= 0.5)[sure])


def overlaps(start: float, end: float, size: int, cells: int, flip: bool) -> np.ndarray:
    """The fraction of pixel i that the k-th of `cells` parts of [start, end] covers, all in pixels."""
    out = np.zeros((size, cells))
    for i in range(size):
        for k in range(cells):
            low, high = (start + (end - start) * edge / cells for edge in (k, k + 1))
            part = max(0.0, min(i + 1, high) - max(i, low))
            out[i, cells - 1 - k if flip else k] = part
    return out


def test_a_mask_of_half_pixels_by_hand():
    """An instance is the pixels 2 to 6 of 8; windows begin at pixel 0, 1.5 and -3."""
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    full = torch.full((1, 3, 3), 255, dtype=torch.uint8)
    stay = torch.tensor([False])
    seen = {0: [0, 0, 1, 1, 1, 1, 0, 0], 1.5: [1, 1, 1, 1, 1, 0, 0, 0], -3: [0, 0, 0, 0, 0, 1, 1, 1]}
    for start, expected in seen.items():
        view = torch.tensor([[start / 8, 0.25, start / 8 + 1, 0.75]])
        found = masks_in_views(full, box, view, stay, (4, 8))
        assert found[0].int().tolist() == [expected] * 4
        mirrored = masks_in_views(full, box, view, ~stay, (4, 8))
        assert mirrored[0].int().tolist() == [expected[::-1]] * 4
    assert not masks_in_views(full, box, torch.tensor([[0.75, 0.0, 1.75, 1.0]]), stay, (4, 8)).any()


def test_pixels_inside_against_their_centres():
    boxes, flips = boxes_anywhere(1000, 7), some_flips(1000)
    for found, box, flip in zip(
        pixels_inside(boxes, flips, (5, 6)).tolist(), boxes.double().tolist(), flips.tolist(), strict=True
    ):
        xs = [i for i, x in enumerate(centres(box[0], box[2], 6, 1, flip)) if 0 < x < 1]
        ys = [i for i, y in enumerate(centres(box[1], box[3], 5, 1, False)) if 0 < y < 1]
        assert not xs or found[0::2] == [xs[0], xs[-1] + 1]
        assert not ys or found[1::2] == [ys[0], ys[-1] + 1]
        assert math.prod(max(b - a, 0) for a, b in zip(found[:2], found[2:], strict=True)) == len(xs) * len(
            ys
        )
