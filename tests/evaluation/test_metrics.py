import math

import numpy as np
import pytest
import torch

from foveola.evaluation.classification.knn import ranking, vote
from foveola.evaluation.metrics import (
    bootstrap,
    effective_rank,
    interval,
    paired_interval,
    partner_ranks,
    percent,
    recall_at,
    tango,
    unit_rows,
    wilson,
)


def test_unit_rows_of_any_magnitude() -> None:
    x = torch.randn(5, 7)
    naive = (x.double() / x.double().norm(dim=1, keepdim=True)).float()
    for factor in (1.0, 1e-30, 1e30):
        torch.testing.assert_close(unit_rows(x * factor), naive, atol=2e-7, rtol=1e-6)
    assert torch.equal(unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert unit_rows(x.bfloat16()).dtype == torch.float32


def test_vote_equals_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    s, y = rng.uniform(-1, 1, (6, 9)), rng.integers(0, 4, (6, 9))
    naive = np.zeros((6, 4))
    for i in range(6):
        for j in range(9):
            naive[i, y[i, j]] += math.exp(s[i, j] / 0.07)
    scores = vote(torch.tensor(s, dtype=torch.float32), torch.tensor(y), 4, 0.07).double().numpy()
    shares = naive / naive.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores / scores.sum(axis=1, keepdims=True), shares, rtol=1e-4)


def test_temperature_decides_between_one_near_and_two_far() -> None:
    s, y = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[0, 1, 1]])
    sharp, soft = vote(s, y, 2, 0.07), vote(s, y, 2, 0.2)
    assert sharp[0, 0] / sharp[0, 1] == pytest.approx(2.086, abs=1e-3)
    assert soft[0, 0] / soft[0, 1] == pytest.approx(0.824, abs=1e-3)
    assert ranking(sharp, 5).tolist() == [[0, 1]]
    assert ranking(soft, 1).tolist() == [[1]]


def test_vote_does_not_overflow_and_counts_no_missing_neighbour() -> None:
    tiny = vote(torch.tensor([[1.0, 0.999]]), torch.tensor([[0, 1]]), 3, 1e-4)
    assert tiny.isfinite().all()
    assert ranking(tiny, 1).item() == 0
    inf = torch.inf
    scores = vote(torch.tensor([[0.1, -inf], [-inf, -inf]]), torch.tensor([[2, 1], [0, 1]]), 3, 0.07)
    assert ranking(scores, 3).tolist() == [[2, -1, -1], [-1, -1, -1]]


def test_percent() -> None:
    assert percent(torch.tensor([True, True, False, False])) == 50.0
    with pytest.raises(ValueError, match="no rows"):
        percent(torch.zeros(0, dtype=torch.bool))


def test_partner_ranks_equal_a_sort() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(40, 6))
    b = a + rng.normal(size=(40, 6))
    s = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    naive = [int(np.flatnonzero(np.argsort(-s[i]) == i)[0]) for i in range(40)]
    for chunk in (1, 7, 100):
        ranks = partner_ranks(torch.tensor(a).float(), torch.tensor(b).float(), chunk)
        assert ranks.tolist() == naive
    assert recall_at(ranks, 5) == pytest.approx(100 * np.mean(np.array(naive) < 5))


def test_a_collapsed_encoder_finds_nothing() -> None:
    same = torch.ones(10, 4)
    assert recall_at(partner_ranks(same, same), 5) == 0.0
    assert effective_rank(same * 0.3) == 0.0


def test_bootstrap_covers_and_is_repeatable() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        x = torch.tensor(rng.random(80) < 0.3)
        low, high = bootstrap(x, samples=300, seed=trial)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 200  # 95 % nominal; 190 expected, 3 standard deviations below is 181
    x = torch.tensor(rng.random(80))
    assert bootstrap(x, seed=3) == bootstrap(x, seed=3) != bootstrap(x, seed=4)


def test_bootstrap_interval_equals_the_normal_one_for_many_rows() -> None:
    x = torch.tensor(np.random.default_rng(3).random(4000) < 0.7)
    low, high = bootstrap(x, samples=2000)
    mean, half = x.double().mean().item(), 1.96 * math.sqrt(x.double().var() / 4000)
    assert low == pytest.approx(mean - half, abs=0.15 * half)
    assert high == pytest.approx(mean + half, abs=0.15 * half)


def test_bootstrap_over_images_knows_that_rows_of_one_are_not_independent() -> None:
    x = torch.tensor(np.random.default_rng(4).random(100) < 0.5)
    copies, groups = x.repeat_interleave(9), torch.arange(100).repeat_interleave(9)
    assert bootstrap(copies, groups, seed=5) == pytest.approx(bootstrap(x, seed=5))
    rows = bootstrap(copies, seed=5)
    grouped = bootstrap(copies, groups, seed=5)
    assert (rows[1] - rows[0]) == pytest.approx((grouped[1] - grouped[0]) / 3, rel=0.2)


def test_effective_rank_equals_singular_values() -> None:
    x = np.random.default_rng(5).normal(size=(50, 8)) * np.linspace(0.1, 2, 8) + 3
    singular = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    p = singular / singular.sum()
    expected = math.exp(-(p * np.log(p)).sum())
    for chunk in (7, 1000):
        assert effective_rank(torch.tensor(x, dtype=torch.float32), chunk) == pytest.approx(
            expected, rel=1e-4
        )
    line = torch.randn(20, 1) * torch.randn(1, 5)
    assert effective_rank(line) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("right", "count"), [(100, 100), (0, 7), (99, 100), (19, 20), (1, 1), (4321, 50000)])
def test_wilson_is_scipys(right: int, count: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_intervals_of_plain_hits_hold_what_they_promise_near_the_end() -> None:
    """Of 2000 draws with p = 0.99 and n = 100: a bootstrap holds the truth in two of three."""
    rights = np.random.default_rng(0).binomial(100, 0.99, 2000)
    inside = {}
    for right in np.unique(rights).tolist():
        hit = torch.arange(100) < right
        low, high = interval(hit)
        other = bootstrap(hit)
        inside[right] = low <= 0.99 <= high, other[0] <= 0.99 <= other[1]
    ours, theirs = np.mean([inside[right] for right in rights.tolist()], axis=0)
    assert ours > 0.9
    assert theirs < 0.75


def test_which_interval() -> None:
    """Wilson for hits of rows of their own; a bootstrap where rows belong together or are no hits."""
    hit, pairs = torch.tensor([True, True, False, True] * 5), torch.arange(20) // 2
    assert interval(hit, torch.arange(20) + 7) == interval(hit) == wilson(0.75, 20)
    assert interval(hit, pairs) == bootstrap(hit, pairs)
    assert interval(hit.double() / 3) == bootstrap(hit.double() / 3)
    for all_alike, end in ((torch.ones(20), 1.0), (torch.zeros(20, dtype=torch.bool), 0.0)):
        assert interval(all_alike, pairs) == wilson(end, 10)  # ten images, whatever their rows
        low, high = interval(all_alike)
        assert low < high


def profile_score(d: float, gained: int, lost: int, count: int) -> float:
    """Tango's statistic at difference d, the nuisance found by searching the likelihood itself."""
    from scipy.optimize import minimize_scalar

    def unlikely(q: float) -> float:
        terms = ((gained, q + d), (lost, q), (count - gained - lost, 1 - 2 * q - d))
        return -sum(n * math.log(max(p, 1e-300)) for n, p in terms if n)

    low, high = max(0.0, -d), (1 - d) / 2
    q = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - count * d) / math.sqrt(count * (2 * q + d - d * d))


@pytest.mark.parametrize(("gained", "lost", "count"), [(12, 5, 60), (3, 9, 40), (30, 28, 2000), (7, 0, 50)])
def test_tango_by_searching_the_likelihood(gained: int, lost: int, count: int) -> None:
    low, high = tango(gained, lost, count)
    assert low < (gained - lost) / count < high
    assert profile_score(low, gained, lost, count) == pytest.approx(1.959964, abs=1e-3)
    assert profile_score(high, gained, lost, count) == pytest.approx(-1.959964, abs=1e-3)
    assert tango(lost, gained, count) == pytest.approx((-high, -low), abs=1e-9)


def test_paired_interval_leaves_out_zero_where_mcnemar_rejects() -> None:
    for gained in range(12):
        for lost in range(12):
            low, high = tango(gained, lost, 100)
            assert (low > 0 or high < 0) == ((gained - lost) ** 2 > 3.8415 * (gained + lost)), (gained, lost)


def test_paired_interval_is_narrower_than_two_of_their_own() -> None:
    """200 rows: 27.5 % and, of the same ones, 21 % right."""
    a, b = torch.arange(200) < 55, torch.arange(200) < 42
    difference, low, high = paired_interval(a, b)
    assert difference == pytest.approx(-0.065)
    assert high < 0  # the intervals of their own overlap
    assert interval(b)[1] > interval(a)[0]
    assert paired_interval(b, a)[1:] == pytest.approx((-high, -low))
    assert paired_interval(a, a)[0] == 0
    low, high = paired_interval(a, a)[1:]
    assert low < 0 < high  # nothing seen in 200 rows is not nothing


def test_paired_intervals_of_groups_and_of_numbers_are_a_bootstrap_of_differences() -> None:
    rng = np.random.default_rng(3)
    a, b = (torch.from_numpy(rng.random(60) < p) for p in (0.4, 0.6))
    images = torch.arange(60) // 3
    difference, low, high = paired_interval(a, b, images, seed=5)
    change = b.double() - a.double()
    assert difference == pytest.approx(b.double().mean().item() - a.double().mean().item())
    assert (low, high) == bootstrap(change, images, seed=5)
    assert paired_interval(a.double() / 3, b.double() / 3) == pytest.approx(
        (difference / 3, *bootstrap(change / 3))
    )
    with pytest.raises(ValueError, match="of 60 and 59 rows"):
        paired_interval(a, b[1:])
