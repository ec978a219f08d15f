"""Crop geometry: a view is a box in the unit square of its image, a flip and an output size.

Resampling is separable, so a view is two small matrices (rows `Wy [h, S]`, columns `Wx [w, S]`), and `sample`
applies them to any square field: pixels, object masks, position fields. Boxes are (x0, y0, x1, y1) in [0, 1];
those of padded views reach outside. Label maps are cut by the nearest cell (`sample_labels`), boxes of
instances by arithmetic (`boxes_in_views`), masks of instances by the fraction of each pixel that they cover
(`masks_in_views`): all where the pixels are.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

Kernel = Literal["bicubic", "linear", "area"]
HALF_COVERED = 0.5 - 1e-3  # of a pixel: rounding may take a little from a half


def random_boxes(
    aspects: Float[Tensor, "B"],
    count: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
    attempts: int = 10,
) -> Float[Tensor, "B V 4"]:
    """Draw `count` random-resized boxes for each image; CPU tensors, float32.

    The fraction of the image's area is uniform in `scale`, the width/height ratio *in true pixels* is
    log-uniform in `ratio`. The first of `attempts` draws that fits is kept; if none fits, the largest centred
    box with the nearest allowed ratio is used (the rule of the usual random resized crop).

    Args:
        aspects: width / height of each true image; the unit square is that image squashed.
    """
    batch = aspects.shape[0]
    aspects = aspects.detach().to("cpu", torch.float32)[:, None, None]
    uniform = torch.rand(4, batch, count, attempts, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * uniform[0]
    log_ratio = math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * uniform[1]
    shape = log_ratio.exp() / aspects  # width / height in the unit square
    width, height = (area * shape).sqrt(), (area / shape).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.to(torch.uint8).argmax(dim=-1, keepdim=True)
    width, height, u, v = (t.gather(-1, first)[..., 0] for t in (width, height, uniform[2], uniform[3]))

    clamped = aspects[..., 0].clamp(ratio[0], ratio[1]) / aspects[..., 0]
    found = fits.any(dim=-1)
    width = torch.where(found, width, clamped.clamp(max=1).expand_as(width))
    height = torch.where(found, height, (1 / clamped).clamp(max=1).expand_as(height))
    x0 = torch.where(found, u, torch.full_like(u, 0.5)) * (1 - width)
    y0 = torch.where(found, v, torch.full_like(v, 0.5)) * (1 - height)
    return torch.stack((x0, y0, (x0 + width).clamp(max=1), (y0 + height).clamp(max=1)), dim=-1)


def resampling_weights(
    low: Float[Tensor, "*N"],
    high: Float[Tensor, "*N"],
    size: int,
    source: int,
    kernel: Kernel = "bicubic",
    blur: Float[Tensor, "*N"] | None = None,
    extent: Int64[Tensor, "*N"] | None = None,
    outside: float | None = None,
) -> Float[Tensor, "*N {size} {source}"]:
    """Return antialiased interpolation weights of one axis; each row sums to one.

    Output cell i covers [low + (high - low) i / size, low + (high - low) (i + 1) / size] of the unit
    interval; 0 <= low < high <= 1. `bicubic` (a = -0.5) and `linear` widen their kernel when shrinking, as
    PIL and `F.interpolate(antialias=True)` do; `area` gives source cell j the fraction of the output cell
    that it covers, exactly, at any scale.

    Args:
        blur: standard deviation of a Gaussian in *output* pixels, folded into the weights; 0 leaves them
            alone.
        extent: how many of the `source` cells the unit interval spans, from the first on; the others get the
            weight 0. None = all of them.
        outside: the largest high - low there is, where intervals may reach out of [0, 1]: output cells whose
            centre lies outside get weights of 0 alone. None: no interval does.
    """
    low, high = low[..., None, None], high[..., None, None]
    cells = source if extent is None else extent.to(low.dtype)[..., None, None]
    cell = (high - low) * (cells / size)  # source pixels to an output pixel
    i = torch.arange(size, device=low.device, dtype=low.dtype)[:, None]
    centre = low * cells + (i + 0.5) * cell
    # Only the source cells that the kernel can reach are looked at: a few of hundreds.
    longest = 1.0 if outside is None else min(max(outside, 1.0), size)  # from there on all are reached
    radius = {"bicubic": 2.0, "linear": 1.0, "area": 0.5}[kernel] * max(longest * source / size, 1)
    taps = 2 * math.ceil(radius) + 2
    first = (centre - (taps / 2 - 1)).floor()
    j = first + torch.arange(taps, device=low.device, dtype=low.dtype)
    if kernel == "area":
        start = low * cells + i * cell
        weights = (torch.minimum(start + cell, j + 1) - torch.maximum(start, j)).clamp_(min=0)
    else:
        distance = ((j + 0.5 - centre) / cell.clamp(min=1)).abs_()
        weights = bicubic(distance) if kernel == "bicubic" else (1 - distance).clamp_(min=0)
    weights = weights * ((j >= 0) & (j < cells))
    # Cells before the first and after the last have room of their own here, which is cut off again.
    spread = weights.new_zeros(*weights.shape[:-1], source + 2 * taps)
    spread.scatter_(-1, (j + taps).long().clamp_(0, source + 2 * taps - 1), weights)
    weights = spread[..., taps : taps + source]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    inside = None
    if outside is not None:
        inside = (centre >= 0) & (centre <= cells)
        weights = torch.where(inside, weights, 0.0)
    if blur is not None:
        weights = _gaussian(blur, size, inside) @ weights
    return weights


def bicubic(x: Float[Tensor, "*N"], a: float = -0.5) -> Float[Tensor, "*N"]:
    """Return Keys' kernel at distances x >= 0 in cells; a = -0.5 is PIL's, -0.75 torch's without
    antialiasing.
    """
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _gaussian(
    sigma: Float[Tensor, "*N"], size: int, inside: Bool[Tensor, "*N {size} 1"] | None = None
) -> Float[Tensor, "*N {size} {size}"]:
    """Weights of a Gaussian over cells; where `inside` is given, over and for those alone."""
    i = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    square = (i[:, None] - i) ** 2
    # A vanishing sigma gives the identity: exp(-1 / (2 * 0.05^2)) is 0 in float32.
    weights = torch.exp(-square / (2 * sigma.clamp(min=0.05)[..., None, None] ** 2))
    if inside is None:
        return weights / weights.sum(dim=-1, keepdim=True)
    weights = weights * inside.mT
    return torch.where(inside, weights / weights.sum(dim=-1, keepdim=True), 0.0)


def sample(
    field: Float[Tensor, "B C S S2"],
    boxes: Float[Tensor, "B V 4"],
    flips: Bool[Tensor, "B V"] | None,
    size: int | tuple[int, int],
    kernel: Kernel = "bicubic",
    blur: Float[Tensor, "B V"] | None = None,
    extents: Int64[Tensor, "B 2"] | None = None,
    outside: float | None = None,
) -> Float[Tensor, "B V C h w"]:
    """Cut V views out of each of B fields: `Wy @ field @ Wx^T`, batched and differentiable in the field.

    A field spans the unit square: its first cell begins at 0 and its last ends at 1 on each axis, so rows and
    columns may differ in number. `extents` are the rows and columns of each field where it does not fill its
    square; what lies beyond them is never read. Values are not clipped: bicubic weights may overshoot.
    `flips` mirrors left-right; `blur` is a Gaussian in output pixels (see `resampling_weights`). Boxes may
    reach out of the unit square where `outside` says how long their sides are at most: cells whose centre
    lies outside are 0, and the others are as if nothing were there.
    """
    height, width = (size, size) if isinstance(size, int) else size
    batch, channels, rows, columns = field.shape
    views = boxes.shape[1]
    boxes = boxes.to(field.device, field.dtype)
    flips = None if flips is None else flips.to(field.device)
    blur = None if blur is None else blur.to(field.device, field.dtype)
    high, wide = (
        (None, None) if extents is None else extents.to(field.device).T[..., None].expand(2, -1, views)
    )
    wy = resampling_weights(boxes[..., 1], boxes[..., 3], height, rows, kernel, blur, high, outside)
    wx = resampling_weights(boxes[..., 0], boxes[..., 2], width, columns, kernel, blur, wide, outside)
    if flips is not None:
        wx = torch.where(flips[..., None, None], wx.flip(-2), wx)
    # One matrix product for the rows of all views of an image, then one for the columns of each view.
    lines = field.permute(0, 2, 1, 3).reshape(batch, rows, channels * columns)
    lines = wy.reshape(batch, views * height, rows) @ lines
    lines = lines.reshape(batch * views, height * channels, columns)
    out = lines @ wx.reshape(batch * views, width, columns).mT
    return out.reshape(batch, views, height, channels, width).transpose(2, 3)


def sample_labels(
    maps: UInt8[Tensor, "B R C"],
    boxes: Float[Tensor, "B V 4"],
    flips: Bool[Tensor, "B V"] | None,
    size: int | tuple[int, int],
    fill: int,
    extents: Int64[Tensor, "B 2"] | None = None,
) -> UInt8[Tensor, "B V h w"]:
    """Cut V views out of each of B label maps: the label under the centre of each output cell.

    Maps lie on their squares as fields do (see `sample`), boxes may reach outside: output cells whose centre
    lies outside get the label `fill`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    boxes = boxes.to(maps.device)
    shape = torch.tensor(maps.shape[1:], device=maps.device)
    rows, columns = (shape if extents is None else extents.to(maps.device)).expand(len(maps), 2).T[..., None]
    y, no_y = _nearest(boxes[..., 1], boxes[..., 3], height, rows)
    x, no_x = _nearest(boxes[..., 0], boxes[..., 2], width, columns)
    if flips is not None:
        mirrored = flips.to(maps.device)[..., None]
        x, no_x = (torch.where(mirrored, each.flip(-1), each) for each in (x, no_x))
    image = torch.arange(len(maps), device=maps.device)[:, None, None, None]
    labels = maps[image, y[..., :, None], x[..., None, :]]
    return labels.masked_fill_(no_y[..., :, None] | no_x[..., None, :], fill)


def _nearest(
    low: Float[Tensor, "B V"], high: Float[Tensor, "B V"], size: int, cells: Int64[Tensor, "B 1"]
) -> tuple[Int64[Tensor, "B V {size}"], Bool[Tensor, "B V {size}"]]:
    """The source cell that holds the centre of each output cell of an axis, and whether there is none."""
    i = torch.arange(size, device=low.device, dtype=low.dtype)
    cells = cells[..., None]
    centre = low[..., None] * cells + (i + 0.5) * ((high - low)[..., None] * (cells / size))
    index = torch.minimum(centre.clamp(min=0).long(), cells - 1)
    return index, (centre < 0) | (centre > cells)


def pixels_inside(
    boxes: Float[Tensor, "*N 4"], flips: Bool[Tensor, "*N"], size: tuple[int, int]
) -> Int64[Tensor, "*N 4"]:
    """Return the pixels x0, y0, x1, y1 of views of `size` (rows, columns) that lie in their images.

    Those whose centre lies in the unit square: x0 <= x < x1, y0 <= y < y1.
    """
    rows, columns = size
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0], device=boxes.device, dtype=boxes.dtype)
    edges = boxes_in_views(unit.expand(boxes.shape), boxes, flips, size)
    found = (edges - 0.5).ceil()
    limit = torch.tensor([columns, rows, columns, rows], device=boxes.device)
    return torch.minimum(found.clamp(min=0).long(), limit)


def boxes_in_views(
    boxes: Float[Tensor, "*N 4"],
    views: Float[Tensor, "*N 4"],
    flips: Bool[Tensor, "*N"],
    size: tuple[int, int],
) -> Float[Tensor, "*N 4"]:
    """Return boxes of images in pixels of views of them, each of `size` (rows, columns); not clipped."""
    low, side = views[..., :2], views[..., 2:] - views[..., :2]
    rows, columns = size
    scale = torch.tensor([columns, rows], device=boxes.device, dtype=boxes.dtype)
    start, end = (boxes[..., :2] - low) / side * scale, (boxes[..., 2:] - low) / side * scale
    x0, x1 = start[..., 0], end[..., 0]
    x0, x1 = torch.where(flips, columns - x1, x0), torch.where(flips, columns - x0, x1)
    return torch.stack((x0, start[..., 1], x1, end[..., 1]), dim=-1)


def masks_in_views(
    masks: UInt8[Tensor, "N s s"],
    boxes: Float[Tensor, "N 4"],
    views: Float[Tensor, "N 4"],
    flips: Bool[Tensor, "N"],
    size: tuple[int, int],
) -> Bool[Tensor, "N h w"]:
    """Return the pixels of views of which an instance covers half or more: masks pasted into views.

    A mask holds, for each cell of a square that spans the box of its instance in the image, the fraction that
    the instance covers, times 255. Pixels and cells meet by area (`Wy @ mask @ Wx^T`), which is exact where
    coverage is even within a cell.
    """
    low, side = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    start, end = (views[:, :2] - low) / side, (views[:, 2:] - low) / side
    wy = _fractions(start[:, 1], end[:, 1], size[0], masks.shape[1])
    wx = _fractions(start[:, 0], end[:, 0], size[1], masks.shape[2])
    wx = torch.where(flips[:, None, None], wx.flip(1), wx)
    covered = wy @ masks.to(wy.dtype).div_(255) @ wx.mT
    return covered >= HALF_COVERED


def _fractions(
    low: Float[Tensor, "N"], high: Float[Tensor, "N"], size: int, source: int
) -> Float[Tensor, "N {size} {source}"]:
    """The fraction of each of `size` cells, which span `low` to `high`, that each of `source` cells covers,
    which span the unit interval. A row sums to the fraction of its cell that lies in the unit interval.
    """
    i = torch.arange(size + 1, device=low.device, dtype=low.dtype)
    edges = ((low[:, None] + (high - low)[:, None] * (i / size)) * source)[..., None]
    j = torch.arange(source, device=low.device, dtype=low.dtype)
    shared = torch.minimum(edges[:, 1:], j + 1) - torch.maximum(edges[:, :-1], j)
    return shared.clamp_(min=0) / ((high - low) * (source / size))[:, None, None]


def covered_patches(
    coverage: Float[Tensor, "*B h w"], min_coverage: float, keep_most: bool = False
) -> Bool[Tensor, "*B N"]:
    """Return which patches belong to an object, from the fraction of each that it covers, in [0, 1]; may be
    none.

    A patch counts from `min_coverage` on. With `keep_most` an object that covers less than that of every
    patch keeps those that it covers most.
    """
    if not keep_most:
        return (coverage >= min_coverage).flatten(-2)
    largest = coverage.amax(dim=(-2, -1), keepdim=True)
    return ((coverage > 0) & ((coverage >= min_coverage) | (coverage >= largest))).flatten(-2)


def patch_mask(
    coverage: Float[Tensor, "*B h w"], min_coverage: float = 1 / 256, keep_most: bool = False
) -> Bool[Tensor, "*B N"]:
    """Return which patches belong to an object, from the fraction of each patch that it covers, in [0, 1].

    A patch counts from `min_coverage` on; 1/256 means any pixel of a 16 x 16 patch (ODIS). With `keep_most`
    an object that covers less than that of every patch keeps those that it covers most. An object that
    covers no patch becomes the whole image.
    """
    mask = covered_patches(coverage, min_coverage, keep_most)
    return mask | ~mask.any(dim=-1, keepdim=True)


def box_sums(field: Float[Tensor, "B M S S2"], boxes: Float[Tensor, "B M T 4"]) -> Float[Tensor, "B M T"]:
    """Return the sum of a field over each of T boxes, in units of field cells, through a summed-area table.

    Box edges fall between cells: the table is interpolated linearly, which is exact for a field that is
    constant inside each cell.
    """
    rows, columns = field.shape[-2:]
    table = torch.zeros(*field.shape[:2], rows + 1, columns + 1, dtype=torch.float64, device=field.device)
    table[..., 1:, 1:] = field.double().cumsum(-1).cumsum(-2)
    x0, y0, x1, y1 = boxes.to(field.device).unbind(-1)
    lower = _read(table, x1, y1) - _read(table, x0, y1)
    return (lower - _read(table, x1, y0) + _read(table, x0, y0)).to(field.dtype)


def _read(
    table: Float[Tensor, "B M S1 S3"], x: Float[Tensor, "B M T"], y: Float[Tensor, "B M T"]
) -> Float[Tensor, "B M T"]:
    """The table between its nodes at positions in [0, 1], linearly in each direction."""
    rows, columns = table.shape[-2] - 1, table.shape[-1] - 1
    flat = table.flatten(2)
    x, y = x.double().clamp(0, 1) * columns, y.double().clamp(0, 1) * rows
    left, top = x.floor().clamp(max=columns - 1), y.floor().clamp(max=rows - 1)
    fx, fy = x - left, y - top
    corner = (top * (columns + 1) + left).long()
    upper = flat.gather(2, corner) * (1 - fx) + flat.gather(2, corner + 1) * fx
    lower = flat.gather(2, corner + columns + 1) * (1 - fx) + flat.gather(2, corner + columns + 2) * fx
    return upper * (1 - fy) + lower * fy
