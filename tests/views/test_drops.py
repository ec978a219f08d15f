"""Dropped patches: counts, rectangles around the torus, and what each place sees of them."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from foveola.views.batch import ViewsConfig
from foveola.views.tokens import DroppingConfig, draw_drops


def drops(views: int, grid: tuple[int, int] = (16, 16), seed: int = 0, **settings):
    keep, predict = draw_drops(DroppingConfig(**settings), views, grid, torch.Generator().manual_seed(seed))
    kept = torch.zeros(views, grid[0] * grid[1], dtype=torch.bool).scatter_(1, keep, True)
    return keep, predict, kept.view(views, *grid)


@pytest.mark.parametrize(("side", "kept", "predicted"), [(16, 90, 8), (14, 69, 6)])
def test_published_counts(side, kept, predicted):
    """CAPI: 224 pixels with patches of 14 and 16."""
    keep, predict, _ = drops(500, (side, side))
    assert keep.shape == (500, kept)
    assert predict.shape == (500, predicted)


@pytest.mark.parametrize("shape", ["inverse_block", "block", "random"])
@pytest.mark.parametrize("roll", [True, False])
@pytest.mark.parametrize("grid", [(16, 16), (7, 5), (4, 9)])
@pytest.mark.parametrize("ratio", [0.1, 0.65, 0.9])
def test_kept_and_predicted_are_disjoint_sets(shape, roll, grid, ratio):
    keep, predict, kept = drops(200, grid, shape=shape, roll=roll, ratio=ratio, predict=1.0)
    assert (keep.diff(dim=1) > 0).all()  # ascending, so no patch twice
    count = grid[0] * grid[1]
    assert (kept.flatten(1).sum(dim=1) == count - int(ratio * count)).all()
    everything = torch.cat((keep, predict), dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(count).expand(200, -1))


def is_truncated_rectangle(mask: np.ndarray) -> bool:
    """Whole rows of one width, and a last row that may be a beginning of one, or whole rows missing."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    last = inside[-1]
    return bool(inside[:-1].all() and last[: last.sum()].all())


def test_unrolled_drops_are_rectangles():
    _, _, kept = drops(300, roll=False)
    assert all(is_truncated_rectangle(mask.numpy()) for mask in kept)
    _, _, kept = drops(300, roll=False, shape="block")
    assert all(is_truncated_rectangle(~mask.numpy()) for mask in kept)
    heights = kept.logical_not().any(2).sum(1)
    assert heights.float().std() > 1


def test_rolled_drops_are_rectangles_on_the_torus():
    _, _, kept = drops(200)
    for mask in kept.numpy():
        shifts = (np.roll(mask, (y, x), (0, 1)) for y in range(16) for x in range(16))
        assert any(is_truncated_rectangle(shifted) for shifted in shifts)


def test_rolled_drops_hit_every_place_alike():
    """20,000 draws: each cell within four deviations, and chi-square of corner against centre."""
    _, _, kept = drops(20_000)
    share = kept.double().mean(dim=0)
    assert (share - 90 / 256).abs().max() < 0.015
    # A cell is kept in 20,000 p draws +- sqrt(20,000 p q): independent over draws.
    p = 90 / 256
    for cells in (share[0], share[:, 0], share.diagonal()):
        seen = 20_000 * cells
        statistic = ((seen - 20_000 * p) ** 2 / (20_000 * p * (1 - p))).numpy()
        assert statistic.max() < 16  # four standard deviations
    corner = kept[:, 0, 0].long() * 2 + kept[:, 8, 8].long()
    counts = np.bincount(corner.numpy(), minlength=4)
    assert chisquare([counts[2], counts[1]]).pvalue > 1e-3  # the corner as often as the centre
    _, _, unrolled = drops(5000, roll=False)
    places = unrolled.double().mean(dim=0)
    assert places[0, 0] < 0.06  # facts: 0.03
    assert places[8, 8] > 0.8  # 0.86


def test_predicted_patches_are_uniform_among_the_dropped():
    _, predict, _ = drops(20_000, (4, 4), shape="random", ratio=0.5, predict=0.25)
    assert predict.shape[1] == 2
    counts = np.bincount(predict.flatten().numpy(), minlength=16)
    assert chisquare(counts).pvalue > 1e-3
    firsts = np.bincount(predict[:, 0].numpy(), minlength=16)
    assert chisquare(firsts).pvalue > 1e-3  # in random order


def test_draws_differ_between_views_and_follow_the_seed():
    one, other, again = (drops(50, seed=s)[0] for s in (0, 1, 0))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one.unique(dim=0)) > 45


def test_views_without_kept_or_dropped_patches_are_refused():
    def check(size: int, ratio: float) -> None:
        ViewsConfig(global_size=size, local_count=0, dropping=DroppingConfig(ratio=ratio)).check(16)

    with pytest.raises(ValueError, match=r"views\.dropping\.ratio=0\.99: no patch is dropped of the 1"):
        check(16, 0.99)
    with pytest.raises(ValueError, match=r"views\.dropping\.ratio=0\.1: no patch is dropped of the 4"):
        check(32, 0.1)
    check(32, 0.75)
