"""`pixels:`: features are pixels, for every protocol that takes patches."""

import numpy as np
import pytest
import torch
from PIL import Image

import foveola
from foveola.config import UserError
from foveola.models.embedding import patchify


def test_features_are_the_pixels_of_the_patches():
    encoder = foveola.load("pixels:?size=24&patch=8")
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    features = encoder(images)
    expected = patchify(images.double(), 8)
    expected = expected / expected.square().mean(dim=2, keepdim=True).sqrt()
    assert features.grid == (3, 3)
    assert (features.patches - expected).abs().max() < 1e-4
    assert (features.objects[:, 0] - expected.mean(dim=1)).abs().max() < 1e-4
    other = encoder(images[:, :, :16])  # any size; nothing depends on the place
    assert torch.equal(other.patches, features.patches[:, :6])


def test_objects_are_means_of_their_patches():
    encoder = foveola.load("pixels:?size=16&patch=8")
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[[True, False, False, True]]])
    features = encoder(images, mask)
    assert torch.allclose(features.objects[0, 0], features.patches[0, [0, 3]].mean(dim=0), atol=1e-6)


def test_a_whole_image_by_default():
    encoder = foveola.load("pixels:")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    image = encoder.transform(photo)[None]
    assert image.shape == (1, 3, 32, 32)
    cosine = torch.cosine_similarity(encoder(image).objects[0, 0], image.flatten(), dim=0)
    assert cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pixels:?sise=3", "unknown option 'sise'; did you mean 'size'"),
        ("pixels:?size=-3", "size must be a number of pixels, such as 32"),
        ("pixels:?size=224&patch=224", "patches of 224 pixels a side have 150,528 numbers.*at most 64"),
        ("pixels:?size=32&size=64", "size is given more than once"),
        ("pixels:?size=30&patch=8", "size=30 is not a multiple of patch=8"),
    ],
)
def test_mistakes(name: str, message: str):
    with pytest.raises(UserError, match=message):
        foveola.load(name)
