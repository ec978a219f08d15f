"""Position embeddings of patches: a learned table, what it may start from, and its resizing to any grid."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate


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
