"""AP: a case by hand, pycocotools called on files, and intervals over images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from foveola.evaluation.detection.average_precision import (
    COCO_TYPES,
    SUMMARY,
    ap_interval,
    score,
    weighted_ap,
)
from foveola.evaluation.detection.truth import data_set, rle_of

SIDE = 120


def box(image: int, x: float, y: float, w: float, h: float, category: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
    } | more


def test_ap_by_hand() -> None:
    """Three objects; found: one right, one wrong, one right.

    At IoU 0.5 precision is 1 up to a recall of 1/3 (34 of the 101 levels), 2/3 up to 2/3 (33 levels), then 0.
    The last one has an IoU of 9/11 = 0.818: it is wrong from 0.85 on.
    """
    truth = data_set(
        {0: (SIDE, SIDE), 7: (SIDE, SIDE)},
        [box(0, 0, 0, 10, 10), box(0, 50, 0, 40, 40), box(7, 5, 5, 10, 10)],
        ("a",),
    )
    found = [
        {"image_id": 0, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"image_id": 7, "category_id": 1, "bbox": [80, 80, 10, 10], "score": 0.8},
        {"image_id": 7, "category_id": 1, "bbox": [6, 5, 10, 10], "score": 0.7},
    ]
    scores = score(truth, found, "box")
    both, one = (34 + 33 * 2 / 3) / 101, 34 / 101
    assert scores.summary["ap50"] == pytest.approx(both)
    assert scores.summary["ap75"] == pytest.approx(both)
    assert scores.summary["ap"] == pytest.approx((7 * both + 3 * one) / 10)
    assert scores.summary["ar1"] == pytest.approx(
        (7 * 1 + 3 * 1) / 10 / 3
    )  # the best one of each image alone
    assert scores.summary["ar100"] == pytest.approx((7 * 2 + 3 * 1) / 10 / 3)
    assert "ap_large" not in scores.summary
    assert scores.classes == {1: pytest.approx(scores.summary["ap"])}
    assert scores.precision["50"] == pytest.approx([1] * 34 + [2 / 3] * 33 + [0] * 34)


def drawn(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Images with boxes, masks and crowds of three classes, and detections near to them and elsewhere."""
    rng = np.random.default_rng(seed)
    annotations, found = [], []
    for image in range(12):
        for _ in range(rng.integers(0, 7)):
            x, y = rng.integers(0, 60, 2).tolist()
            w, h = rng.integers(4, 60, 2).tolist()
            category, crowd = int(rng.integers(1, 4)), int(rng.random() < 0.15)
            annotations.append(
                box(image, x, y, w, h, category, iscrowd=crowd, segmentation=ellipse(x, y, w, h))
            )
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = rng.normal(0, 4, 4)
                near = [x + dx, y + dy, max(w + dw, 2), max(h + dh, 2)]
                guess = category if rng.random() < 0.8 else int(rng.integers(1, 4))
                found.append(
                    {"image_id": image, "category_id": guess, "bbox": near, "score": float(rng.random())}
                )
                found[-1]["segmentation"] = ellipse(*near)
    sizes = dict.fromkeys(range(12), (SIDE, SIDE))
    return data_set(sizes, annotations, ("a", "b", "c")), found


def ellipse(x: float, y: float, w: float, h: float) -> dict[str, Any]:
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    return rle_of(((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1)


def by_hand(truth: dict, found: list[dict], kind: str, folder: Path) -> COCOeval:
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))
    true = COCO(str(folder / "truth.json"))
    measured = COCOeval(true, true.loadRes(str(folder / "found.json")), COCO_TYPES[kind])
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    return measured


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_numbers_are_those_of_pycocotools(kind, tmp_path) -> None:
    truth, found = drawn(0)
    left = "segmentation" if kind == "box" else "bbox"
    found = [{name: value for name, value in each.items() if name != left} for each in found]
    before = json.dumps([truth, found])
    scores = score(truth, found, kind)
    assert json.dumps([truth, found]) == before
    measured = by_hand(truth, found, kind, tmp_path)
    expected = {
        name: value for name, value in zip(SUMMARY, measured.stats.tolist(), strict=True) if value > -1
    }
    assert scores.summary == expected
    assert 0.1 < scores.summary["ap"] < 0.9
    precision = measured.eval["precision"]
    assert scores.classes == {k + 1: precision[:, :, k, 0, 2].mean() for k in range(3)}
    assert np.mean(scores.precision["all"]) == pytest.approx(scores.summary["ap"])
    assert weighted_ap(scores.ranked, np.ones(12)) == pytest.approx(scores.summary["ap"], abs=1e-12)


def test_weights_of_images(tmp_path) -> None:
    """A weight of 0 is an image that is not there; intervals hold the number, and narrow with more images."""
    truth, found = drawn(1)
    scores = score(truth, found, "box")
    weights = np.array([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
    kept = {image for image in range(12) if weights[image]}
    parts = {name: [x for x in truth[name] if x["image_id"] in kept] for name in ("annotations",)}
    fewer = truth | parts | {"images": [x for x in truth["images"] if x["id"] in kept]}
    expected = score(fewer, [x for x in found if x["image_id"] in kept], "box").summary["ap"]
    assert weighted_ap(scores.ranked, weights) == pytest.approx(expected, abs=1e-12)
    low, high = ap_interval(scores.ranked, 12, 100, seed=0)
    assert low < scores.summary["ap"] < high
    assert (low, high) == ap_interval(scores.ranked, 12, 100, seed=0)
    four = {"images": [], "annotations": []}
    many = []
    for copy in range(4):
        four["images"] += [x | {"id": x["id"] + 12 * copy} for x in truth["images"]]
        four["annotations"] += [
            x | {"image_id": x["image_id"] + 12 * copy, "id": 1000 * copy + x["id"]}
            for x in truth["annotations"]
        ]
        many += [x | {"image_id": x["image_id"] + 12 * copy} for x in found]
    narrow = ap_interval(score(truth | four, many, "box").ranked, 48, 100, seed=0)
    assert 0.3 < (narrow[1] - narrow[0]) / (high - low) < 0.75  # half, but for chance


def test_nothing_found_and_nothing_to_find() -> None:
    truth, _ = drawn(2)
    scores = score(truth, [], "box")
    assert scores.summary["ap"] == scores.summary["ar100"] == 0
    assert weighted_ap(scores.ranked, np.ones(12)) == 0
    empty = score(truth | {"annotations": []}, [], "mask")
    assert (empty.summary, empty.classes, empty.precision) == ({}, {}, {})
