"""`sample` against PIL and `F.interpolate`."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from foveola.geometry import sample

FULL = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
MODES = {"bicubic": "bicubic", "linear": "bilinear"}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "linear": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("kernel", ["bicubic", "linear"])
@pytest.mark.parametrize("size", [(16, 16), (40, 40), (9, 23), (64, 17)])
def test_the_full_box_is_interpolate(kernel: str, size: tuple[int, int]):
    field = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    ours = sample(field, FULL.expand(2, 1, 4), None, size, kernel)[:, 0]
    theirs = interpolate(field, size=size, mode=MODES[kernel], antialias=True, align_corners=False)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("kernel", ["bicubic", "linear"])
@pytest.mark.parametrize("size", [(7, 7), (14, 10), (50, 60)])
def test_any_box_is_pil(kernel: str, size: tuple[int, int]):
    """PIL, too, reads beyond the box where the kernel does, up to the border of the image."""
    generator = torch.Generator().manual_seed(1)
    field = torch.rand(1, 1, 30, 44, generator=generator)
    low, high = torch.rand(2, 2, 12, generator=generator).sort(dim=0).values
    boxes = torch.stack((low[0] * 0.9, low[1] * 0.9, high[0] * 0.9 + 0.1, high[1] * 0.9 + 0.1), dim=-1)[None]
    image = Image.fromarray(field[0, 0].numpy())
    ours = sample(field, boxes, None, size, kernel)[0, :, 0].numpy()
    for view, (x0, y0, x1, y1) in zip(ours, boxes[0].double().tolist(), strict=True):
        box = (x0 * 44, y0 * 30, x1 * 44, y1 * 30)
        theirs = image.resize((size[1], size[0]), FILTERS[kernel], box=box)
        assert np.abs(view - np.asarray(theirs)).max() < 2e-5


def test_area_is_pil_box_and_adaptive_pooling():
    field = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    ours = sample(field, FULL, None, 7, kernel="area")[0, 0]
    assert (ours - torch.nn.functional.adaptive_avg_pool2d(field, 7)[0]).abs().max() < 1e-6
