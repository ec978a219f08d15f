"""Blocks of patches to predict, and the context around them (I-JEPA, Section 3 and Appendix A)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from foveola.config import key

BLOCK_TRIES = 20  # draws of a view before it gets along with one block less


@dataclass(frozen=True)
class BlocksConfig:
    """Defaults: I-JEPA, with its sampler put right."""

    targets: int = key(4, "blocks to predict in each view", at_least=1, at_most=1000)
    target_scale: tuple[float, float] = key(
        (0.15, 0.2), "fraction of the patches that such a block covers", above=0, below=1
    )
    target_aspect: tuple[float, float] = key((0.75, 1.5), "height / width of such a block", above=0)
    context_scale: tuple[float, float] = key(
        (0.85, 1.0), "fraction of the patches of the square that the context is cut from", above=0, at_most=1
    )
    min_context: int = key(10, "a view is drawn again unless its context has more patches", at_least=0)
    published: bool = key(
        False, "sample as the official code does, whose last row and column are in no block and no context"
    )

    def __post_init__(self) -> None:
        for name in ("target_scale", "target_aspect", "context_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: needs low <= high")

    def sizes(
        self, grid: tuple[int, int], scale: float, aspect: float, context: float
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) of the blocks to predict and of the context's, from three numbers in
        [0, 1).
        """
        low, high = self.target_aspect
        ratio = low + (high - low) * aspect
        return self._sides(grid, self.target_scale, scale, ratio), self._sides(
            grid, self.context_scale, context, 1.0
        )

    def _sides(
        self, grid: tuple[int, int], fraction: tuple[float, float], at: float, ratio: float
    ) -> tuple[int, int]:
        area = int(grid[0] * grid[1] * (fraction[0] + (fraction[1] - fraction[0]) * at))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(height, grid[0] - self.published), min(width, grid[1] - self.published)

    def check(self, grid: tuple[int, int]) -> None:
        """Raise ValueError where a view of this patch grid could end up without enough context."""
        shapes = [self.sizes(grid, scale, at / 64, 0.0) for scale in (0.0, 1.0) for at in range(65)]
        areas = [height * width for (height, width), _ in shapes]
        where = f"of a {grid[0]} x {grid[1]} grid"
        if not min(areas):
            raise ValueError(
                f"blocks.target_scale={self.target_scale[0]}: a block {where} would have no patch"
            )
        # Whatever falls out badly, in the end a view avoids one block only (or, as published, none).
        left = math.prod(shapes[0][1]) - (0 if self.published else max(areas))
        if left <= self.min_context:
            raise ValueError(
                f"blocks.min_context={self.min_context}: {where} only {left} patches are sure to be left; "
                f"try {max(left - 1, 0)} or less, or smaller blocks"
            )


def draw_blocks(
    config: BlocksConfig, views: int, grid: tuple[int, int], generator: torch.Generator
) -> tuple[Int64[Tensor, "n K"], Int64[Tensor, "n P"]]:
    """Return context and targets of n views over a (rows, columns) patch grid, as patch indices.

    Sizes are drawn once for all views: one of the blocks to predict, one of the context's. Each view places
    `targets` blocks, which may overlap, and the context's; its context is the latter without the former. A
    view whose context is too small is drawn again, up to `TRIES` times; then its last blocks fall, one after
    the other, on its first one. The context of every view is then cut to the size of the smallest one in the
    batch, by chance.

    `published=True` is the official code instead: scale and aspect of the blocks follow from one random
    number; no block reaches the last row and column; only the context is drawn again, and may in the end
    overlap the last blocks; contexts are cut by leaving out their last patches, which are those at the
    bottom.

    Returns the context [n, K], ascending, and the targets [n, targets * p]: block after block, row-major.
    """
    count, published = config.targets, config.published
    uniform = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    if published:
        uniform[1] = uniform[0]
    size, around = config.sizes(grid, *uniform)

    blocks = _place(size, (views, count), grid, published, generator)
    windows = _place(around, (views,), grid, published, generator)
    contexts = windows & ~blocks.any(dim=1)
    for attempt in range(1, BLOCK_TRIES * count + 1):
        poor = (contexts.sum(dim=1) <= config.min_context).nonzero()[:, 0]
        if not len(poor):
            break
        spared = count - attempt // BLOCK_TRIES  # blocks that the context still avoids
        windows[poor] = _place(around, (len(poor),), grid, published, generator)
        if not published:
            fresh = _place(size, (len(poor), count), grid, published, generator)
            fresh[:, max(spared, 1) :] = fresh[:, :1]
            blocks[poor] = fresh
            spared = count
        contexts[poor] = windows[poor] & ~blocks[poor, :spared].any(dim=1)

    least = int(contexts.sum(dim=1).min())
    order = torch.zeros(contexts.shape) if published else torch.rand(contexts.shape, generator=generator)
    # The patches of the context first: in order, or by chance.
    keep = (order - 2 * contexts.float()).argsort(dim=1, stable=True)[:, :least]
    return keep.sort(dim=1).values, blocks.nonzero()[:, 2].view(views, -1)


def _place(
    size: tuple[int, int],
    shape: tuple[int, ...],
    grid: tuple[int, int],
    published: bool,
    generator: torch.Generator,
) -> Bool[Tensor, "*n N"]:
    """Blocks of one size at random positions; as published, never in the last row and column."""
    inside = []
    for n, side in zip(grid, size, strict=True):
        starts = n - side + (not published)
        start = torch.randint(starts, shape, generator=generator)[..., None]
        at = torch.arange(n)
        inside.append((at >= start) & (at < start + side))
    return (inside[0][..., :, None] & inside[1][..., None, :]).flatten(-2)
