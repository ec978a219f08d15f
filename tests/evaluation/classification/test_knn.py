import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from foveola.config import ConfigError, UserError, build
from foveola.evaluation.classification.knn import KnnConfig, predict, shared_labels
from foveola.evaluation.evaluate import evaluate, evaluate_all
from foveola.evaluation.search import nearest_rows


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """References, labels, queries, labels: four overlapping clouds."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(4, (n,), generator=generator)
        return centres[labels] + 1.5 * torch.randn(n, 16, generator=generator), labels

    return *draw(300), *draw(60)


def naive(
    queries: np.ndarray, references: np.ndarray, labels: np.ndarray, k: int, temperature: float
) -> list[int]:
    """The rule of DINO's k-NN, one neighbour at a time, in float64."""
    predictions = []
    for q in queries.astype(np.float64):
        similarities = [
            float(q @ b / np.linalg.norm(q) / np.linalg.norm(b)) for b in references.astype(np.float64)
        ]
        neighbours = sorted(range(len(references)), key=lambda i: -similarities[i])[:k]
        scores: dict[int, float] = {}
        for i in neighbours:
            scores[int(labels[i])] = scores.get(int(labels[i]), 0.0) + math.exp(similarities[i] / temperature)
        predictions.append(max(scores, key=scores.__getitem__))
    return predictions


@pytest.mark.parametrize("k", [1, 10, 20, 100, 300])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_a_naive_loop_and_scikit_learn(problem, k: int, temperature: float) -> None:
    references, labels, queries, truth = problem
    ranked = predict(queries, references, labels, k=(k,), classes=4, temperature=temperature)[k]
    ours = ranked[:, 0].numpy()
    assert ours.tolist() == naive(queries.numpy(), references.numpy(), labels.numpy(), k, temperature)

    reference = KNeighborsClassifier(
        k, weights=lambda d: np.exp((1 - d) / temperature), metric="cosine", algorithm="brute"
    ).fit(references.double().numpy(), labels.numpy())
    shares = reference.predict_proba(queries.double().numpy())
    np.testing.assert_array_equal(ours, shares.argmax(axis=1))
    # the whole ranking, of the classes that got a vote
    for row, share in zip(ranked, shares, strict=True):
        assert [c for c in row.tolist() if c >= 0] == [c for c in np.argsort(-share) if share[c] > 0]
    assert 0.5 < (ours == truth.numpy()).mean() < 1


def test_all_k_in_one_pass_equal_each_k_alone(problem) -> None:
    references, labels, queries, _ = problem
    together = predict(queries, references, labels, k=(10, 20, 100), classes=4)
    for k, ranked in together.items():
        assert torch.equal(ranked, predict(queries, references, labels, k=(k,), classes=4)[k])


def test_more_queries_than_a_block(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    references, labels, queries, _ = problem
    whole = predict(queries, references, labels, k=(10, 20), classes=4)
    monkeypatch.setattr("foveola.evaluation.classification.knn.QUERY_BLOCK", 7)
    blocks = predict(queries, references, labels, k=(10, 20), classes=4)
    assert all(torch.equal(whole[k], blocks[k]) for k in whole)


def test_positive_factors_change_nothing(problem) -> None:
    references, labels, queries, _ = problem
    plain = predict(queries, references, labels, k=(20,), classes=4)[20]
    factors = torch.logspace(-25, 25, len(references))[:, None]
    assert torch.equal(plain, predict(queries * 3e-12, references * factors, labels, k=(20,), classes=4)[20])


def test_order_of_the_reference_set_changes_nothing(problem) -> None:
    references, labels, queries, _ = problem
    order = torch.randperm(len(references))
    plain = predict(queries, references, labels, k=(20,), classes=4)[20]
    assert torch.equal(plain, predict(queries, references[order], labels[order], k=(20,), classes=4)[20])


def test_a_reference_set_of_class_means_is_perfect() -> None:
    labels = torch.randint(6, (40,))
    queries = torch.eye(6)[labels] + 0.05 * torch.rand(40, 6)
    ranked = predict(queries, torch.eye(6), torch.arange(6), k=(1, 6), classes=6)
    assert torch.equal(ranked[1][:, 0], labels)
    assert torch.equal(ranked[6][:, 0], labels)


def test_k_of_the_whole_reference_set_and_above_a_class_size() -> None:
    references, labels = torch.randn(5, 3), torch.tensor([0, 0, 0, 1, 2])
    similarities, indices = nearest_rows(torch.randn(2, 3), references, 50)
    assert indices.shape == (2, 5)
    assert similarities.isfinite().all()
    assert predict(torch.randn(2, 3), references, labels, k=(5,), classes=3)[5].shape == (2, 3)
    with pytest.raises(ValueError, match="with 5 references"):
        predict(torch.randn(2, 3), references, labels, k=(6,), classes=3)


def test_a_row_of_ones_own_group_is_no_neighbour() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(2))
    images = torch.arange(30) // 3
    similarities, indices = nearest_rows(
        x, x, 29, query_groups=images, reference_groups=images, reference_chunk=7
    )
    for i in range(30):
        found = indices[i][similarities[i] > -torch.inf].tolist()
        assert sorted(found) == [j for j in range(30) if images[j] != images[i]]


def test_leaves_the_precision_of_products_alone(problem) -> None:
    references, _, queries, _ = problem
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        _, indices = nearest_rows(queries, references, 10)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(indices, nearest_rows(queries, references, 10)[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(indices, nearest_rows(queries, references, 10)[1])


@pytest.mark.gpu
def test_gpu_equals_cpu(problem) -> None:
    references, labels, queries, _ = problem
    cpu = predict(queries, references, labels, k=(10, 20), classes=4)
    gpu = predict(queries, references, labels, k=(10, 20), classes=4, device="cuda")
    assert all(torch.equal(cpu[k], gpu[k]) for k in cpu)


def test_labels_meet_by_class_name() -> None:
    notes: list[str] = []
    reference_labels = torch.tensor([0, 1, 1, 2])
    names, reference_names = ("cat", "dog", "emu"), ("ant", "cat", "dog")
    labels = shared_labels(torch.tensor([0, 1, 2, 1]), names, reference_labels, reference_names, notes)
    assert labels.tolist() == [1, 2, -1, 2]  # no ant in the test; emu unknown to the references
    assert notes == ["test: 1 of 4 rows are of classes that train lacks, and count as wrong"]
    with pytest.raises(UserError, match=r"share no class \(ant, cat, dog, \.\.\. against xylophone"):
        shared_labels(torch.tensor([0]), ("xylophone",), reference_labels, reference_names, notes)
    assert shared_labels(torch.tensor([1, 7]), None, reference_labels, None, notes).tolist() == [1, -1]


def test_settings_are_checked() -> None:
    assert build(KnnConfig, {"k": [5], "masks": True}).masks is True
    for wrong, message in [
        ({"k": []}, "k: needs"),
        ({"k": [0]}, "k"),
        ({"view": "object"}, "view=object needs rows=objects"),
        ({"temperature": 0}, "temperature"),
        ({"masks": "some"}, "masks"),
        ({"row": "objects"}, "'rows'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(KnnConfig, wrong)


def test_the_headline_is_the_best_k(encoder, shades) -> None:
    """With labels of training images that are wrong here and there, the nearest one is a bad witness."""
    train, test = shades(0, 90), shades(900, 30)
    for i in range(0, 90, 4):
        train.samples[i] = replace(train.samples[i], label=(train.samples[i].label + 1) % 3)
    settings = {"k": (1, 15, 90), "temperature": 10, "workers": 0, "progress": False}  # all vote alike
    metrics = evaluate(encoder, "knn", train=train, test=test, **settings).metrics
    each = {k: metrics[f"top1_masks_k{k}"] for k in (1, 15, 90)}
    assert each[15] > each[1]
    assert each[15] > each[90]
    assert (metrics["top1_masks"], metrics["best_k_masks"]) == (each[15], 15)
    assert metrics["top1_masks_low"] <= each[15] <= metrics["top1_masks_high"]


def test_of_equal_k_the_smallest_is_the_best(encoder, shades) -> None:
    """Of two neighbours the nearer has the stronger vote, so k = 2 answers as k = 1 does."""
    settings = {"k": (2, 1), "workers": 0, "progress": False}
    metrics = evaluate(encoder, "knn", train=shades(0, 40), test=shades(900, 20), **settings).metrics
    assert metrics["top1_masks_k1"] == metrics["top1_masks_k2"] == metrics["top1_masks"]
    assert metrics["best_k_masks"] == 1


def test_several_right_answers_count_as_one_hit(encoder, shades) -> None:
    """ReaL lists a wrong class first, the true one second: as many are right as with the plain labels."""
    train, test, real = shades(0, 60), shades(900, 30), shades(900, 30)
    real.samples = [replace(s, label=(s.label + 1) % 3) for s in real.samples]
    real.answers = lambda i: np.array([real.samples[i].label, test.samples[i].label])
    settings = {"train": train, "k": (5,), "masks": True, "workers": 0, "progress": False}
    plain, lists = (evaluate(encoder, "knn", test=t, **settings).metrics for t in (test, real))
    assert plain["top1_masks"] > 80
    assert lists["top1_masks"] >= plain["top1_masks"]
    del real.answers
    assert evaluate(encoder, "knn", test=real, **settings).metrics["top1_masks"] < 20


def test_only_candidates_vote(encoder, shades) -> None:
    """Of classes that the test set lacks there are rows in train: they have no vote, whatever is near."""
    train, test = shades(0, 60), shades(900, 30)
    test.samples = [s for s in test.samples if s.label != 0]
    settings = {"train": train, "test": test, "masks": False, "workers": 0, "progress": False}
    test.candidates = (1, 2)
    only = evaluate(encoder, "knn", k=(7,), **settings)
    few = shades(0, 60)
    few.samples = [s for s in few.samples if s.label != 0]
    expected = evaluate(encoder, "knn", k=(7,), **{**settings, "train": few}).metrics
    assert only.metrics["top1_plain"] == expected["top1_plain"]
    test.candidates = (0,)  # nothing that is right may be said
    assert evaluate(encoder, "knn", k=(7,), **settings).metrics["top5_plain"] == 0


def test_knn_and_linear_count_alike(encoder, shades) -> None:
    """A candidate set of one class and lists of answers give the same share to any classifier."""
    train, test = shades(0, 60), shades(900, 30)
    test.candidates = (2,)
    test.answers = lambda i: np.array([0, 2] if i % 5 == 0 else [1])
    results = evaluate_all(
        encoder, ("knn", "logistic"), train=train, test=test, k=(3,), values=2, workers=0, progress=False
    )
    assert results["knn"].metrics["top1_plain"] == results["logistic"].metrics["top1_logistic"] == 20
    assert results["knn"].metrics["top5_plain"] == results["logistic"].metrics["top5_logistic"] == 20
