"""From masks over patches to pixels."""

import sys

import numpy as np
import pytest

from foveola.config import UserError
from foveola.proposals.refine import enlarged, grabcut, opencv


def disc(side: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:side, :side] + 0.5
    return (y - side / 2) ** 2 + (x - side / 2) ** 2 < radius**2


def test_pixels_have_the_patch_at_their_centre():
    masks = np.array([[[True, False], [False, True]]])
    # Centres of 5 columns at 0.2, 0.6, 1.0, 1.4, 1.8 patches: the third is in the second patch.
    assert enlarged(masks, (2, 5))[0].astype(int).tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert enlarged(masks, (1, 1))[0].tolist() == [[True]]  # the last patch


@pytest.mark.parametrize("size", [96, 240, 40])
def test_edges_go_where_the_colours_change(size: int):
    """A red disc on noisy green, whose patches (8 x 8 pixels) miss its edge; the result is exact there."""
    pytest.importorskip("cv2")
    random = np.random.default_rng(0)
    truth = disc(96, 33)
    pixels = np.where(truth[..., None], (200, 40, 40), (40, 160, 60)) + random.integers(-20, 20, (96, 96, 3))
    coarse = truth.reshape(12, 8, 12, 8).mean(axis=(1, 3)) > 0.5
    found = grabcut(coarse[None], pixels.astype(np.uint8), (size, size))[0]
    large, patches = disc(size, 33 * size / 96), enlarged(coarse[None], (size, size))[0]
    iou, before = ((m & large).sum() / (m | large).sum() for m in (found, patches))
    assert before < 0.95
    assert iou > 0.98
    again = grabcut(coarse[None], pixels.astype(np.uint8), (size, size))[0]
    np.testing.assert_array_equal(found, again)


def test_objects_stay_apart_and_what_colours_do_not_show_stays():
    pytest.importorskip("cv2")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    masks = np.zeros((3, 8, 8), bool)
    masks[0, 2:5, 2:5] = masks[1, 5:8, 2:5] = masks[2, 0, 7] = True
    found = grabcut(masks, pixels, (64, 64))
    assert found.sum(axis=0).max() == 1
    for mask, plain in zip(found, enlarged(masks, (64, 64)), strict=True):
        assert (mask & plain).sum() > 0.4 * (mask | plain).sum()
    constant = np.full((64, 64, 3), 9, np.uint8)
    for mask in (np.ones((1, 8, 8), bool), np.zeros((1, 8, 8), bool)):
        assert grabcut(mask, constant, (32, 32)).mean() == mask.mean()
    assert grabcut(masks[:0], constant, (32, 32)).shape == (0, 32, 32)


def test_without_opencv_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        UserError, match=r"needs OpenCV: pip install 'foveola\[proposals\]', or .*refine=none"
    ):
        opencv()
