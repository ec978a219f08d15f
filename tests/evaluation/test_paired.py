"""Scores of each row in results, and the paired difference of two results of the same images."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from foveola.config import UserError
from foveola.evaluation.metrics import paired_interval
from foveola.evaluation.paired import Difference, difference, packed, packed_areas, unpacked
from foveola.evaluation.result import Result
from foveola.evaluation.segmentation.iou import mean_iou, paired_iou

PLAIN = Result(
    protocol="knn",
    settings={},
    metrics={},
    data={"test": {"fingerprint": "f"}},
    encoder="e",
    versions={},
    date="2026-01-01",
    seconds=1.0,
)


def draws(seed: int, count: int = 203, share: float = 0.6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(count) < share)


def areas(seed: int, images: int = 9) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    both = rng.integers(0, 40, (images, 4))
    return torch.from_numpy(np.stack((both, both + rng.integers(0, 30, both.shape), both + 20), axis=1))


def test_what_is_packed_comes_back_through_json() -> None:
    images, twice = torch.arange(203) * 3, torch.arange(203) // 2
    for values in (draws(0), draws(1).double() / 3, torch.zeros(203, dtype=torch.bool)):
        found, groups = unpacked(json.loads(json.dumps(packed(values, images))))
        assert torch.equal(found, values if values.dtype == torch.bool else values.float())
        assert groups is None
    assert torch.equal(unpacked(packed(draws(2), twice + 70))[1], twice)
    runs = [areas(0), areas(1)]
    assert torch.equal(unpacked(packed_areas(runs, torch.arange(9)))[0], torch.stack(runs))


def test_a_hit_takes_a_bit() -> None:
    assert len(json.dumps(packed(draws(0, 50_000), torch.arange(50_000)))) < 50_000 / 8 * 4 / 3 + 200


def test_the_difference_of_two_results_is_paired() -> None:
    images, twice = torch.arange(203), torch.arange(203) // 2
    a, b = draws(3, share=0.3), draws(4, share=0.45)
    for owners, groups in ((images, None), (twice, twice)):
        left, right = (
            dataclasses.replace(PLAIN, scores={"top1_plain": packed(hit, owners)}) for hit in (a, b)
        )
        found = difference(left, right, "top1_plain")
        expected = tuple(100 * part for part in paired_interval(a, b, groups))
        assert (found.value, found.low, found.high) == pytest.approx(expected)
        assert found.value == pytest.approx(100 * (b.double().mean() - a.double().mean()).item())
        assert found.clear == (found.low > 0 or found.high < 0)
        back = -difference(right, left, "top1_plain")
        assert back.value == pytest.approx(found.value)
        assert (back.low, back.high) == pytest.approx((found.low, found.high), abs=0.5)


def test_nothing_is_compared_that_is_not_the_same_rows() -> None:
    hit, images = draws(5), torch.arange(203)
    one = dataclasses.replace(PLAIN, scores={"top1_plain": packed(hit, images)})
    assert difference(one, one, "top1_plain").value == 0
    for other in (
        PLAIN,  # of an earlier version
        dataclasses.replace(one, scores={"top1_plain": packed(hit, images.flip(0))}),
        dataclasses.replace(one, scores={"top1_plain": packed(hit[1:], images[1:])}),
        dataclasses.replace(one, scores={"top1_plain": packed(hit.double(), images)}),
        dataclasses.replace(one, data={"test": {"fingerprint": "g"}}),
    ):
        assert difference(one, other, "top1_plain") is None
    assert difference(one, one, "top5_plain") is None
    unknown = dataclasses.replace(one, data={"test": {}})
    assert difference(unknown, unknown, "top1_plain") is None
    broken = dataclasses.replace(PLAIN, scores={"m": {**packed(hit, images), "data": "AAAA"}})
    with pytest.raises(UserError, match="the scores of a result are damaged"):
        difference(broken, broken, "m")
    assert Difference(1.5, -0.25, 3.0).text() == "+1.50 [-0.25, +3.00]"
    assert Difference(-0.03, -0.0312, 0.001).text(4) == "-0.0300 [-0.0312, +0.0010]"


def test_paired_mean_iou_is_a_naive_loop() -> None:
    """The same images for both in each resample; far narrower than of images drawn for each."""
    a, b = areas(6, 30), areas(6, 30)
    b[:, 0, 0] = (b[:, 0, 0] + 3).minimum(b[:, 1, 0])  # one class a little better
    rng, changes = np.random.default_rng(2), []
    for _ in range(200):
        drawn = rng.integers(30, size=30)
        changes.append(float(mean_iou(b[drawn].sum(0).numpy()) - mean_iou(a[drawn].sum(0).numpy())))
    found = paired_iou([a], [b], samples=200, seed=2)
    whole = float(mean_iou(b.sum(0).numpy()) - mean_iou(a.sum(0).numpy()))
    assert found == pytest.approx((whole, *np.quantile(changes, [0.025, 0.975])), abs=1e-9)
    entries = [{"miou": packed_areas([x], torch.arange(30))} for x in (a, b)]
    left, right = (dataclasses.replace(PLAIN, scores=entry) for entry in entries)
    assert difference(left, right, "miou").value == pytest.approx(whole)
    assert difference(left, right, "miou").low > 0
