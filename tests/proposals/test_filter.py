"""What is kept of proposals, by hand-worked cases and a naive loop."""

import numpy as np
import pytest

from foveola.config import ConfigError, UserError, build, refuse_unread
from foveola.proposals.filter import FilterConfig, filtered
from foveola.proposals.proposal import Proposals

SIZE = 10, 20  # rows, columns


def boxes_of(*rows: tuple[float, float, float, float, float]) -> Proposals:
    """Boxes with a score each."""
    table = np.array(rows, np.float32).reshape(-1, 5)
    return Proposals(table[:, :4], table[:, 4], np.arange(len(table)))


def kept(found: Proposals, **settings: object) -> list[int]:
    return filtered(found, SIZE, build(FilterConfig, settings)).labels.tolist()


FOUR = boxes_of((0, 0, 20, 10, 0.1), (0, 0, 10, 10, 0.9), (0, 0, 2, 2, 0.5), (5, 5, 15, 10, 0.4))


def test_the_surest_come_first_and_thresholds_are_shares_of_the_image():
    assert kept(FOUR) == [1, 2, 3, 0]
    assert kept(FOUR, min_score=0.4) == [1, 2, 3]
    assert kept(FOUR, min_area=0.021) == [1, 3, 0]  # 4 of 200 pixels are 2 %
    assert kept(FOUR, max_area=0.5) == [1, 2, 3]
    assert kept(FOUR, max_area=0.49) == [2, 3]


def test_the_number_is_that_of_the_surest_or_of_the_largest():
    assert kept(FOUR, max_objects=2) == [1, 2]
    assert kept(FOUR, max_objects=2, prefer="area") == [1, 0]
    with pytest.raises(ConfigError, match="prefer has no effect: without max_objects all are kept"):
        refuse_unread(build(FilterConfig, {"prefer": "area"}), {"prefer": "area"})
    with pytest.raises(ConfigError, match=r"min_area=0\.5 is not below max_area=0\.2"):
        build(FilterConfig, {"min_area": 0.5, "max_area": 0.2})


def test_duplicates_are_those_of_a_naive_loop():
    rng = np.random.default_rng(0)
    masks = np.zeros((30, *SIZE), bool)
    for mask in masks:
        y, x = rng.integers(0, (6, 12))
        mask[y : y + rng.integers(3, 5), x : x + rng.integers(5, 8)] = True
    scores = rng.permutation(30).astype(np.float32)
    found = Proposals(np.tile(np.array([[0, 0, 20, 10]], np.float32), (30, 1)), scores, np.arange(30), masks)
    for limit in (0.2, 0.5, 1.0):
        want: list[int] = []
        for i in np.argsort(-scores).tolist():
            ious = [(masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum() for j in want]
            want += [i] if all(iou < limit for iou in ious) else []
        assert kept(found, duplicate_iou=limit) == want
        assert 1 < len(want) < 31
    assert len(kept(found, duplicate_iou=None)) == 30


def test_boxes_end_at_the_border_and_what_has_no_pixel_is_left_out():
    found = boxes_of((-5, -5, 5, 5, 1), (30, 0, 40, 5, 1), (3, 3, 3, 8, 1), (15, 5, 25, 50, 1))
    left = filtered(found, SIZE, FilterConfig())
    assert left.labels.tolist() == [0, 3]
    assert left.boxes.tolist() == [[0, 0, 5, 5], [15, 5, 20, 10]]
    masks = np.zeros((2, *SIZE), bool)
    masks[1, 4, 4] = True
    some = Proposals(left.boxes, left.scores, np.array([7, 8]), masks)
    assert kept(some) == [8]
    assert kept(boxes_of()) == []


def test_what_no_image_can_hold_is_refused():
    with pytest.raises(UserError, match="no finite numbers"):
        kept(boxes_of((0, 0, 5, 5, float("nan"))))
    with pytest.raises(UserError, match="no finite numbers"):
        kept(boxes_of((0, 0, float("inf"), 5, 1)))
    masks = np.ones((1, 20, 10), bool)
    with pytest.raises(UserError, match=r"masks of \(20, 10\) in an image of \(10, 20\)"):
        kept(Proposals(np.ones((1, 4), np.float32), np.ones(1, np.float32), np.zeros(1, np.int64), masks))
