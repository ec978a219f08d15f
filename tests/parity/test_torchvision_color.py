"""Colour operations against torchvision's functional ones, on float images in [0, 1]."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

from foveola.views.color import ColorConfig, ColorDraw, apply

PLAIN = ColorConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
OPERATIONS = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
# torchvision's gray is 0.2989 r + 0.587 g + 0.114 b (its first weight is cut off), ours PIL's 0.299.
GRAY = 2e-4


def random_images(count: int, seed: int = 0) -> Tensor:
    """Noise, smooth colours, gray, black and white: whatever hue and contrast may stumble over."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 6, 7, generator=generator)
    images[::5] = images[::5].round()
    images[1::5] = images[1::5, :1]
    images[2::5] = images[2::5, :, :1, :1]
    return images


def nothing(count: int) -> ColorDraw:
    false = torch.zeros(count, dtype=torch.bool)
    return ColorDraw(
        torch.full((count, 4), 4), torch.ones(count, 4), false.clone(), false.clone(), torch.zeros(count)
    )


@pytest.mark.parametrize("library", [v1, v2], ids=["v1", "v2"])
@pytest.mark.parametrize("operation", range(4))
def test_one_operation(library, operation: int):
    images = random_images(60)
    factors = torch.linspace(-0.5, 0.5, 60) if operation == 3 else torch.linspace(0, 2, 60)
    drawn = nothing(60)
    drawn.order[:, 2] = operation
    drawn.factors[:, operation] = factors
    ours = apply(images.clone(), drawn, PLAIN)
    for image, factor, result in zip(images, factors.tolist(), ours, strict=True):
        expected = getattr(library, OPERATIONS[operation])(image, factor)
        assert (result - expected).abs().max() < GRAY


@pytest.mark.parametrize("library", [v1, v2], ids=["v1", "v2"])
def test_all_orders(library):
    orders = torch.tensor(list(permutations(range(4))))
    images = random_images(24, seed=1)
    generator = torch.Generator().manual_seed(2)
    factors = 0.6 + 0.8 * torch.rand(24, 4, generator=generator)
    factors[:, 3] = 0.2 * torch.rand(24, generator=generator) - 0.1
    drawn = ColorDraw(orders, factors, *(getattr(nothing(24), name) for name in ("gray", "solarize", "blur")))
    ours = apply(images.clone(), drawn, PLAIN)
    for image, order, factor, result in zip(images, orders.tolist(), factors.tolist(), ours, strict=True):
        for operation in order:
            image = getattr(library, OPERATIONS[operation])(image, factor[operation])
        assert (result - image).abs().max() < 3 * GRAY


def test_gray_solarise_and_normalise():
    images = random_images(20, seed=3)
    drawn = nothing(20)
    drawn.gray[5:15] = True
    drawn.solarize[10:] = True
    config = ColorConfig()
    ours = apply(images.clone(), drawn, config)
    for i, (image, result) in enumerate(zip(images, ours, strict=True)):
        expected = v2.rgb_to_grayscale(image, 3) if 5 <= i < 15 else image
        expected = v2.solarize(expected, 128 / 255) if i >= 10 else expected
        expected = v2.normalize(expected, list(config.mean), list(config.std))
        near = (image - 128 / 255).abs().amin() < GRAY  # a threshold within the difference of the grays
        assert near or (result - expected).abs().max() < GRAY / min(config.std)
