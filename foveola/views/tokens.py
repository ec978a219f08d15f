"""Which tokens a network does not see: replaced by mask tokens (iBOT, DINOv2), or dropped (CAPI).

Masks are boolean over the patch grid, True = replaced by the mask token and to be predicted. Drops are
indices of the patches that are kept and of those to predict, as many for every view, so that they stack. Both
are drawn for all views of a batch together, on the CPU.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foveola.config import key

ASPECT = 0.3  # blocks have height / width in [0.3, 1 / 0.3]
MASK_TRIES = 10


@dataclass(frozen=True)
class MaskingConfig:
    """Defaults: iBOT and ODIS, whose code draws each view's ratio on its own."""

    shape: Literal["block", "random"] = key("block", "rectangles (iBOT) or single patches, spread uniformly")
    probability: float = key(0.5, "fraction of global views that are masked at all", at_least=0, at_most=1)
    ratio: tuple[float, float] = key((0.1, 0.5), "masked fraction of a masked view is uniform in this range")
    per_image: bool = key(
        False, "decide once for all views of an image (the iBOT paper's text) whether to mask"
    )
    local: bool = key(False, "mask local views as well (ODIS Table 5, PMLC)")
    stratified: bool = key(
        False,
        "mask exactly this fraction of the views of a batch, with ratios spread evenly (DINOv2)",
    )
    smallest_block: int | None = key(
        None, "least patches asked of a block (DINOv2: 4); null = (shorter side // 3)^2", at_least=1
    )
    largest_block: float = key(
        1.0, "largest block, as a fraction of all patches (DINOv2: 0.5)", above=0, at_most=1
    )

    def __post_init__(self) -> None:
        if not 0 <= self.ratio[0] <= self.ratio[1] < 1:
            raise ValueError("ratio: needs 0 <= low <= high < 1")
        if self.stratified and self.per_image:
            raise ValueError("stratified masks are dealt out over all views: per_image=false")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        if self.shape == "block":
            return {}
        return dict.fromkeys(("smallest_block", "largest_block"), "shape=random has no blocks")


def draw_masks(
    config: MaskingConfig, batch: int, views: int, grid: tuple[int, int], generator: torch.Generator
) -> Bool[Tensor, "B V N"]:
    """Return masks for `views` views of each of `batch` images over a (rows, columns) patch grid."""
    patches = grid[0] * grid[1]
    if config.stratified:
        targets = stratified_targets(config, batch * views, patches, generator)
    else:
        low, high = config.ratio
        coin = torch.rand(batch, 1 if config.per_image else views, generator=generator)
        ratios = low + (high - low) * torch.rand(batch, views, generator=generator)
        targets = torch.where(coin < config.probability, ratios, 0.0).flatten() * patches
    if config.shape == "random":
        masks = _spread(targets, patches, generator)
    else:
        masks = _grow(targets, grid, generator, config.smallest_block, config.largest_block * patches)
    return masks.view(batch, views, patches)


def stratified_targets(
    config: MaskingConfig, views: int, patches: int, generator: torch.Generator
) -> Float[Tensor, "n"]:
    """Return whole numbers of patches to mask in each view, 0 for views left alone (DINOv2's collate
    function).

    m = int(probability * views) views are masked. The range of ratios is cut into m equal intervals, each
    gives one ratio, uniform in it; int(ratio * patches) each, shuffled over the views. So every batch has
    exactly m masked views and almost the same number of masked patches. The batch is what a process takes at
    once.
    """
    count = int(config.probability * views)
    low, high = config.ratio
    edges = torch.linspace(low, high, count + 1, dtype=torch.float64)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    ratios = edges[:-1] + (edges[1:] - edges[:-1]) * uniform
    targets = torch.zeros(views)
    targets[:count] = (ratios * patches).floor().float()
    return targets[torch.randperm(views, generator=generator)]


def random_masks(
    ratios: Float[Tensor, "n"], grid: tuple[int, int], generator: torch.Generator
) -> Bool[Tensor, "n N"]:
    """Return exactly int(ratio * N) patches of each view, uniformly at random."""
    return _spread(ratios * (grid[0] * grid[1]), grid[0] * grid[1], generator)


def _spread(targets: Float[Tensor, "n"], patches: int, generator: torch.Generator) -> Bool[Tensor, "n N"]:
    rank = torch.rand(len(targets), patches, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank < targets.long()[:, None]


def block_masks(
    ratios: Float[Tensor, "n"],
    grid: tuple[int, int],
    generator: torch.Generator,
    smallest: int | None = None,
    largest: float = 1.0,
) -> Bool[Tensor, "n N"]:
    """Return unions of rectangles that never exceed ratio * N patches and end slightly below (facts of iBOT's
    code).

    A block's area is uniform between `smallest` and what is still missing, its aspect log-uniform in [0.3,
    1/0.3]. It is placed if it is smaller than the grid and adds at least one and at most the missing number
    of patches; after ten failures in a row a mask is left as it is. All masks are grown side by side.

    Args:
        smallest: least area asked for, in patches; default (shorter side // 3)^2, 16 for a 14 x 14 grid.
            DINOv2: 4.
        largest: bound of what counts as missing, so of a block, as a fraction of N. DINOv2: 0.5.
    """
    patches = grid[0] * grid[1]
    return _grow(ratios * patches, grid, generator, smallest, largest * patches)


def _grow(
    target: Float[Tensor, "n"],
    grid: tuple[int, int],
    generator: torch.Generator,
    smallest: int | None,
    largest: float,
) -> Bool[Tensor, "n N"]:
    rows, columns = grid
    smallest = (min(grid) // 3) ** 2 if smallest is None else smallest
    mask = torch.zeros(len(target), rows, columns, dtype=torch.bool)
    count = torch.zeros(len(target))
    failures = torch.zeros(len(target), dtype=torch.long)
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    bound = -torch.log(torch.tensor(ASPECT))
    active = (count < target).nonzero()[:, 0]
    while len(active):
        uniform = torch.rand(4, len(active), generator=generator)
        room = (target[active] - count[active]).clamp(max=largest)
        area = smallest + (room - smallest) * uniform[0]  # the range may be reversed: still between both
        aspect = torch.exp(bound * (2 * uniform[1] - 1))
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (height < rows) & (width < columns)
        top = (uniform[2] * (rows - height + 1)).floor().clamp(min=0)
        left = (uniform[3] * (columns - width + 1)).floor().clamp(min=0)
        top, left, height, width = (t[:, None, None] for t in (top, left, height, width))
        block = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        new = (block & ~mask[active]).sum(dim=(1, 2))
        placed = fits & (new > 0) & (new <= room)
        mask[active] |= block & placed[:, None, None]
        count[active] += torch.where(placed, new, 0)
        failures[active] = torch.where(placed, 0, failures[active] + 1)
        active = active[(count[active] < target[active]) & (failures[active] < MASK_TRIES)]
    return mask.flatten(1)


@dataclass(frozen=True)
class DroppingConfig:
    """Patches that the encoder never gets. Defaults: CAPI."""

    shape: Literal["inverse_block", "block", "random"] = key(
        "inverse_block", "keep a rectangle, drop a rectangle, or drop patches spread uniformly"
    )
    ratio: float = key(0.65, "fraction of patches that are dropped", above=0, below=1)
    roll: bool = key(
        True, "shift rectangles around the torus, so that all positions are dropped alike (CAPI, Table 1b)"
    )
    predict: float = key(0.05, "fraction of the dropped patches that are predicted", above=0, at_most=1)

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        return {"roll": "shape=random has no rectangles"} if self.shape == "random" else {}

    def counts(self, patches: int) -> tuple[int, int]:
        """Return (kept, predicted) patches of a view. Raises ValueError where nothing would be dropped or
        kept.
        """
        dropped = int(self.ratio * patches)
        if not 0 < dropped < patches:
            what = "no patch is dropped" if not dropped else "no patch is kept"
            raise ValueError(f"dropping.ratio={self.ratio}: {what} of the {patches} of a view")
        return patches - dropped, max(int(self.predict * dropped), 1)


def draw_drops(
    config: DroppingConfig, views: int, grid: tuple[int, int], generator: torch.Generator
) -> tuple[Int64[Tensor, "n K"], Int64[Tensor, "n P"]]:
    """Return indices of the kept and of the predicted patches of n views, ascending and in random order."""
    patches = grid[0] * grid[1]
    kept, predicted = config.counts(patches)
    if config.shape == "random":
        keep = torch.rand(views, patches, generator=generator).argsort(dim=1)[:, :kept]
        mask = torch.zeros(views, patches, dtype=torch.bool).scatter_(1, keep, True)
    elif config.shape == "inverse_block":
        mask = _rectangles(kept, views, grid, config.roll, generator)
    else:
        mask = ~_rectangles(patches - kept, views, grid, config.roll, generator)
    keep = mask.nonzero()[:, 1].view(views, kept)
    # The dropped patches first, in random order.
    order = (torch.rand(views, patches, generator=generator) + mask).argsort(dim=1)
    return keep, order[:, :predicted]


def _rectangles(
    count: int, views: int, grid: tuple[int, int], roll: bool, generator: torch.Generator
) -> Bool[Tensor, "n N"]:
    """Exactly `count` patches of each view: the first ones, row by row, of a random rectangle.

    height / width is log-uniform in [1/2, 2], narrowed to what fits the grid, and both are rounded up; so the
    end of the last rows is cut off. Rolled, the rectangle goes around the edges (CAPI, Appendix C).
    """
    rows, columns = grid
    low, high = max(0.5, count / columns**2), min(2.0, rows**2 / count)
    uniform = torch.rand(5, views, generator=generator, dtype=torch.float64)
    aspect = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * uniform[0])
    # The corners of the range give whole sides up to rounding.
    height = (count * aspect).sqrt().sub(1e-9).ceil().clamp(max=rows)
    width = (count / aspect).sqrt().sub(1e-9).ceil().clamp(max=columns)
    top, left = (
        (uniform[1 + i] * (n - side + 1)).floor()
        for i, (n, side) in enumerate(zip(grid, (height, width), strict=True))
    )
    y, x = (torch.arange(n)[None] - start[:, None] for n, start in zip(grid, (top, left), strict=True))
    inside_y, inside_x = (y >= 0) & (y < height[:, None]), (x >= 0) & (x < width[:, None])
    block = inside_y[:, :, None] & inside_x[:, None, :]
    block &= (block.flatten(1).cumsum(dim=1) <= count).view_as(block)
    if not roll:
        return block.flatten(1)
    dy, dx = ((uniform[3 + i] * n).long() for i, n in enumerate(grid))
    from_y = (torch.arange(rows) - dy[:, None]) % rows
    from_x = (torch.arange(columns) - dx[:, None]) % columns
    return block.flatten(1).gather(1, (from_y[:, :, None] * columns + from_x[:, None, :]).flatten(1))
