"""Statistics of attention matrices, against float64 loops and values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from foveola.evaluation.attention.statistics import (
    BLOCK_STATISTICS,
    HEAD_STATISTICS,
    Layout,
    divergences,
    entropy_of,
    head_divergence,
    head_statistics,
    logits_for,
    mean_head,
    missing,
    norm_statistics,
    over_patches,
    sharpest_head,
)

NAMES = list(HEAD_STATISTICS)
PLAIN = Layout(False, 0, (14, 14), 16)


def of(weights: Tensor, at: Layout) -> dict[str, float]:
    """Statistics of one attention matrix [T, T]."""
    found = head_statistics(logits_for(weights.double()[None, None]), at).statistics[0, 0]
    return dict(zip(NAMES, found.tolist(), strict=True))


def entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def naive(a: np.ndarray, at: Layout) -> dict[str, float]:
    """The definitions, entry by entry."""
    n, s, c = at.patches, at.special, int(at.class_token)
    rows = [[a[s + i, s + j] / sum(a[s + i, s:]) for j in range(n)] for i in range(n)]
    columns = at.grid[1]
    keys = [sum(rows[i][k] for i in range(n)) / n for k in range(n)]
    information = 0.0
    distance = 0.0
    for i in range(n):
        for k in range(n):
            if rows[i][k] > 0:
                information += rows[i][k] / n * math.log(rows[i][k] / keys[k])
            across = math.hypot(i // columns - k // columns, i % columns - k % columns)
            distance += rows[i][k] / n * across * at.patch_size
    bound = math.sqrt(math.log(n) * entropy(keys)) if n > 1 else 0.0
    found = {
        "patch_self": sum(rows[i][i] for i in range(n)) / n,
        "patch_entropy": sum(map(entropy, rows)) / n,
        "nmi": information / bound if bound > 0 else 0.0,
        "distance": distance,
        "distance_share": distance / math.sqrt(n) / at.patch_size,
    }
    if at.registers:
        found["patch_to_registers"] = sum(sum(a[s + i, c:s]) for i in range(n)) / n
    if at.class_token:
        found["class_to_class"] = a[0, 0]
        found["class_to_patches"] = sum(a[0, s:])
        found["class_entropy"] = entropy([x / sum(a[0, s:]) for x in a[0, s:]])
        found["patch_to_class"] = sum(a[s + i, 0] for i in range(n)) / n
        if at.registers:
            found["class_to_registers"] = sum(a[0, 1:s])
    return found


@pytest.mark.parametrize(
    ("class_token", "registers", "grid"),
    [(True, 0, (3, 4)), (True, 2, (4, 3)), (False, 3, (2, 5)), (False, 0, (3, 3)), (True, 1, (1, 1))],
)
@pytest.mark.parametrize("sharp", [0.1, 3.0, 30.0])
def test_statistics_are_those_of_a_loop(class_token, registers, grid, sharp) -> None:
    at = Layout(class_token, registers, grid, 8)
    tokens = at.special + at.patches
    logits = sharp * torch.randn(2, 3, tokens, tokens, generator=torch.Generator().manual_seed(0))
    weights = logits.double().softmax(dim=-1).numpy()
    parts = head_statistics(logits.clone(), at)
    for b in range(2):
        for h in range(3):
            expected = naive(weights[b, h], at)
            assert expected.keys() == set(NAMES) - missing(at, 1)
            for name, value in zip(NAMES, parts.statistics[b, h].tolist(), strict=True):
                if name not in expected:
                    assert math.isnan(value), name
                else:
                    assert value == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name
    rows = torch.from_numpy(weights)
    torch.testing.assert_close(
        parts.centre_rows.exp(), rows[:, :, at.special + at.centre], rtol=1e-5, atol=1e-7
    )
    if class_token:
        torch.testing.assert_close(parts.class_rows.exp(), rows[:, :, 0], rtol=1e-5, atol=1e-7)
    else:
        assert parts.class_rows is None


def test_three_tokens_by_hand() -> None:
    weights = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]])
    found = of(weights, Layout(True, 0, (1, 2), 16))
    assert found["class_to_class"] == pytest.approx(0.5)
    assert found["class_entropy"] == pytest.approx(0.50040, abs=5e-6)
    assert found["patch_self"] == pytest.approx(0.81944, abs=5e-6)
    assert found["patch_entropy"] == pytest.approx(0.45558, abs=5e-6)


@pytest.mark.parametrize("at", [Layout(True, 0, (14, 14), 16), Layout(True, 4, (16, 16), 14), PLAIN])
def test_uniform_attention_gives_the_uniform_values(at) -> None:
    tokens = at.special + at.patches
    parts = head_statistics(torch.full((1, 1, tokens, tokens), 0.3), at)
    for name, value in zip(NAMES, parts.statistics[0, 0].tolist(), strict=True):
        if name in missing(at, 1):
            continue
        tolerance = 1e-6 if "distance" in name or name == "patch_self" else 1e-12
        assert value == pytest.approx(HEAD_STATISTICS[name].reference(at).uniform, rel=tolerance, abs=1e-12)
    assert HEAD_STATISTICS["patch_entropy"].reference(PLAIN).uniform == pytest.approx(5.2781, abs=5e-5)


@pytest.mark.parametrize(
    ("grid", "patch", "pixels"), [((14, 14), 16, 116.492), ((16, 16), 14, 116.565), ((30, 30), 16, 250.138)]
)
def test_distances_of_the_published_grids(grid, patch, pixels) -> None:
    at = Layout(False, 0, grid, patch)
    assert HEAD_STATISTICS["distance"].reference(at).uniform == pytest.approx(pixels, abs=5e-4)
    if patch == 16 and grid == (14, 14):
        assert at.distances[0].mean().item() == pytest.approx(161.03, abs=5e-3)
        assert at.distances[7 * 14 + 7].mean().item() == pytest.approx(86.019, abs=5e-4)
        assert at.distances.max().item() == pytest.approx(294.156, abs=5e-4)
        assert at.centre == 6 * 14 + 6


def test_extreme_attention() -> None:
    """Identity, one key for all, two blocks, half identity and half uniform on 14 x 14; a toy of two."""
    n, eye = 196, torch.eye(196, dtype=torch.float64)
    identity = of(eye, PLAIN)
    assert (identity["nmi"], identity["distance"]) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert (identity["patch_entropy"], identity["patch_self"]) == pytest.approx((0.0, 1.0), abs=1e-12)
    common = torch.zeros(n, n)
    common[:, 17] = 1
    assert of(common, PLAIN)["nmi"] == 0
    half = torch.arange(n) < n // 2
    blocks = (half[:, None] == half[None]).double() / (n // 2)
    assert of(blocks, PLAIN)["nmi"] == pytest.approx(math.log(2) / math.log(n), abs=1e-6)
    assert math.log(2) / math.log(n) == pytest.approx(0.13132, abs=5e-6)
    assert of(eye / 2 + 0.5 / n, PLAIN)["nmi"] == pytest.approx(0.3717, abs=5e-5)
    toy = torch.tensor([[0.75, 0.25], [1 / 9, 8 / 9]], dtype=torch.float64)
    assert of(toy, Layout(False, 0, (1, 2), 16))["nmi"] == pytest.approx(0.33109, abs=1e-5)


def test_bounds_hold_for_any_attention() -> None:
    at = Layout(True, 2, (4, 5), 16)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = 10 ** (seed % 5 - 2) * torch.randn(3, 2, 23, 23, generator=generator)
        found = head_statistics(logits, at).statistics
        for i, name in enumerate(NAMES):
            if name != "head_divergence":
                _, low, high = HEAD_STATISTICS[name].reference(at)
                assert (found[..., i] >= low).all(), name
                assert (found[..., i] <= high * (1 + 1e-6)).all(), name


def test_what_must_not_matter() -> None:
    """A constant added to a row; order of keys for the information; a half turn for the distance."""
    at = Layout(True, 1, (5, 4), 16)
    logits = 3 * torch.randn(1, 2, 22, 22, generator=torch.Generator().manual_seed(3))
    plain = head_statistics(logits.clone(), at).statistics
    shift = torch.linspace(-5, 5, 22)[:, None]
    torch.testing.assert_close(
        head_statistics(logits + shift, at).statistics, plain, rtol=1e-4, atol=1e-5, equal_nan=True
    )
    order = torch.cat((torch.arange(2), 2 + torch.randperm(20, generator=torch.Generator().manual_seed(4))))
    nmi, distance = NAMES.index("nmi"), NAMES.index("distance")
    permuted = head_statistics(logits[..., order].clone(), at).statistics
    torch.testing.assert_close(permuted[..., nmi], plain[..., nmi], rtol=1e-5, atol=1e-6)
    turn = torch.cat((torch.arange(2), torch.arange(21, 1, -1)))
    turned = head_statistics(logits[..., turn, :][..., turn].clone(), at).statistics
    torch.testing.assert_close(turned[..., distance], plain[..., distance], rtol=1e-5, atol=1e-6)


def test_aggregation_vectors() -> None:
    at = Layout(True, 1, (2, 3), 8)
    rows = (
        torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(5)).double().mul(3).log_softmax(dim=-1)
    )
    a = rows.exp().numpy()
    mean = a.mean(axis=1)[:, 2:]
    mean /= mean.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mean_head(rows, at).exp().numpy(), mean, rtol=1e-12)
    shares = a[:, :, 2:] / a[:, :, 2:].sum(axis=2, keepdims=True)
    np.testing.assert_allclose(over_patches(rows, at).exp().numpy(), shares, rtol=1e-12)
    for b in range(4):
        every = [entropy(list(shares[b, h])) for h in range(3)]
        sharpest = sharpest_head(rows, at)[b].exp().numpy()
        np.testing.assert_allclose(sharpest, shares[b, int(np.argmin(every))], rtol=1e-12)
        # Entropy is concave, and heads count by what they read of the patches.
        assert entropy_of(mean_head(rows, at))[b].item() >= np.average(every, weights=a[b, :, 2:].sum(axis=1))


def test_divergences_are_scipys() -> None:
    log = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(6)).double().mul(4).log_softmax(dim=-1)
    found, p = divergences(log), log.exp().numpy()
    for b in range(2):
        for i in range(4):
            assert entropy_of(log)[b, i].item() == pytest.approx(scipy_entropy(p[b, i]))
            for j in range(4):
                assert found[b, i, j].item() == pytest.approx(scipy_entropy(p[b, i], p[b, j]), abs=1e-12)
    uniform = torch.full((1, 1, 9), -math.log(9), dtype=torch.float64)
    both = divergences(torch.cat((log[:1, :1], uniform), dim=1))
    assert both[0, 0, 1].item() == pytest.approx(math.log(9) - entropy_of(log)[0, 0].item())
    own = head_divergence(found)
    assert own[0, 1].item() == pytest.approx(sum(found[0, 1, j].item() for j in (0, 2, 3)) / 3)
    assert head_divergence(found[:, :1, :1]).isnan().all()


def test_norms_and_outliers() -> None:
    at = Layout(True, 2, (4, 4), 8)
    x = torch.randn(3, 19, 6, generator=torch.Generator().manual_seed(7))
    x[0, 3:] /= x[0, 3:].norm(dim=1, keepdim=True)  # all patches of norm 1 ...
    x[0, 5] *= 10  # ... but two
    x[0, 9] *= 1.9
    x[1, 3:] *= 100 / x[1, 3:].norm(dim=1, keepdim=True)
    found = norm_statistics(x, at, 5.0, 2.0, 50.0)
    norms = np.linalg.norm(x.double().numpy(), axis=2)
    patches = norms[:, 3:]
    middle = np.median(patches, axis=1, keepdims=True)
    spread = 1.4826 * np.median(abs(patches - middle), axis=1, keepdims=True)
    outlying = (patches > 2 * middle) & (patches > middle + 5 * spread)
    expected = {
        "class_norm": norms[:, 0],
        "register_norm": norms[:, 1:3].mean(axis=1),
        "patch_norm": patches.mean(axis=1),
        "patch_norm_max": patches.max(axis=1),
        "outliers": outlying.sum(axis=1),
        "outlier_share": outlying.mean(axis=1),
        "outlier_share_fixed": [0, 1, 0],
    }
    assert set(expected) == set(BLOCK_STATISTICS) - {"aggregation_entropy", "lowest_entropy"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-5)
    assert found["outliers"].tolist()[:2] == [1, 0]
    bare = norm_statistics(x, Layout(False, 0, (1, 19), 8), 5.0, 2.0, None)
    for name in ("class_norm", "register_norm", "outlier_share_fixed"):
        assert bare[name].isnan().all()
