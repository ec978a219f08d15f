"""Mean IoU against torchmetrics, scikit-learn, and cases worked by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from foveola.data.segmentation import IGNORE
from foveola.evaluation.segmentation.iou import bootstrap_iou, class_iou, mean_iou, named_iou, region_areas


def maps(seed: int, classes: int = 5, images: int = 6, void: float = 0.2):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (images, 9, 7)).astype(np.uint8)
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, classes, truth.shape))
    truth[rng.random(truth.shape) < void] = IGNORE
    return torch.from_numpy(predicted.astype(np.uint8)), torch.from_numpy(truth)


def stacked(predicted, truth, classes):
    return torch.stack([region_areas(p, t, classes) for p, t in zip(predicted, truth, strict=True)])


@pytest.mark.parametrize("seed", range(3))
def test_equals_torchmetrics(seed):
    from torchmetrics.classification import MulticlassJaccardIndex

    predicted, truth = maps(seed)
    metric = MulticlassJaccardIndex(5, average="none", ignore_index=IGNORE)
    expected = metric(predicted.long(), truth.long()).numpy()
    total = stacked(predicted, truth, 5).sum(dim=0).numpy()
    np.testing.assert_allclose(class_iou(total)[:-1], expected, rtol=1e-6)
    assert float(mean_iou(total)) == pytest.approx(100 * expected.mean(), rel=1e-6)


def test_equals_scikit_learn_where_classes_are_absent():
    predicted, truth = maps(0, classes=4)
    areas = stacked(predicted, truth, 9).sum(dim=0).numpy()  # classes 4 to 8 never occur
    counted = (truth != IGNORE).numpy()
    p, t = predicted.numpy()[counted], truth.numpy()[counted]
    expected = jaccard_score(t, p, average="macro")
    assert float(mean_iou(areas, "skip")) == pytest.approx(100 * expected)
    assert float(mean_iou(areas, "zero")) == pytest.approx(100 * expected * 4 / 9)
    table = confusion_matrix(t, p, labels=range(9))
    np.testing.assert_array_equal(areas[:, :-1], [table.diagonal(), table.sum(0), table.sum(1)])


def test_predicted_void_is_a_miss_and_in_capi_one_more_class():
    truth = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.uint8)
    predicted = torch.tensor([0, 0, IGNORE, 1, 1, 1], dtype=torch.uint8)
    areas = region_areas(predicted, truth, 2).numpy()
    assert float(mean_iou(areas)) == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert float(mean_iou(areas, void_class=True)) == pytest.approx(100 * (2 / 3 + 1) / 3)


def test_ignored_truth_counts_nowhere():
    predicted, truth = maps(1)
    other = predicted.clone()
    other[truth == IGNORE] = (other[truth == IGNORE] + 1) % 5
    assert torch.equal(stacked(predicted, truth, 5), stacked(other, truth, 5))
    empty = region_areas(predicted, torch.full_like(truth, IGNORE), 5).numpy()
    assert not empty.any()
    assert np.isnan(mean_iou(empty))


def test_labels_beyond_the_classes_are_an_error():
    with pytest.raises(ValueError, match="beyond the 3 classes"):
        region_areas(torch.tensor([3]), torch.tensor([0]), 3)
    with pytest.raises(ValueError, match="beyond the 3 classes"):
        region_areas(torch.tensor([0]), torch.tensor([7]), 3)


def test_bootstrap_resamples_images_and_divides_sums():
    areas = stacked(*maps(2, images=8), 5)
    low, high = bootstrap_iou([areas], samples=200, seed=3)
    rng, values = np.random.default_rng(3), []
    for _ in range(200):
        drawn = rng.integers(8, size=8)
        values.append(float(mean_iou(sum(areas[i] for i in drawn).numpy())))
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert low < float(mean_iou(areas.sum(dim=0).numpy())) < high
    same = areas[:1].expand(4, -1, -1)
    assert bootstrap_iou([same])[0] == pytest.approx(bootstrap_iou([same])[1])
    with pytest.raises(ValueError, match="no images"):
        bootstrap_iou([areas[:0]])


def test_named_iou_has_none_for_a_class_that_never_occurs():
    areas = torch.zeros(1, 3, 3, dtype=torch.int64)
    areas[0, :, 0] = torch.tensor([1, 2, 3])
    assert named_iou(areas, ["a", "b"]) == {"a": 25.0, "b": None}


def test_all_right_is_not_certain():
    predicted, _ = maps(0, void=0.0)
    right = stacked(predicted, predicted, 5)
    assert bootstrap_iou([right]) == pytest.approx((100 / (1 + 1.959964**2 / 6), 100))
