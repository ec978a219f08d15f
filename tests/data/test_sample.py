"""Objects: drawing, cleaning and choosing, against loops and pycocotools."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from foveola.data.sample import Canvases, Objects, area_weights

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


def boxes_only(*boxes, areas=None):
    objects = Objects.from_boxes(np.array(boxes, np.float32), areas=areas)
    assert objects is not None
    return objects


def naive_box(box, size):
    """Coverage times 255, pixel by pixel in plain floats."""
    x0, y0, x1, y1 = (float(corner) * size for corner in box)
    out = np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            wide = max(0.0, min(x1, x + 1) - max(x0, x))
            tall = max(0.0, min(y1, y + 1) - max(y0, y))
            out[y, x] = 255 * wide * tall
    return out


@pytest.mark.parametrize("size", [1, 7, 16, 128])
def test_boxes_are_drawn_exactly(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        corners = np.sort(rng.random((2, 2)), axis=0).reshape(-1)[[0, 1, 2, 3]]
        objects = boxes_only(corners)
        want = naive_box(objects.boxes[0], size)
        drawn = objects.draw(0, size).astype(float)
        assert np.abs(drawn - want)[want >= 1].max(initial=0) <= 0.5 + 1e-3
        assert (drawn[want >= 0.1] >= 1).all()
        assert (drawn[want == 0] == 0).all()


def test_rounding_of_box_corners_covers_no_neighbour():
    for k in range(1, 100):  # k/100 is not a float32: its product with 100 is a little more or less than k
        drawn = boxes_only([k / 100 - 0.01, 0, k / 100, 1]).draw(0, 100)
        assert np.flatnonzero(drawn.any(0)).tolist() == [k - 1]


@pytest.mark.parametrize("corner", [0.0, 0.3, 1 - 1e-5])
def test_the_smallest_object_is_still_seen(corner):
    box = [corner, corner, corner + 1e-5, corner + 1e-5]
    assert boxes_only(box).draw(0, 32).any()


def naive_area(mask, size):
    """Each output pixel is the mean of the mask over its cell, on a grid fine enough to be exact."""
    height, width = mask.shape
    fine = np.kron(mask, np.ones((size, size)))
    return fine.reshape(size, height, size, width).mean((1, 3)) * 255


def test_masks_of_every_kind_are_drawn_alike():
    rng = np.random.default_rng(0)
    mask = rng.random((13, 9)) < 0.4
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    flat = mask.T.reshape(-1)  # column by column, as COCO counts
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [flat[-1]]]))).tolist()
    counts = np.diff([0, *edges, len(flat)]).tolist()
    plain = {"size": [13, 9], "counts": counts}
    box, area = np.array([[0, 0, 1, 1]], np.float32), np.array([mask.mean()], np.float32)
    for kind in (mask, rle, plain):
        drawn = Objects(box, area, None, (kind,)).draw(0, 8)
        assert np.abs(drawn - naive_area(mask, 8)).max() <= 0.5 + 1e-3


def test_polygons_are_drawn_as_pycocotools_fills_them():
    rings = [[2.0, 2, 30, 3, 28, 20, 5, 18], [33.0, 5, 38, 5, 38, 9, 33, 9]]
    filled = coco.decode(coco.merge(coco.frPyObjects(rings, 24, 40))).astype(bool)
    objects = Objects(
        np.array([[0, 0, 1, 1]], np.float32),
        np.array([0.5], np.float32),
        None,
        ({"size": [24, 40], "polygons": rings},),
    )
    assert filled.sum() > 400
    assert np.abs(objects.draw(0, 20) - naive_area(filled, 20)).max() <= 0.5 + 1e-3


def test_a_mask_without_a_pixel_is_drawn_as_its_box():
    box = np.array([[0.25, 0.25, 0.5, 0.75]], np.float32)
    mask = np.zeros((8, 8), bool)
    drawn = Objects(box, np.array([0.1], np.float32), None, (mask,)).draw(0, 8)
    assert np.array_equal(drawn, boxes_only(box[0]).draw(0, 8))


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 5), (7, 3), (3, 8), (640, 128)])
def test_area_weights_keep_the_mean(inputs, outputs):
    weights = area_weights(inputs, outputs)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(weights.sum(0), outputs / inputs, atol=1e-3)


def test_boxes_are_turned_clipped_and_dropped():
    objects = Objects.from_boxes(
        np.array([[0.8, 0.9, 0.2, 0.1], [-1, -1, 0.5, 2], [1.2, 0, 1.5, 1], [0.3, 0.2, 0.3, 0.9]]),
        labels=np.array([4, 5, 6, 7]),
        masks=["a", "b", "c", "d"],
    )
    assert objects is not None
    np.testing.assert_allclose(objects.boxes, [[0.2, 0.1, 0.8, 0.9], [0, 0, 0.5, 1]], atol=1e-6)
    np.testing.assert_allclose(objects.areas, [0.48, 0.5], atol=1e-6)
    assert objects.labels is not None
    assert objects.labels.tolist() == [4, 5]
    assert objects.masks == ("a", "b")
    assert Objects.from_boxes(np.array([[1.0, 0, 2, 1]])) is None
    assert Objects.from_boxes(np.zeros((0, 4))) is None


def test_choice_by_area_is_proportional():
    objects = boxes_only([0, 0, 0.5, 0.5], [0, 0, 1, 0.75])  # areas 1 : 3
    rng = np.random.default_rng(0)
    picks = np.concatenate([objects.choose(rng, 1, "area") for _ in range(4000)])
    assert abs(picks.mean() - 0.75) < 0.025
    picks = np.concatenate([objects.choose(rng, 1, "uniform") for _ in range(4000)])
    assert abs(picks.mean() - 0.5) < 0.025
    assert objects.choose(rng, 1, "largest").tolist() == [1]


@pytest.mark.parametrize("by", ["area", "uniform", "largest"])
def test_choice_repeats_only_when_it_must(by):
    objects = boxes_only([0, 0, 0.5, 0.5], [0, 0, 1, 0.75], [0, 0, 0.1, 0.1])
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 9):
        picks = objects.choose(rng, count, by)
        for start in range(0, count, 3):
            part = picks[start : start + 3].tolist()
            assert len(set(part)) == len(part)
    assert objects.choose(rng, 0, by).tolist() == []


def test_canvases_move_as_one():
    batch = Canvases(
        images=torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        extents=torch.full((2, 2), 4),
        aspects=torch.ones(2),
        object_masks=torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        whole=torch.ones(2, 1, dtype=torch.bool),
        object_labels=torch.full((2, 1), -1),
        labels=torch.full((2,), -1),
        indices=torch.arange(2),
        skipped=3,
    )
    moved = batch.to("meta")
    assert moved.images.device.type == moved.extents.device.type == "meta"
    assert (moved.skipped, len(moved)) == (3, 2)
