"""Positions of patches: tables (learned or of sines), their resizing to any grid, and rotary positions."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import interpolate

ROPE_FREQUENCIES = (7.0, 7e-4)  # turns over a picture's side of the fastest and the slowest channel (CAPI)


def resize_positions(
    table: Float[Tensor, "1 N D"], grid: tuple[int, int], antialias: bool = False
) -> Float[Tensor, "1 N2 D"]:
    """Resize a square table of position embeddings to a (rows, columns) grid, bicubic; itself if sizes agree.

    timm resizes with antialiasing (a bicubic kernel of a = -0.5), the code of DINO, iBOT and DINOv2 without
    (a = -0.75). The latter passes a scale factor of (n + 0.1) / side instead of the size, which samples its
    grid 0.1 / n of a cell short; that is not reproduced.
    """
    side = round(table.shape[1] ** 0.5)
    if (side, side) == grid:
        return table
    field = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    # Interpolated in float32 also under autocast: the table is small and errors here reach every patch.
    with torch.autocast(table.device.type, enabled=False):
        field = interpolate(
            field.float(), size=grid, mode="bicubic", antialias=antialias, align_corners=False
        )
    return field.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def sincos_positions(grid: tuple[int, int], width: int, amplitude: float = 1.0) -> Float[Tensor, "1 N D"]:
    """Sines and cosines of the column in the first half of the channels, of the row in the second.

    Frequencies fall geometrically from 1 to 1/100 per patch: enough for grids of some hundred patches a side.
    Raises ValueError unless width is a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, not {width}")
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = (place.flatten()[:, None] * frequencies for place in (columns, rows))
    parts = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    return amplitude * torch.cat(parts, dim=1)[None]


def grid_coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Float[Tensor, "1 N 2"]:
    """(row, column) of each patch, row-major, in [0, 1] from the first patch to the last of each axis.

    The range is the same for any grid, so positions stretch with the resolution (CAPI).
    """
    axes = (torch.linspace(0, 1, n, device=device) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(1, -1, 2)


def border_coordinates(count: int, patches: Float[Tensor, "B K 2"]) -> Float[Tensor, "B R 2"]:
    """Where registers stand: evenly around the border of the smallest box that holds the given patches.

    Four sides of R / 4 each, clockwise from the top left in (row, column): (c, 0), (1, c), (1 - c, 1), (0, 1
    - c) with c = 0, 4 / R, 8 / R ... (CAPI's code). Raises ValueError unless R is a multiple of 4.
    """
    if count % 4:
        raise ValueError(f"rotary positions place registers on four sides: {count} is not a multiple of 4")
    c = torch.arange(count // 4, device=patches.device) / max(count // 4, 1)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    sides = [(c, zero), (one, c), (1 - c, one), (zero, 1 - c)]
    border = torch.cat([torch.stack(side, dim=1) for side in sides])
    low, high = patches.amin(dim=1, keepdim=True), patches.amax(dim=1, keepdim=True)
    return low + border * (high - low)


class Rope(nn.Module):
    """Rotary positions in two dimensions: angles of (row, column) in [0, 1], for heads of `width` channels.

    `axial`: channel j turns with channel j + d/2 by one angle, of the row for the first half of these pairs,
    of the column for the others; so q k depends on differences of positions only. `capi`: the layout of
    CAPI's released code, in which channel j takes an angle of the row and j + d/2 one of the column: no
    rotation, but what its published weights were trained with.

    Frequencies fall geometrically from 7 to 0.0007 turns per picture, over d/4 values (CAPI, Table 6).
    """

    angles: Tensor

    def __init__(self, width: int, kind: Literal["axial", "capi"] = "axial") -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"rotary positions need heads whose width is a multiple of 4, not {width}")
        high, low = ROPE_FREQUENCIES
        turns = 2 * torch.pi * high * (low / high) ** torch.linspace(0, 1, width // 4)
        none = torch.zeros_like(turns)
        row, column = torch.stack((turns, none)), torch.stack((none, turns))
        order = (row, column, row, column) if kind == "axial" else (row, row, column, column)
        self.register_buffer("angles", torch.cat(order, dim=1), persistent=False)  # [2, width]

    def forward(self, coordinates: Float[Tensor, "B T 2"]) -> Float[Tensor, "B 2 T d"]:
        """Cosines and sines of the angles of each token, for `attention.rotate`, in float32."""
        with torch.autocast(coordinates.device.type, enabled=False):
            row, column = coordinates.float().unsqueeze(-1).unbind(dim=2)
            angles = row * self.angles[0] + column * self.angles[1]
            return torch.stack((angles.cos(), angles.sin()), dim=1)


def take_rows(x: Float[Tensor, "#B N D"], indices: Int64[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """Rows of each picture by index; x may have one row of N for all pictures."""
    return x.expand(len(indices), -1, -1).gather(1, indices[..., None].expand(-1, -1, x.shape[2]))
