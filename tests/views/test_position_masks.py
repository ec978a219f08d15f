"""Position masks: crosses, their sizes, and never with content masks in one image."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveola.data.sample import Canvases
from foveola.views.batch import Batch, Streams, ViewsConfig, make_views
from foveola.views.color import ColorConfig
from foveola.views.position_masks import (
    PositionMaskingConfig,
    cross_masks,
    draw_both,
    exact_fraction,
    position_masks,
)
from foveola.views.tokens import MaskingConfig, draw_masks

Make = Callable[..., Canvases]
Flat = Callable[[Batch], dict[str, Tensor]]
GRID = (14, 14)
FULL = MaskingConfig(probability=1.0, stratified=True, smallest_block=4, largest_block=0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_cross_wise(mask: Tensor) -> bool:
    """Whether a mask is whole crosses and a part of one more; [rows, columns]."""
    rows, columns = mask.all(dim=1), mask.all(dim=0)
    rest = mask & ~(rows[:, None] | columns[None])
    # What is left lies in one row and one column, unless these are among the whole ones.
    cells = rest.nonzero()
    return any(
        all(r == a or c == b for r, c in cells.tolist())
        for a in range(mask.shape[0])
        for b in range(mask.shape[1])
    )


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (6, 9), (2, 2)])
def test_crosses_have_exactly_as_many_patches_as_asked(grid: tuple[int, int]):
    patches = grid[0] * grid[1]
    targets = torch.arange(0, patches, max(patches // 60, 1))
    masks = cross_masks(targets, grid, generator())
    assert torch.equal(masks.sum(dim=1), targets)
    assert all(is_cross_wise(mask.view(grid)) for mask in masks[: len(masks) // 2])


def test_one_cross_is_a_row_and_a_column():
    masks = cross_masks(torch.full((400,), 27), GRID, generator()).view(-1, *GRID)
    assert (masks.all(dim=2).sum(dim=1) == 1).all()
    assert (masks.all(dim=1).sum(dim=1) == 1).all()
    # Its centre is uniform: each row about 400 / 14 times.
    counts = masks.all(dim=2).sum(dim=0)
    assert 10 <= int(counts.min()) <= int(counts.max()) <= 52


def test_of_a_cut_cross_random_patches_stay_out():
    masks = cross_masks(torch.full((2000,), 20), GRID, generator()).view(-1, *GRID).float()
    # A cross of 27 less 7 at random: no place is favoured, so that none is seldom or often masked.
    share = masks.mean(dim=0)
    expected = 20 / 196
    assert float((share - expected).abs().max()) < 5 * (expected * (1 - expected) / 2000) ** 0.5


@pytest.mark.parametrize("shape", ["cross", "block"])
def test_ratios_stay_in_their_range_and_are_spread_over_it(shape: str):
    config = PositionMaskingConfig(shape=shape)
    masks = position_masks(config, 200, GRID, generator())
    counts = masks.sum(dim=1)
    assert int(counts.max()) <= 0.5 * 196
    if shape == "block":  # ends slightly below, as masks of contents do
        assert int(counts.min()) >= 0.05 * 196
        return
    ordered = counts.sort().values
    edges = torch.linspace(0.1, 0.5, 201, dtype=torch.float64) * 196
    for k in range(200):  # int(ratio N) with one ratio in each of 200 equal intervals
        assert int(edges[k]) <= int(ordered[k]) <= int(edges[k + 1])
    assert not torch.equal(counts, ordered)  # dealt out in random order


def test_the_choice_is_exact_on_average():
    assert [int(exact_fraction(0.5, 8, generator(s)).sum()) for s in range(20)] == [4] * 20
    odd = torch.tensor([float(exact_fraction(0.5, 3, generator(s)).sum()) for s in range(2000)])
    assert set(odd.tolist()) == {1.0, 2.0}
    assert float(odd.mean()) == pytest.approx(1.5, abs=0.05)
    assert not exact_fraction(0.0, 5, generator()).any()
    assert exact_fraction(1.0, 5, generator()).all()
    assert sum(exact_fraction(0.5, 4, generator(s)).float() for s in range(1000)).sub(500).abs().max() < 80


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("contents", [FULL, MaskingConfig(probability=1.0), MaskingConfig()])
def test_contents_or_positions_never_both(per_image: bool, share: float, contents: MaskingConfig):
    config = PositionMaskingConfig(share=share, per_image=per_image)
    masked, unplaced = draw_both(config, contents, 8, 2, GRID, Streams(0, 0))
    assert masked.shape == unplaced.shape == (8, 2, 196)
    without, hidden = unplaced.any(dim=2), masked.any(dim=2)
    if per_image:
        without, hidden = without.any(dim=1), hidden.any(dim=1)
    assert not (without & hidden).any()
    assert int(without.sum()) == share * without.numel()
    if contents.probability == 1:
        assert (without | hidden).all()


def test_the_rest_is_masked_as_if_it_were_the_batch():
    masked, unplaced = draw_both(PositionMaskingConfig(), FULL, 8, 2, GRID, Streams(1, 2))
    rest = ~unplaced.any(dim=2).any(dim=1)
    expected = draw_masks(FULL, 4, 2, GRID, Streams(1, 2)("masks"))
    assert torch.equal(masked[rest], expected)
    masked, _ = draw_both(PositionMaskingConfig(share=0.0), FULL, 8, 2, GRID, Streams(1, 2))
    assert torch.equal(masked, draw_masks(FULL, 8, 2, GRID, Streams(1, 2)("masks")))


@pytest.mark.parametrize("wrong", [(0.5, 0.1), (0.2, 1.0), (-0.1, 0.5)])
def test_impossible_ratios_are_refused(wrong: tuple[float, float]):
    with pytest.raises(ValueError, match="ratio: needs 0 <= low <= high < 1"):
        PositionMaskingConfig(ratio=wrong)


# -- in a batch ----------------------------------------------------------------------------------------------

VIEWS = ViewsConfig(
    global_size=32, local_size=16, local_count=3, color=ColorConfig(), masking=replace(FULL, local=True)
)


def test_batches_have_masks_and_their_indices(canvases: Make):
    made = canvases([[None]] * 8)
    batch = make_views(made, replace(VIEWS, position_masking=PositionMaskingConfig()), 4, Streams(0, 0))
    assert batch.large.hidden_positions.mask.shape == batch.large.hidden_contents.mask.shape == (8, 2, 64)
    for mask, indices in (
        (batch.large.hidden_contents.mask, batch.large.hidden_contents.indices),
        (batch.large.hidden_positions.mask, batch.large.hidden_positions.indices),
    ):
        assert torch.equal(indices, mask.flatten().nonzero()[:, 0])
    positions, contents = (
        m.any(dim=2).any(dim=1) for m in (batch.large.hidden_positions.mask, batch.large.hidden_contents.mask)
    )
    assert int(positions.sum()) == int(contents.sum()) == 4
    assert not (positions & contents).any()
    # Local views of an image whose positions are masked keep their contents.
    assert torch.equal(batch.small.hidden_contents.mask.any(dim=2).any(dim=1), contents)


def test_masks_change_nothing_else(canvases: Make, tensors: Flat):
    made = canvases([[None]] * 8)
    before = make_views(made, VIEWS, 4, Streams(0, 0))
    after = make_views(made, replace(VIEWS, position_masking=PositionMaskingConfig()), 4, Streams(0, 0))
    nobody = make_views(
        made, replace(VIEWS, position_masking=PositionMaskingConfig(share=0.0)), 4, Streams(0, 0)
    )
    assert before.large.hidden_positions is None
    assert not nobody.large.hidden_positions.mask.any()
    assert len(tensors(before)) > 10
    for name, value in tensors(before).items():
        assert torch.equal(value, tensors(nobody)[name]), name
        if "hidden" not in name:
            assert torch.equal(value, tensors(after)[name]), name


def test_positions_alone_may_be_masked(canvases: Make):
    made = canvases([[None]] * 4)
    config = replace(VIEWS, masking=None, position_masking=PositionMaskingConfig(share=1.0))
    batch = make_views(made, config, 4, Streams(0, 0))
    assert batch.large.hidden_contents is None
    assert batch.large.hidden_positions.mask.any(dim=2).all()
