"""The protocol `segment`: numbers against other libraries, classes by name, several processes, mistakes."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from foveola.config import UserError, build
from foveola.data.sample import IGNORE
from foveola.evaluation.protocol import At
from foveola.evaluation.segmentation.segment import Segment, SegmentConfig, shared_classes
from foveola.tasks.segmentation import SegmentationConfig, SegmentationHead

CLASSES = ("a", "b", "c", "never")


@pytest.fixture
def segmenter(encoder):
    """The small random encoder with a random head that says every class but the last."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = SegmentationConfig(classes=CLASSES)
        encoder.head = SegmentationHead(config, encoder.config.model).eval()
        encoder.head.decoder.linear.weight.data.normal_()
        encoder.head.decoder.linear.bias.data = torch.tensor([0.0, 0.0, 0.0, -1e4])
    return encoder


@pytest.fixture
def noise(pixel_source):
    def make(classes=CLASSES, seed=0, count=5):
        rng, images, maps = np.random.default_rng(seed), [], []
        for i in range(count):
            shape = (40 + 3 * i, 57 - 4 * i)
            images.append(rng.integers(0, 256, (*shape, 3)).astype(np.uint8))
            labels = rng.integers(0, 3, shape).astype(np.uint8)
            labels[:7] = IGNORE
            maps.append(labels)
        return pixel_source(images, maps, classes=classes, name="noise:")

    return make


def run(encoder, source, **settings):
    config = build(SegmentConfig, {"workers": 0, **settings})
    return Segment().measure(At(encoder, None, source, progress=False), config)


def test_numbers_are_those_of_torchmetrics_and_of_a_confusion_matrix(segmenter, noise, check_scores):
    source = noise()
    found = run(segmenter, source)
    predicted = [one.classes for one in segmenter.head.predict(segmenter, source.images)]
    flat = torch.cat([one.flatten() for one in predicted]).numpy()
    truth = np.concatenate([labels.reshape(-1) for labels in source.maps])
    table = confusion_matrix(truth[truth != IGNORE], flat[truth != IGNORE], labels=range(4)).astype(float)
    right, said, true = np.diag(table), table.sum(axis=0), table.sum(axis=1)
    iou = right[:3] / (said + true - right)[:3]
    assert found.metrics["miou"] == pytest.approx(100 * iou.mean())
    assert found.metrics["pixel_accuracy"] == pytest.approx(100 * right.sum() / table.sum())
    assert found.metrics["mean_accuracy"] == pytest.approx(100 * (right[:3] / true[:3]).mean())
    assert list(found.data["class_iou"].values()) == [*(pytest.approx(100 * v, abs=1e-3) for v in iou), None]
    metrics = pytest.importorskip("torchmetrics.classification")
    measured = metrics.MulticlassJaccardIndex(4, average="none", ignore_index=IGNORE)
    accuracy = metrics.MulticlassAccuracy(4, average="micro", ignore_index=IGNORE)
    for one, labels in zip(predicted, source.maps, strict=True):
        measured.update(one.flatten(), torch.from_numpy(labels).flatten().long())
        accuracy.update(one.flatten(), torch.from_numpy(labels).flatten().long())
    assert found.metrics["miou"] == pytest.approx(100 * measured.compute()[:3].mean().item(), rel=1e-5)
    assert found.metrics["pixel_accuracy"] == pytest.approx(100 * accuracy.compute().item(), rel=1e-5)
    assert found.metrics["miou_low"] < found.metrics["miou"] < found.metrics["miou_high"]
    check_scores(found, Segment.metrics)


def test_classes_are_met_by_name(segmenter, noise):
    plain = run(segmenter, noise())
    order = ("c", "never", "a", "b")
    turned = noise(order)
    for labels in turned.maps:  # the same truth under other numbers
        labels[:] = np.array([order.index(name) for name in CLASSES] + [IGNORE] * 252, np.uint8)[labels]
    found = run(segmenter, turned)
    assert found.metrics == pytest.approx(plain.metrics)
    assert found.notes == ()


def test_a_class_that_the_data_lack_is_missed(segmenter, noise):
    """Where the head says so the pixel is wrong, and nothing else changes."""
    without = noise(("a", "b"))
    for labels in without.maps:
        labels[labels == 2] = IGNORE
    found = run(segmenter, without)
    assert "lacks 2 of the head's 4 classes, such as 'c'" in found.notes[0]
    counted = [0, 0]
    for one, labels in zip(segmenter.head.predict(segmenter, without.images), without.maps, strict=True):
        known = torch.from_numpy(labels) != IGNORE
        counted[0] += int((one.classes[known] == torch.from_numpy(labels)[known]).sum())
        counted[1] += int(known.sum())
    assert found.metrics["pixel_accuracy"] == pytest.approx(100 * counted[0] / counted[1])


def test_other_ways_to_look_are_asked_for(segmenter, noise):
    source = noise()
    plain, small = run(segmenter, source), run(segmenter, source, size=64, window=64, stride=32)
    assert small.metrics != plain.metrics
    several = run(segmenter, source, scales=[1.0, 1.5], flip=True)
    whole = run(segmenter, source, mode="whole")
    assert len({str(each.metrics) for each in (plain, small, several, whole)}) == 4
    for settings, message in (
        ({"window": 20}, "window=20 is not a multiple of the patch size 8"),
        ({"mode": "whole", "stride": 8}, "stride has no effect: mode=whole has no windows"),
        ({"window": 16, "stride": 20}, "leaves gaps"),
    ):
        with pytest.raises(UserError, match=f"segment: .*{message}"):
            run(segmenter, source, **settings)


def test_what_cannot_be_measured_is_one_line(encoder, segmenter, noise, list_source, make_sample):
    with pytest.raises(
        UserError, match=r"has 1 of 4 classes that the head did not learn \(dog\); it knows 4: a, b"
    ):
        run(segmenter, noise(("a", "b", "c", "dog")))
    with pytest.raises(UserError, match="test: list: has no label for each pixel"):
        run(segmenter, list_source([make_sample(0)]))
    nothing = noise()
    for labels in nothing.maps:
        labels[:] = IGNORE
    with pytest.raises(UserError, match="no pixel of test has a class"):
        run(segmenter, nothing)
    smaller = noise()
    smaller.maps[1] = smaller.maps[1][:-1]
    with pytest.raises(UserError, match="image-1 is 53x43 pixels, its label map 53x42"):
        run(segmenter, smaller)
    segmenter.head = None
    with pytest.raises(UserError, match=r"this encoder has no head \(linear_segmentation"):
        run(segmenter, noise())


def test_numbers_of_classes_by_name():
    notes: list[str] = []
    assert shared_classes(("a", "b", "c"), ("c", "a"), "data", notes)[:4].tolist() == [1, IGNORE, 0, IGNORE]
    assert len(notes) == 1


RANKS = """
import sys
import numpy as np
import torch
from foveola import distributed
from foveola.evaluation.evaluate import evaluate
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.tasks.segmentation import SegmentationConfig, SegmentationHead
distributed.start("cpu")
torch.manual_seed(0)
model = ViTConfig(width=32, depth=1, heads=2, patch_size=8, image_size=32)
encoder = Encoder(EncoderConfig(model=model, transform=TransformConfig(32, 32)))
from foveola.data.sources import open_source
source = open_source("scenes:?size=32&count=7&background=class")
encoder.head = SegmentationHead(SegmentationConfig(classes=tuple(source.classes)), model).eval()
result = evaluate(encoder, "segment", test=source, workers=0, progress=False)
print({name: round(value, 6) for name, value in result.metrics.items()}, result.data["class_iou"])
distributed.stop()
"""


def test_two_processes_measure_what_one_does(run_ranks):
    alone = run_ranks(RANKS, ranks=1)
    assert run_ranks(RANKS, ranks=2) == alone * 2
