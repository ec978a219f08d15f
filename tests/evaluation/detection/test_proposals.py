"""Proposals against objects: cases by hand, naive loops, and pycocotools' own matches."""

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval

from foveola.evaluation.detection.average_precision import COCO_TYPES, of_kind, score
from foveola.evaluation.detection.proposals import COCO_IOUS, METRICS, compare_proposals, held_against, match
from foveola.evaluation.detection.truth import data_set, rle_of
from foveola.evaluation.paired import unpacked
from foveola.evaluation.protocol import declared

SIDE = 120


def true(image: int, x: float, y: float, w: float, h: float, crowd: bool = False) -> dict[str, Any]:
    return found(image, x, y, w, h) | {"area": w * h, "iscrowd": int(crowd)}


def found(image: int, x: float, y: float, w: float, h: float, score: float = 1.0) -> dict[str, Any]:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    mask = (columns >= x) & (columns < x + w) & (rows >= y) & (rows < y + h)
    box = {"image_id": image, "category_id": 1, "bbox": [x, y, w, h], "segmentation": rle_of(mask)}
    return box | {"score": score}


IMAGES = dict.fromkeys((0, 3, 5, 8), (SIDE, SIDE))
TRUTH = [
    true(0, 0, 0, 20, 20),
    true(0, 60, 60, 40, 40),
    true(3, 10, 10, 30, 30),
    true(3, 0, 60, 60, 60, crowd=True),
    true(5, 0, 0, 100, 100),
]
FOUND = [
    found(0, 0, 0, 20, 20, 0.9),  # IoU 1
    found(0, 2, 0, 20, 20, 0.8),  # IoU 18/22, but a better one has that object: wrong
    found(3, 10, 70, 20, 20, 0.9),  # within the crowd: counts as nothing
    found(3, 10, 10, 30, 20, 0.5),  # IoU 2/3, the best one that is not on a crowd
    found(8, 0, 0, 10, 10, 0.7),  # in an image without objects: wrong
]


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_numbers_by_hand(kind) -> None:
    """Four objects in three images, five proposals in three.

    Two of the four proposals that count are right at 0.5. Images 0 and 3 are found, 5 has no proposal.
    """
    numbers = compare_proposals(IMAGES, TRUTH, FOUND, [kind], resamples=0).metrics
    expected = {
        "corloc": 2 / 3,
        "precision": 2 / 4,
        "recall": 2 / 4,
        "recall_small": 2 / 2,
        "recall_medium": 0,
        "recall_large": 0,
        "best_iou": (1 + 0 + 2 / 3 + 0) / 4,
        "ar1": (1 + 0 + 0 + 0) / 4,  # the first one of image 3 is that on the crowd
        "ar10": (1 + 0 + 4 / 10 + 0) / 4,  # 2/3 is enough at 0.5, 0.55, 0.6, 0.65
    }
    for name, share in expected.items():
        assert numbers[f"{kind}_{name}"] == pytest.approx(100 * share), name
    assert numbers["images_without"] == 25
    assert f"{kind}_ap_low" not in numbers


def test_crowds_are_no_mistakes() -> None:
    """A proposal that a crowd explains neither helps nor harms; one more elsewhere harms."""
    without = [each for each in FOUND if each["bbox"] != [10, 70, 20, 20]]
    numbers, others = (
        compare_proposals(IMAGES, TRUTH, some, ["box"], 0).metrics for some in (FOUND, without)
    )
    for name in ("corloc", "precision", "recall", "best_iou", "ap", "ap50"):
        assert numbers[f"box_{name}"] == others[f"box_{name}"], name
    more = compare_proposals(IMAGES, TRUTH, [*FOUND, found(3, 80, 0, 20, 20)], ["box"], 0).metrics
    assert more["box_precision"] == pytest.approx(40)
    assert more["box_corloc"] == pytest.approx(100 / 3)  # it is the best one of image 3 now


def test_one_object_is_taken_once_and_the_last_of_equals() -> None:
    ious = np.array([[0.8, 0.8, 0.1], [0.9, 0.9, 0.2], [0.6, 0.9, 0.6]])
    taken, ignored = match(ious, np.array([[0.0], [1.0], [0.72]]))
    assert taken[0].tolist() == [1, 0, 2]
    assert taken[8].tolist() == [-1, 1, -1]  # at 0.9
    assert ignored[[0, 3, 4, 8, 9]].tolist() == [
        [False, False, False],
        [False, False, True],
        [False, False, True],
        [False, False, False],
        [False, True, False],
    ]


def drawn(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    objects, proposals = [], []
    for image in range(10):
        for _ in range(rng.integers(0, 6)):
            x, y = rng.integers(0, 60, 2).tolist()
            w, h = rng.integers(4, 60, 2).tolist()
            objects.append(true(image, x, y, w, h, crowd=rng.random() < 0.2))
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = rng.integers(-5, 6, 4).tolist()
                near = (x + dx, y + dy, max(w + dw, 2), max(h + dh, 2))
                proposals.append(found(image, *near, score=float(rng.random())))
        for _ in range(rng.integers(0, 3)):
            proposals.append(found(image, *rng.integers(1, 50, 4).tolist(), score=float(rng.random())))
    return objects, proposals


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_matches_are_those_of_pycocotools(kind) -> None:
    objects, proposals = drawn(0)
    sizes = dict.fromkeys(range(10), (SIDE, SIDE))
    from pycocotools.coco import COCO

    truth: Any = COCO()
    truth.dataset = data_set(sizes, objects, ("object",))
    truth.createIndex()
    measured: Any = COCOeval(
        truth, truth.loadRes([of_kind(each, kind) for each in proposals]), COCO_TYPES[kind]
    )
    measured.evaluate()
    each_image = {e["image_id"]: e for e in measured.evalImgs[: len(sizes)] if e is not None}
    taken, ignored = 0, 0
    for image in sizes:
        own = held_against(
            image,
            [a for a in objects if a["image_id"] == image],
            [p for p in proposals if p["image_id"] == image],
            kind,
        )
        if image not in each_image:
            continue
        theirs = each_image[image]
        assert ((own.taken >= 0) == ((theirs["dtMatches"] > 0) & (theirs["dtIgnore"] == 0))).all()
        assert (own.ignored == (theirs["dtIgnore"] == 1)).all()
        taken, ignored = taken + (own.taken >= 0).sum(), ignored + own.ignored.sum()
    assert min(taken, ignored) > 8
    numbers = compare_proposals(sizes, objects, proposals, [kind], resamples=0).metrics
    summary = score(
        data_set(sizes, objects, ("object",)), [of_kind(p, kind) for p in proposals], kind
    ).summary
    for name, value in summary.items():  # of AR from rows of objects, and of AP
        assert numbers[f"{kind}_{name}"] == pytest.approx(100 * value), name
    assert 20 < numbers[f"{kind}_ar100"] < 90


def test_best_iou_and_corloc_by_loops() -> None:
    objects, proposals = drawn(1)
    objects = [each for each in objects if not each["iscrowd"]]
    sizes = dict.fromkeys(range(10), (SIDE, SIDE))

    def iou(a: list[float], b: list[float]) -> float:
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return shared / (a[2] * a[3] + b[2] * b[3] - shared)

    best, right = [], []
    for image in sizes:
        some = [o["bbox"] for o in objects if o["image_id"] == image]
        mine = sorted((p for p in proposals if p["image_id"] == image), key=lambda p: -p["score"])
        best += [max((iou(o, p["bbox"]) for p in mine), default=0.0) for o in some]
        if some:
            right.append(bool(mine) and max(iou(o, mine[0]["bbox"]) for o in some) >= 0.5)
    compared = compare_proposals(sizes, objects, proposals, ["box"], resamples=50)
    numbers = compared.metrics
    assert numbers["box_best_iou"] == pytest.approx(100 * np.mean(best))
    assert numbers["box_corloc"] == pytest.approx(100 * np.mean(right))
    for name, entry in compared.scores.items():
        values, _ = unpacked(entry)
        assert numbers[name] == pytest.approx(100 * values.double().mean().item(), abs=1e-4)
        assert numbers[f"{name}_low"] <= numbers[name] <= numbers[f"{name}_high"]
    assert numbers["box_ap_low"] < numbers["box_ap"] < numbers["box_ap_high"]
    for name in numbers:
        if not name.endswith(("_low", "_high")):
            assert declared(METRICS, "check", name) in METRICS, name


def test_rows_are_alike_for_any_proposals() -> None:
    """So that two proposers can be compared row by row, one of which finds nothing."""
    objects, proposals = drawn(2)
    sizes = dict.fromkeys(range(10), (SIDE, SIDE))
    some, none = (compare_proposals(sizes, objects, p, ["box", "mask"], 0) for p in (proposals, []))
    assert some.scores.keys() == none.scores.keys()
    for name, entry in some.scores.items():
        assert entry["rows"] == none.scores[name]["rows"], name
        assert entry["shape"] == none.scores[name]["shape"], name
    assert none.metrics["images_without"] == 100
    assert none.metrics["box_ar100"] == none.metrics["mask_ap"] == none.metrics["box_corloc"] == 0
    assert "box_precision" not in none.metrics
    assert torch.equal(unpacked(none.scores["images_without"])[0], torch.ones(10, dtype=torch.bool))
    assert len(COCO_IOUS) == 10
