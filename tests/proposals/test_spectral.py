"""Eigenvectors of the normalised cut against scipy's dense generalised solver in float64."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from torch import Tensor

from foveola.proposals import spectral
from foveola.proposals.spectral import second_eigenvectors


def graph(nodes: int, seed: int, groups: int = 3) -> Tensor:
    """A symmetric graph of some loose groups, with weights 1 and 1e-5."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, 8, generator=random)
    x = centres[torch.arange(nodes) % groups] + 0.9 * torch.randn(nodes, 8, generator=random)
    x = x / x.norm(dim=1, keepdim=True)
    return torch.where(x @ x.mT > 0.2, 1.0, 1e-5)


def reference(weights: Tensor) -> tuple[float, np.ndarray]:
    w = weights.double().numpy()
    degrees = np.diag(w.sum(axis=1))
    values, vectors = eigh(degrees - w, degrees, subset_by_index=[1, 1])
    vector = vectors[:, 0]
    largest = np.abs(vector) > 0.99999 * np.abs(vector).max()
    return float(values[0]), vector * np.sign(vector[largest.argmax()])


@pytest.mark.parametrize(("nodes", "exact"), [(2, 128), (9, 128), (60, 128), (60, 0), (150, 0), (300, 0)])
def test_the_vector_is_that_of_the_dense_solver(nodes: int, exact: int):
    weights = torch.stack([graph(nodes, seed) for seed in range(3)])
    found = second_eigenvectors(weights, exact)
    for one, value, vector in zip(weights, found.values, found.vectors, strict=True):
        expected_value, expected = reference(one)
        if nodes > 2:  # two nodes that are alike: 1 and -1, or -1 and 1
            np.testing.assert_allclose(vector.numpy(), expected, atol=1e-6)
        assert float(value) == pytest.approx(expected_value, abs=1e-9)


def test_a_graph_that_converges_slowly_is_solved_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spectral, "LANCZOS_STEPS", 8)
    weights = graph(150, 0)[None]
    expected = reference(weights[0])[1]
    np.testing.assert_allclose(second_eigenvectors(weights, 0).vectors[0].numpy(), expected, atol=1e-9)


def test_the_others_change_nothing():
    weights = torch.stack([graph(140, seed, groups=2 + seed) for seed in range(4)])
    w = weights.double()
    scale = w.sum(dim=2).rsqrt()
    first = (1 / scale) / torch.linalg.vector_norm(1 / scale, dim=1, keepdim=True)
    matrix = scale[:, :, None] * w * scale[:, None]
    _, together, converged = spectral._lanczos(matrix, first)  # as on a GPU
    assert converged.all()
    for i in range(4):
        alone = spectral._lanczos(matrix[i : i + 1], first[i : i + 1])[1][0]
        torch.testing.assert_close(together[i], alone, atol=1e-12, rtol=0)


def test_what_tells_nodes_apart_by_hand():
    """Two pairs that hardly know each other: one pair positive, the other negative, cut 2 * 1e-3 of each."""
    weights = torch.full((4, 4), 1e-3)
    weights[:2, :2] = weights[2:, 2:] = 1
    found = second_eigenvectors(weights[None])
    assert float(found.values) == pytest.approx(2 * 2e-3 / 2.002, rel=1e-5)  # 1 - (2 - 2e-3) / 2.002
    half = (4 * 2.002) ** -0.5
    assert found.vectors[0].abs().tolist() == pytest.approx([half] * 4)
    assert found.vectors[0].sign().tolist() == [1, 1, -1, -1]  # of equals the first is positive


@pytest.mark.parametrize(("nodes", "exact"), [(1, 128), (6, 128), (200, 0)])
def test_where_all_weights_are_the_same_nothing_is_cut(nodes: int, exact: int):
    found = second_eigenvectors(torch.full((1, nodes, nodes), 0.3), exact)
    assert found.values.tolist() == [1]
    assert not found.vectors.any()


def test_a_cut_that_costs_nothing_is_found_by_both_ways():
    """Groups without any edge between them: the first two eigenvalues are equal."""
    weights = torch.block_diag(torch.ones(30, 30), torch.ones(20, 20))[None]
    for exact in (128, 0):
        found = second_eigenvectors(weights, exact)
        assert float(found.values) == pytest.approx(0, abs=1e-9)
        assert len(found.vectors[0].round(decimals=6).unique()) == 2
        assert (found.vectors[0, :30] < 0).all()  # the smaller group has the larger entries
        assert (found.vectors[0, 30:] > 0).all()
