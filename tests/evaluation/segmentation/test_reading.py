"""The pass over labelled images: patches and labels cover the same place; references are chosen as said."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foveola.config import UserError
from foveola.data.sample import DataError
from foveola.data.segmentation import IGNORE, PixelSource
from foveola.evaluation.segmentation.labelled import squash
from foveola.evaluation.segmentation.reading import (
    DenseConfig,
    DensePass,
    choose_rows,
    collect,
    label_counts,
    patch_modes,
    patch_pixels,
    pixel_classes,
)
from foveola.models.transform import resize

CONFIG = DenseConfig(workers=0, batch_size=3)


@pytest.fixture
def random_source(pixel_source):
    """random_source(count, seed): noise, labelled with noise."""

    def make(count: int = 5, seed: int = 0, **options):
        rng = np.random.default_rng(seed)
        images = [rng.integers(0, 256, (40, 50, 3), np.uint8) for _ in range(count)]
        maps = [rng.choice([0, 1, 2, IGNORE], (40, 50)).astype(np.uint8) for _ in range(count)]
        return pixel_source(images, maps, name=f"maps-{seed}:", **options)

    return make


def test_patch_pixels_are_the_patches_of_the_encoder():
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (2, 12, 12), np.uint8))
    cut = patch_pixels(maps, 4)
    for n, (row, column) in enumerate(np.ndindex(3, 3)):
        part = maps[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(cut[:, n], part.flatten(1))


def test_counts_and_modes_equal_numpy():
    pixels = np.random.default_rng(0).choice([0, 1, 3, IGNORE], (50, 6)).astype(np.uint8)
    counts = label_counts(torch.from_numpy(pixels), 4)
    naive = [[(row == c).sum() for c in (0, 1, 2, 3, IGNORE)] for row in pixels]
    np.testing.assert_array_equal(counts, naive)
    expected = [min(np.unique(row), key=lambda v: (-(row == v).sum(), v)) for row in pixels]
    np.testing.assert_array_equal(patch_modes(counts), np.where(np.array(expected) == IGNORE, 4, expected))


def test_squash_takes_the_pixel_under_the_centre():
    from PIL import Image

    labels = np.random.default_rng(0).integers(0, 256, (37, 53), np.uint8)
    for side in (16, 37, 64):
        expected = np.asarray(Image.fromarray(labels).resize((side, side), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(squash(labels, side), expected)


def test_pass_gives_what_the_encoder_gives(encoder, random_source):
    source = random_source()
    passing = DensePass(encoder, source, CONFIG, progress=False)
    batches = list(passing)
    assert isinstance(source, PixelSource)
    images = torch.cat([batch.image_indices for batch in batches])
    assert images.tolist() == list(range(5))
    features = torch.cat([batch.features for batch in batches])
    for i in range(5):
        pixels = resize(source.images[i], 32, 32)[None]
        expected = encoder(encoder.normalise(pixels)).patches[0]
        torch.testing.assert_close(features[i], expected, rtol=1e-4, atol=1e-4)
    maps = torch.cat([batch.maps for batch in batches]).numpy()
    np.testing.assert_array_equal(maps[3], squash(source.maps[3], 32))
    facts = passing.facts()
    assert (facts["images"], facts["rows"], facts["unreadable"]) == (5, 5 * 16, 0)


def test_images_are_resized_as_the_encoder_has_it(encoder, random_source):
    source = random_source()
    (plain,) = list(DensePass(encoder, source, DenseConfig(workers=0), progress=False))
    transform = replace(encoder.config.transform, interpolation="bilinear")
    encoder.config = replace(encoder.config, transform=transform)
    (other,) = list(DensePass(encoder, source, DenseConfig(workers=0), progress=False))
    for i in range(5):
        pixels = resize(source.images[i], 32, 32, "bilinear")[None]
        expected = encoder(encoder.normalise(pixels)).patches[0]
        torch.testing.assert_close(other.features[i], expected, rtol=1e-4, atol=1e-4)
        assert (plain.features[i] - expected).abs().max() > 0.01


def test_a_map_of_another_size_than_its_image_is_named(encoder, random_source):
    source = random_source()
    source.maps[2] = source.maps[2][:-1]
    for workers in (0, 1):
        passing = DensePass(encoder, source, DenseConfig(workers=workers), progress=False)
        with pytest.raises(DataError, match=r"image-2 is 50x40 pixels, its label map 50x39$"):
            list(passing)


def test_too_many_unreadable_images_are_an_error(encoder, random_source):
    source = random_source(broken=frozenset({1}))
    passing = DensePass(encoder, source, CONFIG, progress=False)
    assert torch.cat([batch.image_indices for batch in passing]).tolist() == [0, 2, 3, 4]
    with pytest.raises(UserError, match="1 of 5 images cannot be read"):
        passing.facts()


def test_features_that_are_not_finite_are_an_error(encoder, random_source):
    encoder.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        list(DensePass(encoder, random_source(), CONFIG, progress=False))


def test_image_size_must_be_whole_patches(encoder, random_source):
    with pytest.raises(UserError, match="image_size=30 is not a multiple of the patch size 8"):
        DensePass(encoder, random_source(), DenseConfig(image_size=30))


def test_reference_set_keeps_as_many_of_each_image_and_labels_fit_features(encoder, random_source):
    source = random_source()
    whole = collect(DensePass(encoder, source, CONFIG, progress=False), 3, None, "rare", 0)
    assert len(whole.image_indices) == 5 * 16
    some = collect(DensePass(encoder, source, CONFIG, progress=False), 3, 37, "rare", 0)
    assert some.image_indices.bincount().tolist() == [37 // 5] * 5
    again = collect(
        DensePass(encoder, source, DenseConfig(workers=2, batch_size=2), progress=False), 3, 37, "rare", 0
    )
    assert torch.equal(some.pixels, again.pixels)
    for row in range(
        len(some.image_indices)
    ):  # every kept row is a row of the whole reference_set, with its labels
        same = (whole.features - some.features[row]).abs().amax(dim=1) < 1e-5
        assert any(torch.equal(pixels, some.pixels[row]) for pixels in whole.pixels[same])
    other = collect(DensePass(encoder, source, CONFIG, progress=False), 3, 37, "rare", 1)
    assert not torch.equal(some.pixels, other.pixels)
    with pytest.raises(UserError, match="memory=4 patches of 5 images: less than one"):
        collect(DensePass(encoder, source, CONFIG, progress=False), 3, 4, "rare", 0)


def test_rows_without_a_class_are_never_kept(encoder, random_source):
    counts = torch.zeros(6, 3, dtype=torch.int16)
    counts[:4, 2], counts[4:, 0] = 9, 9
    assert choose_rows(counts, 6, "rare", np.random.default_rng(0)).tolist() == [4, 5]
    source = random_source()
    source.maps = [np.full_like(labels, IGNORE) for labels in source.maps]
    with pytest.raises(UserError, match="no patch of 5 images has a class"):
        collect(DensePass(encoder, source, CONFIG, progress=False), 3, None, "rare", 0)


def test_rare_sampling_is_the_rule_and_prefers_rare_classes():
    counts = torch.zeros(20, 3, dtype=torch.int16)
    counts[:18, 0], counts[18:, 1] = 4, 4  # 18 patches of one class, 2 of another
    rng = np.random.default_rng(5)
    scores = np.random.default_rng(5).random(20) * ([18] * 18 + [2] * 2)
    kept = choose_rows(counts, 4, "rare", rng)
    assert kept.tolist() == sorted(np.argsort(scores)[:4].tolist())
    rare = sum(int(18 in choose_rows(counts, 4, "rare", np.random.default_rng(s))) for s in range(200))
    even = sum(int(18 in choose_rows(counts, 4, "uniform", np.random.default_rng(s))) for s in range(200))
    assert rare > 170 > 60 > even > 20


def test_sources_without_pixel_labels_or_of_other_classes(encoder, list_source, random_source):
    train, test = random_source(seed=1), random_source(seed=2)
    assert pixel_classes(train, test) == ("a", "b", "c")
    with pytest.raises(UserError, match="test: list: has no label for each pixel"):
        pixel_classes(train, list_source([]))
    with pytest.raises(UserError, match="3 classes of maps-1: and 2 of maps-2:"):
        pixel_classes(train, random_source(seed=2, classes=("a", "b")))
