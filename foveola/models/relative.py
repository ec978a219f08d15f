"""Biases of attention by the position of one patch relative to another (BEiT, SimMIM, data2vec)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import interpolate

OF_TOKENS = 3  # last rows of a table: what class tokens add to patches, patches to them, they to each other


def table_rows(grid: tuple[int, int]) -> int:
    """Return how many rows the table of a grid of patches has: one an offset, and those of class tokens."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + OF_TOKENS


def relative_bias(
    table: Float[Tensor, "R heads"], of: tuple[int, int], grid: tuple[int, int], special: int
) -> Float[Tensor, "heads T T"]:
    """Return what is added to the logits of T tokens: `special` ones, then the patches of a grid, row-major.

    Entry (i, j) of patches i and j is the table's row for the offset from j to i. All special tokens (object
    tokens, registers) count as the class token. `of` is the grid that the table was made for.
    """
    resized = resized_bias(table, of, grid)
    index = relative_index(grid, special).to(table.device)
    return resized[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)


def relative_index(grid: tuple[int, int], special: int) -> Int64[Tensor, "T T"]:
    """Return the row of a table for each pair of tokens: offsets by (row, column), as in BEiT."""
    rows, columns = grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    down = row[:, None] - row + rows - 1
    right = column[:, None] - column + columns - 1
    last = table_rows(grid)
    index = torch.full((special + len(row),) * 2, last - 1)
    index[:special, special:] = last - 3
    index[special:, :special] = last - 2
    index[special:, special:] = down * (2 * columns - 1) + right
    return index


def resized_bias(
    table: Float[Tensor, "R heads"], of: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "R2 heads"]:
    """Return the table for another grid, whose offsets are interpolated bilinearly, as in transformers."""
    if of == grid:
        return table
    old, new = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (of, grid))
    offsets, tokens = table[:-OF_TOKENS], table[-OF_TOKENS:]
    planes = offsets.view(*old, -1).permute(2, 0, 1)[None]
    resized = interpolate(planes.float(), new, mode="bilinear")[0].permute(1, 2, 0).flatten(0, 1)
    return torch.cat((resized.to(table.dtype), tokens))
