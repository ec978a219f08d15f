"""Dense retrieval against a naive loop, and on images whose colour is their class."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from foveola.config import UserError, build
from foveola.data.segmentation import IGNORE
from foveola.evaluation.protocol import At
from foveola.evaluation.search import nearest_rows
from foveola.evaluation.segmentation.reading import label_counts, patch_pixels
from foveola.evaluation.segmentation.retrieval import (
    DenseRetrieval,
    DenseRetrievalConfig,
    attend,
    label_pixels,
    own_fractions,
)
from foveola.models.encoder import Encoder


def random_rows(seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    queries, reference_set = torch.randn(23, 8, generator=rng), torch.randn(41, 8, generator=rng)
    pixels = torch.randint(0, 4, (41, 9), generator=rng).to(torch.uint8)
    pixels[pixels == 3] = IGNORE
    return queries, reference_set, pixels


def naive(queries, reference_set, pixels, k, temperature, classes):
    """Class fractions in float64, one query after the other."""
    q, f = queries.double().numpy(), reference_set.double().numpy()
    out = np.zeros((len(q), classes))
    for i, row in enumerate(q):
        cosine = (f @ row) / np.linalg.norm(f, axis=1) / np.linalg.norm(row)
        order = np.argsort(-cosine)[:k]
        weights = np.exp(cosine[order] / temperature)
        weights /= weights.sum()
        for weight, j in zip(weights, order, strict=True):
            for label in pixels[j].tolist():
                if label != IGNORE:
                    out[i, label] += weight / pixels.shape[1]
    return out


@pytest.mark.parametrize("k", [1, 5, 41])
@pytest.mark.parametrize("temperature", [0.02, 0.3])
def test_equals_naive_loop(k, temperature):
    queries, reference_set, pixels = random_rows()
    similarities, indices = nearest_rows(queries, reference_set, 41)
    counts = label_counts(pixels, 3)[:, :-1]
    shares = attend(similarities, indices, counts, 9, k, temperature)
    np.testing.assert_allclose(shares, naive(queries, reference_set, pixels, k, temperature, 3), atol=2e-5)


def test_limits_of_the_temperature_and_invariances():
    queries, reference_set, pixels = random_rows()
    counts = label_counts(pixels, 3)[:, :-1]
    s, i = nearest_rows(queries, reference_set, 5)
    mean = counts[i].float().mean(dim=1) / 9
    torch.testing.assert_close(attend(s, i, counts, 9, 5, 1e6), mean)
    torch.testing.assert_close(attend(s, i, counts, 9, 5, 1e-6), counts[i[:, 0]].float() / 9)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    s2, i2 = nearest_rows(10 * queries, reference_set[order], 5)
    moved = attend(s2, i2, counts[order], 9, 5, 0.02)
    torch.testing.assert_close(moved, attend(s, i, counts, 9, 5, 0.02), rtol=1e-4, atol=1e-5)


def test_label_pixels_is_the_largest_of_enlarged_shares():
    shares = torch.rand(12 * 12, 4, generator=torch.Generator().manual_seed(0))
    field = shares.T.reshape(1, 4, 12, 12)
    expected = interpolate(field, (30, 17), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert torch.equal(label_pixels(shares, 12, (30, 17)).long(), expected)


def run(encoder, train, test, config, progress=False):
    return DenseRetrieval().measure(At(encoder, train, test, progress=progress), config)


def test_memory_that_holds_the_queries_gives_the_ceiling(encoder: Encoder, coloured):
    """k=1 and references of the same images without void: nothing is lost but what patches cannot say."""
    train, test = coloured(1), coloured(1)
    for labels in (*train.maps, *test.maps):
        labels[labels == IGNORE] = 0
    test.name = "copy:"
    config = build(DenseRetrievalConfig, {"k": [1], "workers": 0})
    metrics = run(encoder, train, test, config, progress=False).metrics
    assert metrics["miou"] == pytest.approx(metrics["miou_ceiling"], abs=1e-3)


def test_void_pixels_do_not_lower_the_ceiling(encoder: Encoder, coloured):
    """Patches of one class each, half of the pixels of some of them void: perfect shares are all right."""
    train, test = coloured(0), coloured(1)
    for labels in test.maps:
        labels[:] = 0
        labels[:, labels.shape[1] // 2 :] = 1
        labels[::2, labels.shape[1] // 2 :] = IGNORE  # of the right half every other row
    metrics = run(encoder, train, test, DenseRetrievalConfig(workers=0, k=(3, 5)), progress=False).metrics
    half = own_fractions(torch.tensor([[16, 0, 0], [0, 8, 0], [0, 0, 0], [4, 4, 8]], dtype=torch.int16))
    assert half.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0.25, 0.25, 0.5]]
    assert metrics["miou_ceiling"] > 99.9
    assert metrics["miou_ceiling"] >= metrics["miou"]


def test_colour_is_found(encoder: Encoder, coloured):
    """Random features see colour: far above chance. Subsamples and repeats are reported beside."""
    settings = {"k": [3, 5], "workers": 0, "subsample": [1, 3], "repeats": 2}
    config = build(DenseRetrievalConfig, settings)
    outcome = run(encoder, coloured(1), coloured(2), config, progress=False)
    metrics = outcome.metrics
    assert metrics["miou"] > 80
    assert metrics["miou_low"] <= metrics["miou"] <= metrics["miou_high"]
    assert metrics["miou"] == max(metrics["miou_k3"], metrics["miou_k5"])
    assert metrics[f"miou_k{metrics['best_k']:.0f}"] == metrics["miou"]
    assert {"miou_1of3", "miou_1of3_sd", "miou_1of3_k3"} <= metrics.keys()
    assert set(outcome.data["class_iou"]) == {"a", "b", "c"}
    # The strip of void takes half of the last column of patches, but no patch as a whole.
    assert outcome.data["train"]["reference_patches"] == 6 * 16
    at_image = build(DenseRetrievalConfig, settings | {"evaluate_at": "image"})
    again = run(encoder, coloured(1), coloured(2), at_image, progress=False).metrics
    assert again["miou"] == metrics["miou"]  # the images have the size of the input


def test_void_as_the_first_class_is_worse_where_there_is_void(encoder: Encoder, coloured):
    train, test = coloured(1), coloured(2)
    for labels in train.maps:
        labels[8:] = IGNORE
    results = {
        void: run(
            encoder, train, test, build(DenseRetrievalConfig, {"k": [1], "workers": 0, "void": void}), False
        )
        for void in ("drop", "first")
    }
    assert results["drop"].data["train"]["reference_patches"] == 6 * 4
    assert results["first"].data["train"]["reference_patches"] == 6 * 16
    assert results["drop"].metrics["miou"] > results["first"].metrics["miou"] + 5


def test_mistakes(encoder: Encoder, coloured):
    with pytest.raises(UserError, match="k=200 is more than the 96 patches in the reference set"):
        run(encoder, coloured(1), coloured(2), build(DenseRetrievalConfig, {"k": [200], "workers": 0}), False)
    with pytest.raises(UserError, match="k: needs different numbers"):
        build(DenseRetrievalConfig, {"k": [3, 3]})
    empty = coloured(2)
    empty.maps = [np.full_like(labels, IGNORE) for labels in empty.maps]
    with pytest.raises(UserError, match="no pixel of test has a class"):
        run(encoder, coloured(1), empty, build(DenseRetrievalConfig, {"k": [3], "workers": 0}), False)


def test_patch_pixels_of_a_image_follow_its_grid():
    labels = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    assert patch_pixels(labels, 2)[0, 1].tolist() == [2, 3, 6, 7]
