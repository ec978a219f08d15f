"""The search for neighbours: exact, whatever the order of the reference set, in memory of a tile."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from foveola.evaluation.search import Best, nearest_rows, top


def rows(count: int, seed: int, width: int = 6, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + offset


@pytest.mark.parametrize(
    ("distance", "metric", "offset"),
    [("l2", "euclidean", 0.0), ("l2", "euclidean", 50.0), ("cosine", "cosine", 0.0)],
)
def test_neighbours_equal_scikit_learn(distance, metric, offset) -> None:
    queries, references = rows(40, 0, offset=offset), rows(90, 1, offset=offset)
    judge = NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute")
    expected = judge.fit(references.double().numpy()).kneighbors(
        queries.double().numpy(), return_distance=False
    )
    for sizes in ({}, {"reference_chunk": 1}, {"reference_chunk": 13, "tile": 91}, {"tile": 1}):
        found = nearest_rows(queries, references, 7, distance=distance, **sizes)[1]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
@pytest.mark.parametrize("k", [1, 20, 200, 3000])
def test_equals_the_naive_search_in_any_order_of_the_reference_set(order: str, k: int) -> None:
    """A reference set sorted so that neighbours come last gives each tile more candidates than it keeps."""
    queries, references = rows(30, 2, 16), rows(3000, 3, 16)
    if order != "random":
        nearness = torch.nn.functional.normalize(references) @ queries[0]
        references = references[nearness.argsort(descending=order == "descending")]
    unit = torch.nn.functional.normalize
    expected = (unit(queries.double()) @ unit(references.double()).T).topk(k)
    for chunk, tile in ((100, 1000), (500, 1), (500, 5000), (10**6, None)):
        similarities, indices = nearest_rows(queries, references, k, reference_chunk=chunk, tile=tile)
        torch.testing.assert_close(similarities.double(), expected.values, atol=1e-6, rtol=0)
        assert (indices == expected.indices).double().mean() > 0.99  # nearly alike in float32
        assert all(len(row.unique()) == k for row in indices)


def test_tiles_one_by_one_equal_all_at_once() -> None:
    """Best against a sort: few and many columns, a row that gets nearly all of the candidates, -inf, ties."""
    generator = torch.Generator().manual_seed(0)
    for k, widths in ((1, (1, 1, 9)), (5, (3, 1, 40, 100, 17, 3)), (4, (64,) * 30)):
        s = torch.randn(6, sum(widths), generator=generator)
        s[1] = torch.arange(s.shape[1])  # every number is above all before it
        s[2] = -torch.inf
        s[3] = 1.0
        s[4] = -torch.arange(s.shape[1])
        best, first = Best(6, k, "cpu"), 0
        for part in s.split(widths, dim=1):
            best.offer(part, first)
            first += part.shape[1]
        values, columns = best.result()
        assert torch.equal(values, s.topk(k, dim=1).values)
        assert torch.equal(s.gather(1, columns), values)
        assert all(len(row.unique()) == k for i, row in enumerate(columns) if i != 2)


@pytest.mark.parametrize(("n", "k"), [(5000, 10), (5000, 200), (4099, 1), (100, 100), (64, 1000)])
def test_fast_selection_equals_topk(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.stack([torch.randperm(n, generator=generator) for _ in range(4)]) / n  # no ties
    values, columns = top(x, k)
    expected = x.topk(min(k, n), dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)


def test_fast_selection_keeps_neighbours_that_stand_close_together() -> None:
    x = torch.zeros(1, 6000)
    x[0, 1000:1030] = torch.arange(30.0) + 1
    assert set(top(x, 30)[1][0].tolist()) == set(range(1000, 1030))


def test_memory_does_not_grow_with_queries_times_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than a tile, and no more than a few k of each query wait, in the worst order."""
    sizes, waiting, plain = [], [], Best.offer

    def offer(self: Best, s: torch.Tensor, first: int) -> None:
        sizes.append(s.numel())
        plain(self, s, first)
        waiting.append(self.count / len(s))

    monkeypatch.setattr(Best, "offer", offer)
    queries = torch.ones(500, 2) + 0.01 * rows(500, 0, 2)
    angle = torch.linspace(3, 0.8, 20_000)  # nearer and nearer
    references = torch.stack([angle.cos(), angle.sin()], dim=1)
    similarities, indices = nearest_rows(queries, references, 5, tile=2**16, reference_chunk=4096)
    assert max(sizes) <= 2**16
    assert sum(sizes) == 500 * 20_000
    assert max(waiting) <= 2 * 5
    assert similarities.shape == indices.shape == (500, 5)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(similarities, (unit(queries) @ unit(references).T).topk(5).values)
