"""Attention within windows of patches: of many patches few blocks need to see all (ViTDet)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def global_blocks(depth: int, count: int) -> tuple[int, ...]:
    """Return which of `depth` blocks read everything: the last of each of `count` equal parts.

    4 of 12 are 2, 5, 8 and 11, as in ViTDet (Section 3).
    """
    return tuple((i + 1) * depth // count - 1 for i in range(count))


def has_windows(window: int, grid: tuple[int, int]) -> bool:
    """Return whether windows of this side cut the grid at all."""
    return window < max(grid)


def windowed_attention(
    query: Float[Tensor, "B heads N d"],
    key: Float[Tensor, "B heads T d"],
    value: Float[Tensor, "B heads T d"],
    grid: tuple[int, int],
    window: int,
) -> Float[Tensor, "B heads N d"]:
    """Return what the N patches of a grid (rows, columns) read: those of their window, and special tokens.

    Special tokens are the first T - N keys. Windows of `window` x `window` patches begin in the upper left;
    those at the other borders may hold fewer. ViTDet fills these up with zeros that are read; here nobody
    reads them.
    """
    special = key.shape[2] - query.shape[2]
    rows, columns = -(-grid[0] // window), -(-grid[1] // window)

    def cut(x: Tensor) -> Tensor:
        """[B, heads, N, d] to [B, windows, heads, patches, d]."""
        x = x.unflatten(2, grid)
        x = pad(x, (0, 0, 0, columns * window - grid[1], 0, rows * window - grid[0]))
        x = x.unflatten(2, (rows, window)).unflatten(4, (columns, window))
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)

    def keys(x: Tensor) -> Tensor:
        """Special tokens and patches of each window, [B * windows, heads, tokens, d]."""
        inside = cut(x[:, :, special:])
        shared = x[:, None, :, :special].expand(-1, inside.shape[1], -1, -1, -1)
        return torch.cat((shared, inside), dim=3).flatten(0, 1)

    real = None
    if grid != (rows * window, columns * window):
        there = cut(query.new_ones(1, 1, grid[0] * grid[1], 1)).bool().view(-1, 1, 1, window**2)
        real = pad(there, (special, 0), value=True).repeat(len(query), 1, 1, 1)
    out = scaled_dot_product_attention(cut(query).flatten(0, 1), keys(key), keys(value), attn_mask=real)
    out = out.unflatten(0, (-1, rows, columns)).unflatten(4, (window, window))
    out = out.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    return out[:, :, : grid[0], : grid[1]].flatten(2, 3)


def window_mask(
    grid: tuple[int, int], window: int, special: int, device: torch.device | None = None
) -> Bool[Tensor, "T T"]:
    """Return which of [special tokens, patches] reads which: patches of other windows are not read."""
    row, column = (torch.arange(side, device=device) // window for side in grid)
    number = (row[:, None] * grid[1] + column).flatten()
    return pad(number[:, None] == number, (special, 0, special, 0), value=True)
