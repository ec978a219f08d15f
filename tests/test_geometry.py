"""Boxes in true pixels, resampling against loops and scipy, summed-area tables."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp
from torch import Tensor

from foveola.geometry import box_sums, random_boxes, resampling_weights, sample

ASPECTS = [0.1, 0.3, 0.75, 1.0, 4 / 3, 2.0, 5.0, 10.0]
FULL = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_boxes(count: int, seed: int = 0) -> Tensor:
    """Boxes [1, count, 4] of any shape."""
    corners = torch.rand(1, count, 2, 2, generator=seeded(seed)).sort(dim=-1).values
    low, high = corners[..., 0] * 0.9, corners[..., 1] * 0.9 + 0.1
    return torch.cat((low, high), dim=-1)


@pytest.mark.parametrize("scale", [(0.05, 0.25), (0.25, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.5, 0.5), (1.0, 3.0)])
def test_boxes_obey_scale_and_ratio_in_true_pixels(scale: tuple[float, float], ratio: tuple[float, float]):
    boxes = random_boxes(torch.tensor(ASPECTS), 200, scale, ratio, seeded()).double().numpy()
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    for aspect, drawn in zip(ASPECTS, boxes, strict=True):
        # An image of this aspect with an area of one, in pixels of any size.
        image = np.array([math.sqrt(aspect), 1 / math.sqrt(aspect)])
        for x0, y0, x1, y1 in drawn:
            width, height = (np.array([x1 - x0, y1 - y0]) * image).tolist()
            assert ratio[0] * (1 - 1e-4) <= width / height <= ratio[1] * (1 + 1e-4)
            if not scale[0] - 1e-5 <= width * height <= scale[1] + 1e-5:
                # The fallback: the largest box of the nearest allowed ratio, in the centre.
                nearest = min(max(aspect, ratio[0]), ratio[1])
                largest = min(image[0], image[1] * nearest)
                assert width == pytest.approx(largest, rel=1e-4)
                assert height == pytest.approx(largest / nearest, rel=1e-4)
                assert (x0 + x1) / 2 == pytest.approx(0.5, abs=1e-5)
                assert (y0 + y1) / 2 == pytest.approx(0.5, abs=1e-5)


def test_a_box_that_cannot_fit_is_the_largest_centred_one():
    # 1 : 10, but at least a quarter of the area at a ratio of 3/4: 0.133 of the area is the most there is.
    box = random_boxes(torch.tensor([0.1, 10.0]), 1, (0.25, 1.0), (3 / 4, 4 / 3), seeded())[:, 0]
    half = 0.1 / 0.75 / 2
    assert torch.allclose(box[0], torch.tensor([0.0, 0.5 - half, 1.0, 0.5 + half]), atol=1e-6)
    assert torch.allclose(box[1], torch.tensor([0.5 - half, 0.0, 0.5 + half, 1.0]), atol=1e-6)


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.5])
def test_boxes_are_distributed_as_torchvision_draws_them(aspect: float):
    from torchvision.transforms import RandomResizedCrop

    height, width, count = 4000, round(4000 * aspect), 1500
    scale, ratio = (0.1, 0.8), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 1).expand(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    y0, x0, h, w = (theirs / [height, width, height, width]).T
    boxes = random_boxes(torch.full((count,), aspect), 1, scale, ratio, seeded(1))[:, 0].numpy()
    for ours, other in (
        ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), w * h),
        ((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]), w / h),
        (boxes[:, 0], x0),
        (boxes[:, 1], y0),
    ):
        assert ks_2samp(ours, other).pvalue > 1e-3


def naive_area(field: np.ndarray, box: list[float], size: tuple[int, int]) -> np.ndarray:
    """The mean of a field that is constant in each of its cells over each cell of a box."""
    rows, columns = field.shape
    x0, y0, x1, y1 = box
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            top, bottom = (y0 + (y1 - y0) * (i + k) / size[0] for k in (0, 1))
            left, right = (x0 + (x1 - x0) * (j + k) / size[1] for k in (0, 1))
            for r in range(rows):
                for c in range(columns):
                    high = max(0.0, min(bottom, (r + 1) / rows) - max(top, r / rows))
                    wide = max(0.0, min(right, (c + 1) / columns) - max(left, c / columns))
                    out[i, j] += field[r, c] * high * wide / ((bottom - top) * (right - left))
    return out


def test_area_sampling_is_the_covered_share():
    field = torch.rand(1, 1, 7, 5, generator=seeded())
    boxes = some_boxes(12)
    ours = sample(field, boxes, None, (4, 3), kernel="area")
    for view, box in zip(ours[0, :, 0], boxes[0].double().tolist(), strict=True):
        assert np.abs(view.numpy() - naive_area(field[0, 0].numpy(), box, (4, 3))).max() < 2e-5


def test_area_sampling_of_a_mask_on_patch_borders_leaks_nowhere():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:8, 8:12] = 1
    patches = sample(mask, FULL, None, 4, kernel="area")[0, 0, 0]
    expected = torch.zeros(4, 4)
    expected[1, 2] = 1
    assert torch.allclose(patches, expected, atol=1e-6)


@pytest.mark.parametrize("kernel", ["bicubic", "linear", "area"])
def test_weights_of_an_output_sum_to_one(kernel: str):
    low, high = torch.rand(50, 2, generator=seeded()).sort(dim=1).values.unbind(1)
    weights = resampling_weights(low, high + 0.02, 6, 9, kernel, blur=torch.linspace(0, 3, 50))
    assert torch.allclose(weights.sum(-1), torch.ones(50, 6), atol=1e-5)


def test_a_constant_image_stays_constant():
    field = torch.full((1, 3, 20, 20), 0.37)
    boxes = some_boxes(30)
    views = sample(field, boxes, torch.rand(1, 30) < 0.5, 11, blur=torch.rand(1, 30) * 3)
    assert (views - 0.37).abs().max() < 1e-5


@pytest.mark.parametrize("kernel", ["bicubic", "linear", "area"])
def test_a_flip_mirrors_the_columns(kernel: str):
    field = torch.rand(2, 3, 9, 9, generator=seeded())
    boxes = some_boxes(6).view(2, 3, 4)
    blur = torch.rand(2, 3, generator=seeded()) * 2
    plain = sample(field, boxes, torch.zeros(2, 3, dtype=torch.bool), (4, 5), kernel, blur)
    flips = torch.tensor([[True, False, True], [False, True, True]])
    flipped = sample(field, boxes, flips, (4, 5), kernel, blur)
    assert torch.equal(plain, sample(field, boxes, None, (4, 5), kernel, blur))
    assert torch.allclose(flipped[flips], plain[flips].flip(-1), atol=1e-6)
    assert torch.equal(flipped[~flips], plain[~flips])


def test_blur_is_a_gaussian_in_output_pixels():
    field = torch.rand(1, 1, 24, 24, generator=seeded())
    boxes = some_boxes(4, seed=3)
    sigma = torch.tensor([[0.0, 0.5, 1.3, 2.0]])
    sharp = sample(field, boxes, None, 15)[0, :, 0].double().numpy()
    blurred = sample(field, boxes, None, 15, blur=sigma)[0, :, 0].double().numpy()
    assert np.abs(sharp[0] - blurred[0]).max() < 1e-6
    for before, after, s in zip(sharp[1:], blurred[1:], sigma[0, 1:].tolist(), strict=True):
        # Weights that leave the image are shared among the others.
        options = {"mode": "constant", "truncate": 20.0}
        expected = gaussian_filter(before, s, **options) / gaussian_filter(np.ones((15, 15)), s, **options)
        assert np.abs(after - expected).max() < 1e-5


def test_a_field_of_coordinates_returns_where_the_view_looks():
    """Linear values come back exactly, inside of the image and when not shrunk."""
    at = (torch.arange(32) + 0.5) / 32
    field = torch.stack((at.expand(32, 32), at[:, None].expand(32, 32)))[None]
    corners = torch.rand(40, 2, generator=seeded()) * 0.5 + 0.2
    small = torch.cat((corners, corners + torch.rand(40, 2, generator=seeded(1)) * 0.2 + 0.01), dim=1)
    large = torch.cat((small[:, :2], small[:, 2:] + 0.1), dim=1)
    for boxes, cells, tolerance in ((small, 7, 1e-5), (large, 4, 0.1 / 32)):
        views = sample(field, boxes[None], None, cells, kernel="linear")[0]
        centres = (torch.arange(cells) + 0.5) / cells
        for axis in (0, 1):
            low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
            expected = low + (high - low) * centres
            expected = expected[:, None, :] if axis == 0 else expected[:, :, None]
            assert (views[:, axis] - expected).abs().max() < tolerance


@pytest.mark.parametrize("kernel", ["bicubic", "linear", "area"])
@pytest.mark.parametrize("size", [(5, 4), (30, 41)])
def test_a_field_in_the_corner_of_its_square_is_read_as_if_alone(kernel: str, size: tuple[int, int]):
    shapes = [(17, 23), (4, 9), (20, 6)]
    boxes = some_boxes(3 * 5).view(3, 5, 4)
    boxes[:, 0] = FULL
    flips = torch.rand(3, 5, generator=seeded()) < 0.5
    blur = torch.rand(3, 5, generator=seeded()) * 2
    square = torch.full((3, 2, 20, 23), 1000.0)
    for field, (rows, columns) in zip(square, shapes, strict=True):
        field[:, :rows, :columns] = torch.rand(2, rows, columns, generator=seeded(rows))
    together = sample(square, boxes, flips, size, kernel, blur, torch.tensor(shapes))
    for k, (rows, columns) in enumerate(shapes):
        field = square[k : k + 1, :, :rows, :columns]
        alone = sample(field, boxes[k : k + 1], flips[k : k + 1], size, kernel, blur[k : k + 1])
        assert (together[k] - alone[0]).abs().max() < 1e-5


def test_sampling_is_differentiable_in_the_field():
    field = torch.rand(1, 2, 5, 4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    boxes = some_boxes(2).double()
    flips = torch.tensor([[True, False]])
    assert torch.autograd.gradcheck(lambda f: sample(f, boxes, flips, (3, 2)), (field,))


def test_box_sums_against_a_loop():
    field = torch.rand(2, 3, 5, 7, generator=seeded())
    boxes = some_boxes(2 * 3 * 4).view(2, 3, 4, 4)
    ours = box_sums(field, boxes)
    for b in range(2):
        for m in range(3):
            for t in range(4):
                box = boxes[b, m, t].double().tolist()
                mean = naive_area(field[b, m].double().numpy(), box, (1, 1))[0, 0]
                cells = (box[2] - box[0]) * 7 * (box[3] - box[1]) * 5
                assert ours[b, m, t].item() == pytest.approx(mean * cells, abs=1e-4)


def test_box_sums_of_the_whole_and_of_nothing():
    field = torch.rand(1, 1, 6, 6, generator=seeded())
    boxes = torch.tensor([[[[0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.9], [-1.0, -1.0, 2.0, 2.0]]]])
    whole, nothing, outside = box_sums(field, boxes)[0, 0].tolist()
    assert whole == pytest.approx(field.sum().item(), rel=1e-6)
    assert nothing == 0
    assert outside == whole
