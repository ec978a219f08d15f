"""Context and target blocks: rectangles, disjoint, as many for every view; what either sampler reaches."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torch import Tensor

from foveola.config import ConfigError, build
from foveola.views.batch import Streams, ViewsConfig, make_views
from foveola.views.blocks import BlocksConfig, draw_blocks
from foveola.views.tokens import DroppingConfig


def draw(views: int, side: int = 14, seed: int = 0, **settings) -> tuple[Tensor, Tensor]:
    config = BlocksConfig(**settings)
    if seed == 0:
        config.check((side, side))
    return draw_blocks(config, views, (side, side), torch.Generator().manual_seed(seed))


def as_masks(indices: Tensor, patches: int) -> Tensor:
    return torch.zeros(len(indices), patches, dtype=torch.bool).scatter_(1, indices, True)


def corners(cells: list[int], columns: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of cells that must be a whole rectangle, row-major."""
    rows = sorted({cell // columns for cell in cells})
    across = sorted({cell % columns for cell in cells})
    assert cells == [row * columns + column for row in rows for column in across]
    assert rows == list(range(rows[0], rows[0] + len(rows)))
    assert across == list(range(across[0], across[0] + len(across)))
    return rows[0], across[0], len(rows), len(across)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("side", [8, 14, 16])
def test_targets_are_equal_rectangles_and_never_context(published, side):
    settings = {"published": published, "min_context": 6 if side == 8 else 10}
    for seed in range(20):
        keep, predict = draw(64, side, seed, **settings)
        assert (keep.diff(dim=1) > 0).all()  # ascending, so no patch twice
        blocks = predict.view(64, 4, -1)
        shapes = {corners(block.tolist(), side)[2:] for view in blocks for block in view}
        assert len(shapes) == 1  # one size for the whole batch
        ((height, width),) = shapes
        assert int(0.15 * side**2) * 0.8 <= height * width <= int(0.2 * side**2) * 1.2
        assert 0.5 <= height / width <= 2
        assert not (as_masks(keep, side**2) & as_masks(predict, side**2)).any()
        assert keep.shape[1] > settings["min_context"]


def test_sizes_by_hand():
    """14 x 14: 0.15 and 0.2 of 196 are 29 and 39 patches, 0.85 is 166 and 1 all of them."""
    grid = (14, 14)
    fixed, published = BlocksConfig(), BlocksConfig(published=True)
    assert fixed.sizes(grid, 0.0, 0.0, 0.0) == (
        (5, 6),
        (13, 13),
    )  # sqrt(29 * .75) = 4.66, sqrt(29 / .75) = 6.2
    assert fixed.sizes(grid, 1.0, 1.0, 1.0) == ((8, 5), (14, 14))  # sqrt(39 * 1.5) = 7.6, sqrt(26) = 5.1
    assert published.sizes(grid, 1.0, 1.0, 1.0) == ((8, 5), (13, 13))  # always smaller than the grid
    assert fixed.sizes((16, 16), 1.0, 1.0, 0.0) == ((9, 6), (15, 15))
    assert published.sizes((6, 4), 0.0, 0.0, 1.0)[1] == (5, 3)


def test_the_published_sampler_ties_the_shape_to_the_size():
    """One random number for both: only shapes on one path; put right, sizes and aspects vary freely."""
    path = set()
    for step in range(1001):
        area, aspect = int(256 * (0.15 + 0.05 * step / 1000)), 0.75 + 0.75 * step / 1000
        path.add((round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))))
    for published in (True, False):
        shapes = set()
        for seed in range(150):
            _, predict = draw(1, 16, seed, published=published)
            shapes.add(corners(predict.view(1, 4, -1)[0, 0].tolist(), 16)[2:])
        assert (shapes <= path) == published
        assert len(shapes) > 4


# -- places ------------------------------------------------------------------------------------------------


def test_corners_of_blocks_are_uniform_over_all_places():
    """A block of 6 x 6 has 9 tops and 9 lefts on 14 x 14, the last included; the published code 8."""
    exact = {"target_scale": (36 / 196 + 1e-6, 36 / 196 + 1e-6), "target_aspect": (1.0, 1.0)}
    for published, places in ((False, 9), (True, 8)):
        _, predict = draw(4000, published=published, min_context=1, **exact)
        first = predict.view(4000, 4, 36)[:, 1, 0]
        for at in (first // 14, first % 14):
            counts = np.bincount(at.numpy(), minlength=9)
            assert chisquare(counts[:places]).pvalue > 1e-3
            assert counts[places:].sum() == 0
        pairs = np.bincount((first // 14 * places + first % 14).numpy(), minlength=places**2)
        assert chisquare(pairs).pvalue > 1e-3  # and independent


def reach(side: int, published: bool, batches: int = 60, views: int = 64) -> tuple[Tensor, Tensor]:
    """How often each cell was context and target, over batches."""
    context, targets = torch.zeros(side**2), torch.zeros(side**2)
    for seed in range(batches):
        keep, predict = draw(views, side, seed, published=published)
        context += as_masks(keep, side**2).sum(dim=0)
        targets += as_masks(predict, side**2).sum(dim=0)
    return context.view(side, side), targets.view(side, side)


def test_what_either_sampler_reaches():
    """The published one leaves the last row and column out and starves the bottom; put right, neither."""
    context, targets = reach(14, published=True)
    for seen in (context, targets):
        assert seen[-1].sum() == seen[:, -1].sum() == 0
        assert (seen[:-1, :-1] > 0).all()
    rows = context.sum(dim=1) / context[0].sum()
    assert rows[0] == 1
    assert rows[12] < 0.1  # cut off, as contexts are cut at their end

    context, targets = reach(14, published=False)
    assert (context > 0).all()
    assert (targets > 0).all()
    for seen in (context, targets):
        for at in (0, 1):
            lines = seen.sum(dim=1 - at)
            # The sampler knows no direction: opposite rows, and columns, are as frequent. Cells of a row are
            # drawn together, which the tolerance allows for.
            assert ((lines - lines.flip(0)).abs() / lines).max() < 0.1
    assert context.sum(dim=1)[[0, -1]].min() / context.sum(dim=1).max() > 0.3


def test_every_row_is_a_target_as_often_as_arithmetic_says():
    """One target of 6 x 6: row r is covered by the tops r - 5 ... r within 0 ... 8; chi-square over rows."""
    exact = {"target_scale": (36 / 196 + 1e-6, 36 / 196 + 1e-6), "target_aspect": (1.0, 1.0)}
    _, predict = draw(6000, targets=1, **exact)
    tops = predict[:, 0] // 14
    share = [sum(1 for top in range(9) if top <= row <= top + 5) / 9 for row in range(14)]
    for row in (0, 1, 6, 12, 13):
        covered = int(((tops <= row) & (row <= tops + 5)).sum())
        assert (
            chisquare([covered, 6000 - covered], [6000 * share[row], 6000 * (1 - share[row])]).pvalue > 1e-3
        )


def naive_published(side: int, rng: random.Random) -> tuple[int, int]:
    """(patches of the context, of the union of targets) of one image on its own, as the facts tell it."""
    u = rng.random()
    area, aspect = int(side * side * (0.15 + 0.05 * u)), 0.75 + 0.75 * u
    h, w = (min(round(math.sqrt(v)), side - 1) for v in (area * aspect, area / aspect))
    around = min(round(math.sqrt(int(side * side * (0.85 + 0.15 * rng.random())))), side - 1)

    def cells(height: int, width: int) -> set[int]:
        top, left = rng.randrange(side - height), rng.randrange(side - width)
        return {y * side + x for y in range(top, top + height) for x in range(left, left + width)}

    targets = [cells(h, w) for _ in range(4)]
    avoided = 4
    while True:
        for _ in range(20):
            context = cells(around, around) - set().union(*targets[:avoided])
            if len(context) > 10:
                return len(context), len(set().union(*targets))
        avoided -= 1


@pytest.mark.parametrize("side", [8, 14])
def test_the_published_sampler_has_the_sizes_of_a_naive_one(side):
    """Views on their own, so nothing is cut: Kolmogorov-Smirnov on contexts and on unions of targets."""
    rng = random.Random(0)
    naive = [naive_published(side, rng) for _ in range(1200)]
    ours = []
    for seed in range(1200):
        keep, predict = draw(1, side, seed, published=True)
        ours.append((keep.shape[1], len(set(predict[0].tolist()))))
    for column in range(2):
        assert ks_2samp([n[column] for n in naive], [o[column] for o in ours]).pvalue > 1e-3


def test_contexts_are_cut_to_the_smallest_of_the_batch():
    """14 x 14 at 128 views: about 80 patches each, of which 50 are left (facts of the published sampler)."""
    alone = [draw(1, 14, seed, published=True)[0].shape[1] for seed in range(300)]
    together = [draw(128, 14, seed, published=True)[0].shape[1] for seed in range(60)]
    assert 79 < np.mean(alone) < 85
    assert 44 < np.mean(together) < 54


@pytest.mark.parametrize(("published", "least"), [(True, 20), (False, 28)])
def test_views_with_too_little_context_are_drawn_again(published, least):
    """Four of ten first draws leave no more than that of 64 patches."""
    first = [draw(1, 8, seed, published=published, min_context=0)[0].shape[1] <= least for seed in range(200)]
    assert 0.3 < np.mean(first) < 0.55
    for seed in range(10):
        keep, predict = draw(200, 8, seed, published=published, min_context=least)
        assert keep.shape[1] > least
        overlap = (as_masks(keep, 64) & as_masks(predict, 64)).any(dim=1).float().mean()
        # Only the published code gives up a target, and only where it must.
        assert 0.1 < overlap < 0.8 if published else overlap == 0


def test_the_last_resort_puts_targets_on_top_of_each_other():
    """A context above what four apart would leave: the sampler ends, disjoint, with blocks that coincide."""
    keep, predict = draw(50, 8, min_context=36)
    blocks = predict.view(50, 4, -1)
    assert keep.shape[1] > 36
    assert not (as_masks(keep, 64) & as_masks(predict, 64)).any()
    assert (blocks[:, 3] == blocks[:, 0]).all(dim=1).any()


# -- in a batch --------------------------------------------------------------------------------------------


def test_a_batch_holds_context_and_targets(canvases):
    images = canvases([[None]] * 6, size=64)
    views = ViewsConfig(global_size=64, global_count=2, local_count=0, blocks=BlocksConfig(min_context=6))
    views.check(8)
    batch, again, later = (make_views(images, views, 8, Streams(0, step)) for step in (3, 3, 4))
    assert batch.large.selection.kept is not None
    assert batch.large.selection.predicted is not None
    assert batch.large.selection.kept.shape[:2] == batch.large.selection.predicted.shape[:2] == (6, 2)
    assert batch.facts["blocks/context"].item() == batch.large.selection.kept.shape[2]
    assert batch.facts["blocks/target"].item() == batch.large.selection.predicted.shape[2] / 4
    assert torch.equal(batch.large.selection.kept, again.large.selection.kept)
    assert torch.equal(batch.large.selection.predicted, again.large.selection.predicted)
    assert batch.large.selection.predicted.shape != later.large.selection.predicted.shape or not torch.equal(
        batch.large.selection.predicted, later.large.selection.predicted
    )
    plain = make_views(images, ViewsConfig(global_size=64, global_count=2, local_count=0), 8, Streams(0, 3))
    assert torch.equal(plain.large.pixels, batch.large.pixels)  # streams of their own


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"blocks": {"target_scale": [0.3, 0.2]}}, r"blocks: target_scale: needs low <= high"),
        ({"blocks": {"target_scale": [0.0, 0.2]}}, r"blocks.target_scale\[0\]: must be > 0"),
        ({"blocks": {"targets": 0}}, r"blocks.targets: must be >= 1"),
        ({"blocks": {}, "dropping": {}}, "dropping and blocks both choose"),
        ({"blocks": {"min_contxt": 1}}, "did you mean 'blocks.min_context'"),
    ],
)
def test_mistakes_are_refused(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(ViewsConfig, tree)


def test_grids_without_room_are_refused():
    def check(side: int, **settings) -> None:
        ViewsConfig(global_size=16 * side, local_count=0, blocks=BlocksConfig(**settings)).check(16)

    with pytest.raises(ValueError, match=r"views\.blocks\.target_scale=0\.15: a block of a 2 x 2 grid would"):
        check(2)
    with pytest.raises(ValueError, match=r"views\.blocks\.min_context=10: of a 3 x 3 grid only 8 .*try 7"):
        check(3)
    check(3, min_context=7)
    check(14)
    assert DroppingConfig().counts(196) == (69, 6)
