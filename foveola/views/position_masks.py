"""Patches whose position is hidden from the student, in images whose contents are then shown whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from foveola.config import key
from foveola.views.tokens import MaskingConfig, block_masks, draw_masks, stratified_targets

BLOCK_SIZES = {"smallest": 4, "largest": 0.5}  # of shape=block, as DINOv2 masks contents


@dataclass(frozen=True)
class PositionMaskingConfig:
    """Defaults: the position field paper. Set `masking.probability` to 1 for its 50 : 50."""

    shape: Literal["cross", "block"] = key(
        "cross", "whole rows with whole columns, or rectangles as for contents (Table 5a)"
    )
    ratio: tuple[float, float] = key((0.1, 0.5), "fraction of a view's patches without position, from and to")
    share: float = key(
        0.5,
        "fraction of images whose positions are masked; `masking` is for the others (Table 5b)",
        at_least=0,
        at_most=1,
    )
    per_image: bool = key(True, "decide for all views of an image together, or for each view")

    def __post_init__(self) -> None:
        if not 0 <= self.ratio[0] <= self.ratio[1] < 1:
            raise ValueError("ratio: needs 0 <= low <= high < 1")


def draw_both(
    positions: PositionMaskingConfig,
    contents: MaskingConfig | None,
    batch: int,
    views: int,
    grid: tuple[int, int],
    streams: Callable[[str], torch.Generator],
) -> tuple[Bool[Tensor, "B V N"] | None, Bool[Tensor, "B V N"]]:
    """Return patches of global views without contents, and those without position; never both in a view.

    `share` x B images (or share x B V views) are drawn for position masks, rounded at random where that is
    no whole number. The contents of the others are masked as `contents` says, as if they were the batch. The
    first result is None without `contents`.
    """
    units, each = (batch, views) if positions.per_image else (batch * views, 1)
    choice = exact_fraction(positions.share, units, streams("position choice"))
    patches = grid[0] * grid[1]
    unplaced = torch.zeros(units, each, patches, dtype=torch.bool)
    drawn = position_masks(positions, int(choice.sum()) * each, grid, streams("position masks"))
    unplaced[choice] = drawn.view(-1, each, patches)
    masked = None
    if contents is not None:
        masked = torch.zeros_like(unplaced)
        rest = units - int(choice.sum())
        masked[~choice] = draw_masks(contents, rest, each, grid, streams("masks"))
        masked = masked.view(batch, views, patches)
    return masked, unplaced.view(batch, views, patches)


def exact_fraction(fraction: float, count: int, generator: torch.Generator) -> Bool[Tensor, "n"]:
    """Return which of `count` units are chosen.

    They are `fraction` x count, exactly where that is whole, else one more by chance: the mean is right.
    """
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    chosen = int(fraction * count + uniform)
    return torch.randperm(count, generator=generator) < chosen


def position_masks(
    config: PositionMaskingConfig, views: int, grid: tuple[int, int], generator: torch.Generator
) -> Bool[Tensor, "n N"]:
    """Return masks of n views with ratios spread evenly over the range, in random order (as DINOv2 deals
    out).
    """
    patches = grid[0] * grid[1]
    dealt = MaskingConfig(probability=1.0, ratio=config.ratio, stratified=True)
    targets = stratified_targets(dealt, views, patches, generator)
    if config.shape == "cross":
        return cross_masks(targets.long(), grid, generator)
    return block_masks(targets / patches, grid, generator, BLOCK_SIZES["smallest"], BLOCK_SIZES["largest"])


def cross_masks(
    targets: Int64[Tensor, "n"], grid: tuple[int, int], generator: torch.Generator
) -> Bool[Tensor, "n N"]:
    """Mask crosses until exactly `targets` [n] patches of each view are masked.

    The centre of a cross is uniform among the patches that are not masked yet; it takes their whole row and
    column. Of what the last cross adds to the others, as many random patches stay out as are too many. (The
    paper shows crosses, Figure 4, and does not say how they are drawn.) All views are drawn side by side.
    """
    rows, columns = grid
    patches = rows * columns
    row, column = torch.arange(patches) // columns, torch.arange(patches) % columns
    mask = torch.zeros(len(targets), patches, dtype=torch.bool)
    active = (targets > 0).nonzero()[:, 0]
    while len(active):
        uniform = torch.rand(2, len(active), patches, generator=generator)
        centre = uniform[0].masked_fill(mask[active], -1).argmax(dim=1, keepdim=True)
        cross = (row == row[centre]) | (column == column[centre])
        new = cross & ~mask[active]
        missing = (targets - mask.sum(dim=1))[active]
        # The first `missing` of the new ones in random order.
        rank = uniform[1].masked_fill(~new, 2).argsort(dim=1).argsort(dim=1)
        mask[active] |= new & (rank < missing[:, None])
        active = active[mask[active].sum(dim=1) < targets[active]]
    return mask
