"""k-NN and logistic segmentation against loops and scikit-learn; what is held out stays out."""

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from foveola.config import UserError, build
from foveola.data.segmentation import IGNORE
from foveola.evaluation.classification.logistic import LogisticModel
from foveola.evaluation.protocol import At
from foveola.evaluation.segmentation import choice, patches
from foveola.evaluation.segmentation.choice import choose_setting, hold_out
from foveola.evaluation.segmentation.patches import (
    KnnSegmentation,
    KnnSegmentationConfig,
    LogisticSegmentation,
    LogisticSegmentationConfig,
    Scaler,
    transplant,
)


def rows(count: int, seed: int, offset: float = 0.0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + offset


# -- pure functions ---------------------------------------------------------------------------------------


def test_scaler_equals_scikit_learn_and_guards_constants():
    x = rows(50, 0) * torch.tensor([1, 10, 0.1, 1000, 1, 1]) + 3
    x[:, 5] = 0.1
    judge = StandardScaler().fit(x.double().numpy())
    scaled = Scaler.fit(x)(x)
    np.testing.assert_allclose(
        scaled[:, :5], judge.transform(x.double().numpy())[:, :5], rtol=1e-3, atol=1e-4
    )
    assert scaled[:, 5].abs().max() < 1e-6
    larger = x.clone()
    larger[:, 2] *= 1000
    torch.testing.assert_close(Scaler.fit(larger)(larger), scaled, rtol=1e-3, atol=1e-4)


def naive_vote(pixels, indices, void_votes):
    out = np.zeros((len(indices), pixels.shape[1]), np.uint8)
    for i, some in enumerate(indices.tolist()):
        for q in range(pixels.shape[1]):
            labels = [int(pixels[j, q]) for j in some]
            if not void_votes:
                labels = [label for label in labels if label != IGNORE] or [IGNORE]
            out[i, q] = min(set(labels), key=lambda label: (-labels.count(label), label))
    return out


@pytest.mark.parametrize("void_votes", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_vote_is_the_mode_at_every_pixel(k, void_votes, monkeypatch):
    rng = np.random.default_rng(k)
    pixels = torch.from_numpy(rng.choice([0, 1, 2, IGNORE], (30, 12)).astype(np.uint8))
    indices = torch.from_numpy(rng.integers(0, 30, (25, k)))
    expected = naive_vote(pixels, indices, void_votes)
    np.testing.assert_array_equal(transplant(pixels, indices, 3, void_votes), expected)
    monkeypatch.setattr(patches, "VOTES", 100)  # two queries at a time
    np.testing.assert_array_equal(transplant(pixels, indices, 3, void_votes), expected)


def test_patterns_inside_a_patch_are_transplanted():
    checker = torch.tensor([[0, 1, 0, 1]], dtype=torch.uint8).repeat(3, 1)
    assert transplant(checker, torch.tensor([[0, 1, 2]]), 2).tolist() == [[0, 1, 0, 1]]


# -- choices ----------------------------------------------------------------------------------------------


def test_hold_out_is_of_whole_images():
    images = torch.arange(20).repeat_interleave(3)
    labels = torch.zeros(60, 4, dtype=torch.uint8)
    held = hold_out(images, labels, 2, 0.1, 0)
    assert held.sum() == 6
    assert not set(images[held].tolist()) & set(images[~held].tolist())
    assert torch.equal(held, hold_out(images, labels, 2, 0.1, 0))
    assert not torch.equal(held, hold_out(images, labels, 2, 0.1, 1))
    assert hold_out(images[:6], labels[:6], 2, 0.01, 0).sum() == 3  # at least one image
    with pytest.raises(UserError, match="at least two images"):
        hold_out(images[:3], labels[:3], 2, 0.1, 0)


@pytest.mark.parametrize("seed", range(5))
def test_hold_out_has_its_share_of_every_class(seed, monkeypatch):
    """200 images show class 0; 40 of them 1 as well, 20 others 2, 10 of these 3; 10 images nothing."""
    monkeypatch.setattr(choice, "LABELS_AT_ONCE", 30)  # a few rows at a time
    shows = [{0, 1}] * 40 + [{0, 2}] * 10 + [{0, 2, 3}] * 10 + [{0}] * 140 + [set()] * 10
    order = np.random.default_rng(seed).permutation(len(shows))
    rows, images = [], []
    for name, image in enumerate(order.tolist()):
        for row in range(2):  # the classes of an image are spread over its rows; void is in all
            rows.append([*(c for c in sorted(shows[image]) if c % 2 == row), *[IGNORE] * 3][:3])
            images.append(name)
    held = hold_out(torch.tensor(images), torch.tensor(rows, dtype=torch.uint8), 4, 0.2, seed)
    chosen = {images[i] for i in torch.nonzero(held).flatten().tolist()}
    assert len(chosen) == 42
    counts = [sum(c in shows[order[name]] for name in chosen) for c in range(4)]
    assert counts[1] == 8
    assert counts[2:] == [4, 2]
    assert counts[0] == 40


def test_hold_out_of_images_that_are_each_of_another_kind_is_drawn_all_the_same():
    labels = torch.arange(6, dtype=torch.uint8)[:, None]
    assert hold_out(torch.arange(6), labels, 6, 0.5, 0).sum() == 3


def test_of_equal_scores_the_lowest_loss_wins_and_then_the_first():
    nan, inf = float("nan"), float("inf")
    assert choose_setting([1.0, 3.0, 2.0], lambda: pytest.fail("no tie")) == 1
    assert choose_setting([nan, 3.0, 2.0, 3.0], lambda: [0.0, 0.5, 0.0, 0.4]) == 3
    assert choose_setting([3.0, 3.0, 3.0], lambda: [nan, inf, 9.0]) == 2
    assert choose_setting([3.0, 3.0], lambda: [0.0, 0.0]) == 0
    assert choose_setting([3.0, 3.0], lambda: [nan, nan]) == 0


def test_the_loss_is_the_mean_cross_entropy_of_rows(monkeypatch):
    monkeypatch.setattr(patches, "QUERY_BLOCK", 7)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.integers(0, 4, 20)
    weight, bias = rng.normal(size=(4, 3)), rng.normal(size=4)
    model = LogisticModel(torch.from_numpy(weight), torch.from_numpy(bias), 0.0, 0.0, 0)
    scores = [weight @ row + bias for row in x]
    expected = np.mean([np.log(np.exp(s).sum()) - s[label] for s, label in zip(scores, y, strict=True)])
    found = patches._cross_entropy(model, torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-12)


def test_equal_settings_are_told_apart_by_their_loss(encoder, coloured, monkeypatch):
    """Logistic regression takes the C of lower loss, and k-NN, which has none, the first."""
    monkeypatch.setattr(patches, "_held_out", lambda predict, table, classes, settings: [50.0] * settings)
    logistic = build(LogisticSegmentationConfig, {"workers": 0, "c": [1e-6, 1.0]})
    assert run_logistic(encoder, coloured(1), coloured(2), logistic, False).chosen == {
        "logistic_segmentation": {"c": 1.0}
    }
    knn = build(KnnSegmentationConfig, {"workers": 0, "k": [3, 1]})
    assert run_knn(encoder, coloured(1), coloured(2), knn, False).chosen == {
        "knn_segmentation": {"distance": "l2", "k": 3}
    }


# -- protocols --------------------------------------------------------------------------------------------


def run_knn(encoder, train, test, config, progress=False):
    return KnnSegmentation().measure(At(encoder, train, test, progress=progress), config)


def run_logistic(encoder, train, test, config, progress=False):
    return LogisticSegmentation().measure(At(encoder, train, test, progress=progress), config)


def test_knn_finds_colour(encoder, coloured):
    config = build(KnnSegmentationConfig, {"workers": 0, "k": [1, 3]})
    outcome = run_knn(encoder, coloured(1), coloured(2), config, progress=False)
    assert outcome.metrics["miou"] > 85
    assert outcome.metrics["miou_low"] <= outcome.metrics["miou"] <= outcome.metrics["miou_high"]
    assert len(outcome.grid["knn_segmentation"]) == 4
    best = max(outcome.grid["knn_segmentation"], key=lambda entry: entry["miou"])
    assert {name: best[name] for name in ("distance", "k")} == outcome.chosen["knn_segmentation"]
    assert set(outcome.data["class_iou"]) == {"a", "b", "c"}


def test_reference_set_of_the_queries_gives_the_truth_back(encoder, coloured):
    train, test = coloured(1), coloured(1)
    test.name = "copy:"
    for labels in (*train.maps, *test.maps):
        labels[labels == IGNORE] = 0
    config = build(KnnSegmentationConfig, {"workers": 0, "k": [1], "distance": ["l2"]})
    assert run_knn(encoder, train, test, config, False).metrics["miou"] == pytest.approx(100)


def test_logistic_finds_colour(encoder, coloured):
    config = build(LogisticSegmentationConfig, {"workers": 0, "c": [1e-3, 1.0]})
    outcome = run_logistic(encoder, coloured(1), coloured(2), config, progress=False)
    assert outcome.metrics["miou"] > 85
    assert outcome.metrics["miou_capi"] == outcome.metrics["miou"]  # it never says "no class"
    assert [entry["c"] for entry in outcome.grid["logistic_segmentation"]] == [1e-3, 1.0]


def test_eight_published_values_of_c():
    c = LogisticSegmentationConfig().c
    np.testing.assert_allclose(c, [1e-6, 3.73e-5, 1.39e-3, 5.18e-2, 1.93, 72.0, 2683, 1e5], rtol=2e-3)


@pytest.mark.parametrize("protocol", ["knn", "logistic"])
def test_the_choice_knows_nothing_of_test_and_the_scaler_nothing_of_the_hold_out(
    protocol, encoder, coloured, monkeypatch
):
    run, config = {
        "knn": (run_knn, build(KnnSegmentationConfig, {"workers": 0, "k": [1, 3, 5]})),
        "logistic": (run_logistic, build(LogisticSegmentationConfig, {"workers": 0, "c": [1e-4, 1e-2, 1.0]})),
    }[protocol]
    fitted: list[int] = []
    fit = Scaler.fit
    monkeypatch.setattr(Scaler, "fit", lambda x: fitted.append(len(x)) or fit(x))
    honest = run(encoder, coloured(1), coloured(2), config, False)
    assert fitted == [5 * 16]  # one of six images is held out
    poisoned = coloured(2)
    rng = np.random.default_rng(0)
    poisoned.maps = [rng.integers(0, 3, labels.shape).astype(np.uint8) for labels in poisoned.maps]
    other = run(encoder, coloured(1), poisoned, config, False)
    assert other.chosen == honest.chosen
    assert other.grid == honest.grid
    assert other.metrics["miou"] < honest.metrics["miou"] - 20


def test_held_out_patches_do_not_vote_for_themselves(encoder, coloured):
    """Labels are noise: held-out patches that leaked into the reference set would be found right at k = 1."""
    train, rng = coloured(1, 8), np.random.default_rng(0)
    train.maps = [rng.integers(0, 3, (32, 32)).astype(np.uint8) for _ in train.maps]
    config = build(KnnSegmentationConfig, {"workers": 0, "k": [1, 3], "holdout": 0.5})
    tried = run_knn(encoder, train, coloured(2), config, False).grid["knn_segmentation"]
    assert all(entry["miou"] < 30 for entry in tried)  # chance is 20: a third right


def test_mistakes(encoder, coloured):
    with pytest.raises(UserError, match="k=500 is more than the"):
        run_knn(
            encoder, coloured(1), coloured(2), build(KnnSegmentationConfig, {"workers": 0, "k": [500]}), False
        )
    with pytest.raises(UserError, match="c: needs different values"):
        build(LogisticSegmentationConfig, {"c": [1, 1.0]})
    void = coloured(1)
    void.maps = [np.full_like(labels, IGNORE) for labels in void.maps]
    config = build(KnnSegmentationConfig, {"workers": 0, "k": [1]})
    with pytest.raises(UserError, match="no patch of 6 images has a class"):
        run_knn(encoder, void, coloured(2), config, False)
    void.name = "void:"
    with pytest.raises(UserError, match="no pixel of test has a class"):
        run_knn(encoder, coloured(1), void, config, False)


def test_classes_absent_from_training_are_never_predicted_and_count_as_missed(encoder, coloured):
    train = coloured(1)
    for labels in train.maps:
        labels[labels == 2] = IGNORE
    outcome = run_logistic(
        encoder, train, coloured(2), build(LogisticSegmentationConfig, {"workers": 0, "c": [1.0]}), False
    )
    assert outcome.data["class_iou"]["c"] == 0.0
    assert outcome.metrics["miou"] == pytest.approx(
        np.mean(list(outcome.data["class_iou"].values())), abs=0.01
    )
