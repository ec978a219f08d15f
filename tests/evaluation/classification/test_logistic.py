"""L-BFGS logistic regression against scikit-learn, and its path over C."""

import numpy as np
import pytest
import torch

from foveola.evaluation.classification.logistic import fit, path, standardiser


def clouds(n: int = 500, width: int = 12, classes: int = 4, seed: int = 0, spread: float = 1.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = spread * rng.normal(size=(classes, width))[y] + rng.normal(size=(n, width)) * 2
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


@pytest.mark.parametrize("c", [1e-4, 0.05, 1.0, 100.0])
def test_the_minimum_is_scikit_learns(c) -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = clouds()
    model = fit(x, y, 4, c)
    other = LogisticRegression(C=c, tol=1e-10, max_iter=10000).fit(x.double().numpy(), y.numpy())
    assert model.gradient < 1e-5
    centred = model.bias - model.bias.mean()
    np.testing.assert_allclose(model.weight.numpy(), other.coef_, atol=1e-4)
    np.testing.assert_allclose(centred.numpy(), other.intercept_ - other.intercept_.mean(), atol=1e-4)
    assert (model.predict(x).numpy() == other.predict(x.numpy())).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_flat_valley_is_walked_to_its_end(dtype) -> None:
    """Correlated columns that are not centred, as features are, and the tolerance of the protocols: 1e-6.

    A rule on the change of the loss of the same size stops with gradients a hundred times as large.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = clouds(n=300, width=20, classes=5, spread=0.7)
    mix = torch.from_numpy(np.random.default_rng(1).normal(size=(20, 20)).astype(np.float32))
    x, values = x @ mix / 5 + 1.5, (3.7e-5, 0.05, 1.0)
    for c, model in zip(values, path(x, y, 5, values, tolerance=1e-6, dtype=dtype), strict=True):
        other = LogisticRegression(C=c, tol=1e-9, max_iter=20000).fit(x.double().numpy(), y.numpy())
        weight, bias = torch.from_numpy(other.coef_), torch.from_numpy(other.intercept_)
        log = torch.log_softmax(x.double() @ weight.T + bias, 1)
        best = -log.gather(1, y[:, None]).mean().item() + weight.square().sum().item() / (2 * c * 300)
        assert model.loss == pytest.approx(best, abs=1e-4)
        assert model.gradient <= (1e-6 if dtype == torch.float64 else 3e-4)
        assert 0 < model.iterations < 1000


def test_two_classes_are_a_softmax_of_two() -> None:
    """The margin is that of scikit-learn's binary model with half the penalty."""
    from sklearn.linear_model import LogisticRegression

    x, y = clouds(classes=2)
    model = fit(x, y, 2, 0.5)
    other = LogisticRegression(C=1.0, tol=1e-10, max_iter=10000).fit(x.double().numpy(), y.numpy())
    margin = model.weight[1] - model.weight[0]
    np.testing.assert_allclose(margin.numpy(), other.coef_[0], atol=1e-4)


def test_objective_by_a_naive_loop() -> None:
    x, y = clouds(n=40, width=3, classes=3)
    model = fit(x, y, 3, 0.3, max_iterations=3)
    total = 0.0
    for row, label in zip(x.double(), y, strict=True):
        scores = [float(model.weight[k] @ row + model.bias[k]) for k in range(3)]
        total -= scores[label] - np.log(sum(np.exp(s) for s in scores))
    expected = total / 40 + float(model.weight.square().sum()) / (2 * 0.3 * 40)
    assert model.loss == pytest.approx(expected, rel=1e-10)


def test_a_path_ends_where_each_alone_would(monkeypatch) -> None:
    x, y = clouds()
    values = (1.0, 1e-3, 0.05)
    models = path(x, y, 4, values)
    for c, model in zip(values, models, strict=True):
        torch.testing.assert_close(model.weight, fit(x, y, 4, c).weight, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(
        "foveola.evaluation.classification.logistic.LOGITS_AT_ONCE", 90
    )  # seven rows at a time
    torch.testing.assert_close(fit(x, y, 4, 0.05).weight, models[2].weight, rtol=1e-3, atol=1e-5)


def test_a_class_without_rows_is_never_predicted() -> None:
    x, y = clouds()
    y = torch.where(y == 2, 5, y)  # classes 2, 4 and 6 are empty
    model = fit(x, y, 7, 1.0)
    assert set(model.predict(x).tolist()) == {0, 1, 3, 5}
    torch.testing.assert_close(
        model.weight[[0, 1, 5, 3]], fit(x, torch.where(y == 5, 2, y), 4, 1.0).weight[[0, 1, 2, 3]]
    )
    assert model.bias[[2, 4, 6]].eq(-torch.inf).all()


def test_bad_input() -> None:
    x, y = clouds(20)
    for rows, labels, c, message in (
        (x[:0], y[:0], 1.0, "of 0 rows"),
        (x, y, 0.0, "C=0.0"),
        (x, y + 2, 1.0, "labels from 2 to 5 for 4 classes"),
        (x.clone().index_fill_(0, torch.tensor([3]), torch.nan), y, 1.0, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(rows, labels, 4, c)


def test_standardiser_is_scikit_learns() -> None:
    from sklearn.preprocessing import StandardScaler

    x, _ = clouds()
    x[:, 3] = 7.25
    mean, scale = standardiser(x)
    other = StandardScaler().fit(x.double().numpy())
    np.testing.assert_allclose(mean.numpy(), other.mean_, rtol=1e-6)
    np.testing.assert_allclose(scale.numpy(), other.scale_, rtol=1e-6)
    assert scale[3] == 1
