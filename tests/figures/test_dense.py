"""Features of patches at any size, whole and in tiles."""

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import UserError
from foveola.figures import dense
from foveola.figures.dense import patch_map, starts
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.transform import fit_to_patches, fitted_size
from foveola.models.vit import Inputs, ViTConfig
from foveola.zoo.load import load


def encoder_of(positions: str = "learned") -> Encoder:
    torch.manual_seed(0)
    shape = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 16, "field_size": (5, 5)}
    model = ViTConfig(**shape, positions=positions)
    return Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=16, crop=16)))


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def fitted(pixels, encoder: Encoder, size: int) -> torch.Tensor:
    return fit_to_patches(pixels, encoder.config.transform, encoder.patch_size, size)


def test_sizes_are_whole_patches_of_the_same_shape():
    cases = [((100, 200), 64, (32, 64)), ((300, 200), 60, (60, 40)), ((64, 64), 15, (16, 16))]
    for (height, width), size, expected in [*cases, ((8, 800), 32, (4, 32))]:
        assert fitted_size(np.zeros((height, width, 3), np.uint8), 4, size) == expected


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope", "field"])
def test_a_image_at_once_is_what_the_network_says(positions):
    encoder, pixels = encoder_of(positions), image(50, 30)
    features = patch_map(encoder, pixels, 40)
    assert features.shape == (10, 6, 16)
    resized = np.asarray(Image.fromarray(pixels).resize((24, 40), Image.Resampling.BICUBIC))
    assert np.abs(resized.astype(int) - fitted(pixels, encoder, 40).permute(1, 2, 0).numpy()).max() <= 1
    images = encoder.normalise(fitted(pixels, encoder, 40)[None])
    expected = encoder(images).patches[0].view(10, 6, 16)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-6)


def test_the_default_size_is_that_of_the_transform():
    assert patch_map(encoder_of(), image(70, 70)).shape == (4, 4, 16)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
def test_tiles_of_a_network_that_sees_single_patches_are_the_whole(overlap):
    encoder = load("pixels:?size=16&patch=4")  # every patch is its own pixels
    for height, width, size in ((90, 60, 120), (60, 90, 84), (40, 40, 40)):
        pixels = image(height, width)
        whole = patch_map(encoder, pixels, size, tile=0)
        np.testing.assert_allclose(patch_map(encoder, pixels, size, 16, overlap), whole, atol=1e-5)


def test_a_tile_as_large_as_the_image_is_the_image():
    encoder, pixels = encoder_of(), image(40, 28)
    np.testing.assert_array_equal(patch_map(encoder, pixels, 40, tile=40), patch_map(encoder, pixels, 40))


def test_overlapping_tiles_are_averaged_with_falling_weights():
    """By hand: two tiles of 4 x 4 patches over 4 x 6, which share two columns."""
    encoder, pixels = encoder_of(), image(16, 24)
    images = encoder.normalise(fitted(pixels, encoder, 24)[None])
    left, right = (encoder(images[..., x : x + 16]).patches[0].view(4, 4, 16).numpy() for x in (0, 8))
    features = patch_map(encoder, pixels, 24, tile=16, overlap=0.5)
    np.testing.assert_allclose(features[:, :2], left[:, :2], atol=1e-6)
    np.testing.assert_allclose(features[:, 4:], right[:, 2:], atol=1e-6)
    # Weights along a tile are 1/2, 1, 1, 1/2: in column 2 the left tile has 1 and the right one 1/2.
    np.testing.assert_allclose(features[:, 2], (2 * left[:, 2] + right[:, 0]) / 3, atol=1e-6)
    np.testing.assert_allclose(features[:, 3], (left[:, 3] + 2 * right[:, 1]) / 3, atol=1e-6)


def test_a_field_is_read_where_the_tile_lies():
    encoder, pixels = encoder_of("field"), image(16, 32)
    images = encoder.normalise(fitted(pixels, encoder, 32)[None])
    halves = [
        encoder.backbone(
            images[..., x : x + 16], Inputs(positions=torch.tensor([[x / 32, 0, x / 32 + 0.5, 1]]))
        ).patches
        for x in (0, 16)
    ]
    expected = torch.cat([half[0].view(4, 4, 16) for half in halves], dim=1).detach().numpy()
    np.testing.assert_allclose(patch_map(encoder, pixels, 32, 16, 0.0), expected, atol=1e-6)


def test_images_of_many_patches_are_cut_without_being_asked(monkeypatch):
    encoder, pixels = encoder_of(), image(48, 48)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    monkeypatch.setattr(dense, "PATCHES_AT_ONCE", 64)
    tiled = patch_map(encoder, pixels, 48)
    assert {shape[2:] for shape in seen} == {(16, 16)}
    assert all(shape[0] * 16 <= 64 for shape in seen), "and no more of them at once than memory is meant for"
    np.testing.assert_array_equal(tiled, patch_map(encoder, pixels, 48, tile=16))
    seen.clear()
    patch_map(encoder, pixels, 48, tile=0)
    assert [shape[2:] for shape in seen] == [(48, 48)]


def test_tiles_cover_every_patch_and_lie_inside():
    for length in range(1, 40):
        for side in range(1, 12):
            for overlap in (0.0, 0.5, 0.99):
                places = starts(length, side, overlap)
                covered = {i for start in places for i in range(start, start + min(side, length))}
                assert covered == set(range(length))
                assert len(set(places)) == len(places)


def test_bad_sizes():
    encoder, pixels = encoder_of(), image(16, 16)
    for settings, message in (
        ({"size": 3}, "size=3: a patch of this encoder has 4 pixels a side"),
        ({"size": 64, "tile": 1}, "tile=1: a patch"),
        ({"overlap": 1.0}, "overlap=1.0: expected a fraction"),
    ):
        with pytest.raises(UserError, match=message):
            patch_map(encoder, pixels, **settings)
