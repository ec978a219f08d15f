"""Positions of patches: tables (learned, or fixed ones of sines), learned fields, and rotary positions."""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, interpolate, pad
from torch.nn.init import trunc_normal_

from foveola.geometry import bicubic

ROPE_FREQUENCIES = (7.0, 7e-4)  # turns over an image's side of the fastest and the slowest channel (CAPI)


def resize_positions(
    table: Float[Tensor, "1 N D"],
    grid: tuple[int, int],
    antialias: bool = False,
    fixed: bool = False,
    offset: float = 0.0,
) -> Float[Tensor, "1 N2 D"]:
    """Resize a square table of position embeddings to a (rows, columns) grid, bicubic; itself if sizes agree.

    `fixed`: it is the table of `fixed_positions`, which is computed anew instead.

    timm resizes with antialiasing (a bicubic kernel of a = -0.5), the code of DINO, iBOT and DINOv2 without
    (a = -0.75). The latter passes a scale factor of (n + 0.1) / side instead of the size: patch i then reads
    the table at (i + 1/2) side / (n + 0.1) - 1/2, ever shorter of its position, up to 0.1 side / n cells.
    Weights that were trained so want `offset` 0.1. It cannot be had together with antialiasing.
    """
    side = round(int(table.shape[1]) ** 0.5)  # a traced size is a tensor
    unknown = is_symbolic(grid)
    if not unknown and (side, side) == grid:
        return table
    if fixed:
        return fixed_positions(grid, table.shape[2], (side, side)).to(table)
    if unknown:
        return _resampled(table, side, grid, antialias, offset)
    field = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    # Interpolated in float32 also under autocast: the table is small and errors here reach every patch.
    with torch.autocast(table.device.type, enabled=False):
        if offset:
            scale = tuple((n + offset) / side for n in grid)
            field = interpolate(field.float(), scale_factor=scale, mode="bicubic", align_corners=False)
        else:
            field = interpolate(
                field.float(), size=grid, mode="bicubic", antialias=antialias, align_corners=False
            )
    return field.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def is_symbolic(grid: tuple[int, int]) -> bool:
    """Return whether torch.export traces a network for grids of any size: no branch may depend on them."""
    return any(isinstance(n, torch.SymInt) for n in grid)


def _resampled(
    table: Float[Tensor, "1 N D"], side: int, grid: tuple[int, int], antialias: bool, offset: float
) -> Float[Tensor, "1 N2 D"]:
    """`resize_positions` as two products with matrices, which hold for every grid, also that of the table."""
    apart = (grid[0] - side) ** 2 + (grid[1] - side) ** 2
    add: Any = offset * torch.sym_min(apart, 1) if offset else 0.0  # none for the grid of the table
    down, across = (_taps(n, side, antialias, add).to(table.device) for n in grid)
    field = table.float().view(side, side, -1)
    return (down @ (across @ field).flatten(1)).view(1, -1, table.shape[2]).to(table.dtype)


def _taps(n: int, side: int, antialias: bool, add: float) -> Float[Tensor, "n side"]:
    """Weights with which n positions read an axis of `side` ones, as `interpolate` has them."""
    nodes, i = torch.arange(side), torch.arange(n)[:, None]
    if antialias:  # a wider kernel where there are fewer positions, of the nodes that there are
        wide: Any = torch.sym_max(side / n, 1.0)
        weights = bicubic(((i + 0.5) * (side / n) - 0.5 - nodes).abs() / wide)
        return weights / weights.sum(dim=1, keepdim=True)
    centre = (i + 0.5) * (side / (n + add)) - 0.5
    near = centre.floor() + torch.arange(-1, 3)
    weights = bicubic((centre - near).abs(), a=-0.75)  # nodes beyond the border are that at the border
    return (weights[..., None] * (near.clamp(0, side - 1)[..., None] == nodes)).sum(dim=1)


def sincos_positions(grid: tuple[int, int], width: int, amplitude: float = 1.0) -> Float[Tensor, "1 N D"]:
    """Return sines and cosines of the column in the first half of the channels, of the row in the second.

    Frequencies fall geometrically from 1 to 1/100 per patch: enough for grids of some hundred patches a side.
    Raises ValueError unless width is a multiple of 4.
    """
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in grid)
    return amplitude * _waves(rows, columns, width, 100.0)


def fixed_positions(
    grid: tuple[int, int], width: int, fitted: tuple[int, int] | None = None
) -> Float[Tensor, "1 N D"]:
    """Return the table of MAE and I-JEPA, which is not trained: sines and cosines of frequencies from 1 to
    1/10000.

    Columns come first, then rows; of each first the sines, then the cosines. For another grid than the
    `fitted` one the waves are evaluated where the centres of its patches lie on that one: nothing is
    interpolated. Computed in float64. Raises ValueError unless width is a multiple of 4.
    """
    fitted = fitted or grid
    rows, columns = (
        (torch.arange(n, dtype=torch.float64) + 0.5) * (side / n) - 0.5
        for n, side in zip(grid, fitted, strict=True)
    )
    return _waves(rows, columns, width, 10_000.0).float()


def _waves(
    rows: Float[Tensor, "R"], columns: Float[Tensor, "C"], width: int, base: float
) -> Float[Tensor, "1 N D"]:
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, not {width}")
    frequencies = base ** -(torch.arange(width // 4, dtype=rows.dtype) / (width // 4))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = (axis.flatten()[:, None] * frequencies for axis in (x, y))
    parts = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    return torch.cat(parts, dim=1)[None]


class PositionField(nn.Module):
    """A learned vector for each position of an image, read where the patches of a view lie in it.

    `values` [rows, columns, D] stand at the nodes of a lattice. `cells`: nodes are the centres of as many
    equal cells of the image, as the pixels of an image are, so that rows x columns patches of the whole
    image read the values themselves. `corners`: the outermost nodes are the borders of the image. In
    between values are interpolated, `linear` in each axis or `bicubic` (a = -0.5), from the nodes that there
    are: half a cell at the border has no node beyond it. A patch reads its own centre, at x0 + (x1 - x0) (j +
    1/2) / n of the unit square for the view (x0, y0, x1, y1); a flipped view reads from right to left.
    (Position field paper, Section 3.2.1: the corners of field and image meet; kernel, nodes and flips are
    left open.)
    """

    def __init__(
        self,
        size: tuple[int, int],
        width: int,
        interpolation: Literal["linear", "bicubic"] = "linear",
        alignment: Literal["cells", "corners"] = "cells",
    ) -> None:
        super().__init__()
        self.interpolation: Literal["linear", "bicubic"] = interpolation
        self.alignment: Literal["cells", "corners"] = alignment
        self.values = nn.Parameter(torch.zeros(*size, width))

    @torch.no_grad()
    def reset(self, waves: tuple[int, int] | None = None) -> None:
        """Start from noise of 0.02; or from the sines that a learned table of (rows, columns) patches may
        start from.
        """
        if waves is None:
            trunc_normal_(self.values, std=0.02)
            return
        # In units of patches, whose centres are at 0, 1, 2 ...
        axes = []
        for n, nodes in zip(waves, self.values.shape[:2], strict=True):
            coordinates = (torch.arange(nodes) + 0.5) / nodes
            axes.append(n * (coordinates if self.alignment == "cells" else torch.linspace(0, 1, nodes)) - 0.5)
        rows, columns = axes
        self.values.copy_(0.5 * _waves(rows, columns, self.values.shape[2], 100.0).view_as(self.values))

    def forward(
        self,
        grid: tuple[int, int],
        boxes: Float[Tensor, "B 4"] | None = None,
        flips: Bool[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "#B N D"]:
        """Return positions of (rows, columns) patches of B views, row-major; one row for all without `boxes`.

        Args:
            boxes: (x0, y0, x1, y1) of the views in the unit square; None = the whole image.
            flips: which of these views are mirrored left-right.

        In the precision of `values`, float32 also under autocast: errors here reach every patch.
        """
        if boxes is None:
            boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=self.values.device)
        boxes = boxes.to(self.values)
        flips = None if flips is None else flips.to(boxes.device)
        y, rows = self._axis(boxes[:, 1], boxes[:, 3], grid[0], 0)
        x, columns = self._axis(boxes[:, 0], boxes[:, 2], grid[1], 1, flips)
        # [B, rows of patches, columns of patches, nodes above and below, nodes left and right]
        nodes = y[:, :, None, :, None] * self.values.shape[1] + x[:, None, :, None, :]
        weights = rows[:, :, None, :, None] * columns[:, None, :, None, :]
        if torch.compiler.is_exporting():  # the sum of a few rows, which other runtimes know
            near = self.values.flatten(0, 1)[nodes.flatten(0, 2).flatten(1)]
            read = (near * weights.flatten(0, 2).flatten(1)[..., None]).sum(dim=1)
            return read.view(boxes.shape[0], grid[0] * grid[1], -1)
        # A patch has 4 nodes of thousands: a gather is some twenty times as fast as products of matrices, and
        # holds nothing larger than its result.
        read = embedding_bag(
            nodes.flatten(0, 2).flatten(1),
            self.values.flatten(0, 1),
            per_sample_weights=weights.flatten(0, 2).flatten(1),
            mode="sum",
        )
        return read.view(boxes.shape[0], grid[0] * grid[1], -1)

    def _axis(
        self,
        low: Float[Tensor, "B"],
        high: Float[Tensor, "B"],
        size: int,
        axis: int,
        flips: Bool[Tensor, "B"] | None = None,
    ) -> tuple[Int64[Tensor, "B {size} K"], Float[Tensor, "B {size} K"]]:
        """The nodes around the centres of `size` patches of each view along one axis, and their weights."""
        nodes = self.values.shape[axis]
        cells = nodes if self.alignment == "cells" else nodes - 1
        i = torch.arange(size, device=low.device) + 0.5
        centre = low[:, None] * cells + (high - low)[:, None] * (cells / size) * i
        if self.alignment == "cells":
            centre = centre - 0.5
        if flips is not None:
            centre = torch.where(flips[:, None], centre.flip(1), centre)
        first, last = (0, 1) if self.interpolation == "linear" else (-1, 2)
        near = centre.floor()[..., None] + torch.arange(first, last + 1, device=low.device)
        distance = (centre[..., None] - near).abs()
        weights = (1 - distance).clamp(min=0) if self.interpolation == "linear" else bicubic(distance)
        weights = torch.where((near >= 0) & (near < nodes), weights, 0)
        return near.clamp(0, nodes - 1).long(), weights / weights.sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def image(self, height: int = 200) -> Shaped[np.ndarray, "H W ch"]:
        """Return three principal components of the field as red, green and blue, about `height` pixels high.

        Each from its 1st to its 99th percentile. Neighbours of like colour: the field is smooth.
        """
        values = self.values.detach().float().cpu()
        flat = values.flatten(0, 1)
        flat = flat - flat.mean(dim=0)
        # The covariance is D x D; signs of its vectors are arbitrary: the largest entry of each is positive.
        vectors = torch.linalg.eigh(flat.T.double() @ flat.double()).eigenvectors[:, -3:].flip(1)
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
        parts = flat @ vectors.float()
        parts = pad(parts, (0, 3 - parts.shape[1]))
        low, high = parts.quantile(0.01, dim=0), parts.quantile(0.99, dim=0)
        colors = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        pixels = (colors * 255).round().byte().view(*values.shape[:2], 3)
        times = max(height // pixels.shape[0], 1)
        return pixels.repeat_interleave(times, 0).repeat_interleave(times, 1).numpy()


def grid_coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Float[Tensor, "1 N 2"]:
    """Return (row, column) of each patch, row-major, in [0, 1] from the first patch to the last of each axis.

    The range is the same for any grid, so positions stretch with the resolution (CAPI).
    """
    if is_symbolic(grid):  # torch.linspace has a fixed number of steps
        steps: list[Any] = [torch.sym_max(n - 1, 1) for n in grid]
        axes = (torch.arange(n, device=device) / last for n, last in zip(grid, steps, strict=True))
    else:
        axes = (torch.linspace(0, 1, n, device=device) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(1, -1, 2)


def centre_coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Float[Tensor, "1 N 2"]:
    """Return (row, column) of the centre of each patch, row-major, in an image from -1 to 1 (DINOv3)."""
    axes = ((torch.arange(n, device=device) + 0.5) * (2 / n) - 1 for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(1, -1, 2)


def border_coordinates(count: int, patches: Float[Tensor, "B K 2"]) -> Float[Tensor, "B R 2"]:
    """Return where registers stand: evenly around the border of the smallest box that holds the given
    patches.

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

    Frequencies fall geometrically from 7 to 0.0007 turns per image, over d/4 values (CAPI, Table 6).
    `dinov3`: pairs as `axial`, of (row, column) in [-1, 1], with frequencies 100^(-4 k / d) turns per unit.
    """

    angles: Tensor

    def __init__(self, width: int, kind: Literal["axial", "capi", "dinov3"] = "axial") -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"rotary positions need heads whose width is a multiple of 4, not {width}")
        self.kind: Literal["axial", "capi", "dinov3"] = kind
        high, low = ROPE_FREQUENCIES
        falling = high * (low / high) ** torch.linspace(0, 1, width // 4)
        if kind == "dinov3":
            falling = 100.0 ** -(torch.arange(width // 4) * 4 / width)
        turns = 2 * torch.pi * falling
        none = torch.zeros_like(turns)
        row, column = torch.stack((turns, none)), torch.stack((none, turns))
        order = (row, row, column, column) if kind == "capi" else (row, column, row, column)
        self.register_buffer("angles", torch.cat(order, dim=1), persistent=False)  # [2, width]

    def coordinates(self, grid: tuple[int, int]) -> Float[Tensor, "1 N 2"]:
        """Return (row, column) of each patch, row-major, as this kind of positions counts them."""
        coordinates = centre_coordinates if self.kind == "dinov3" else grid_coordinates
        return coordinates(grid, self.angles.device)

    def forward(self, coordinates: Float[Tensor, "B T 2"]) -> Float[Tensor, "B 2 T d"]:
        """Return cosines and sines of the angles of each token, for `attention.rotate`, in float32."""
        with torch.autocast(coordinates.device.type, enabled=False):
            row, column = coordinates.float().unsqueeze(-1).unbind(dim=2)
            angles = row * self.angles[0] + column * self.angles[1]
            return torch.stack((angles.cos(), angles.sin()), dim=1)


def take_rows(x: Float[Tensor, "#B N D"], indices: Int64[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """Return rows of each image by index; x may have one row of N for all images."""
    return x.expand(indices.shape[0], -1, -1).gather(1, indices[..., None].expand(-1, -1, x.shape[2]))
