"""Regions of views that count as nothing: crowds, objects without a class, what is beyond the image."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad


def drawn(boxes: Float[Tensor, "K 4"], height: int, width: int) -> Bool[Tensor, "{height} {width}"]:
    """Return which pixels have their centre in any of the boxes (x0, y0, x1, y1), in pixels."""
    x, y = (torch.arange(side, device=boxes.device) + 0.5 for side in (width, height))
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    columns, rows = (x0 <= x) & (x < x1), (y0 <= y) & (y < y1)
    return (rows[:, :, None] & columns[:, None]).any(dim=0)


def fraction_inside(region: Bool[Tensor, "H W"], boxes: Float[Tensor, "K 4"]) -> Float[Tensor, "K"]:
    """Return the fraction of each box that lies in a region of pixels; 0 of a box without area.

    Exact, also for boxes that cut pixels, through the integral of the region: sums over [0, x] x [0, y].
    """
    height, width = region.shape
    integral = pad(region.double().cumsum(0).cumsum(1), (1, 0, 1, 0))

    def upto(x: Tensor, y: Tensor) -> Tensor:
        """The integral at any point, which is bilinear between corners of pixels."""
        left, top = x.long().clamp(0, width - 1), y.long().clamp(0, height - 1)
        u, v = x - left, y - top
        upper = integral[top, left] * (1 - u) + integral[top, left + 1] * u
        lower = integral[top + 1, left] * (1 - u) + integral[top + 1, left + 1] * u
        return upper * (1 - v) + lower * v

    x0, x1 = boxes[:, 0::2].double().clamp(0, width).unbind(1)
    y0, y1 = boxes[:, 1::2].double().clamp(0, height).unbind(1)
    inside = upto(x1, y1) - upto(x0, y1) - upto(x1, y0) + upto(x0, y0)
    area = (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)
    return torch.where(area > 0, inside / area, 0.0).to(boxes.dtype)


def centred_inside(boxes: Float[Tensor, "K 4"], frame: Float[Tensor, "4"]) -> Bool[Tensor, "K"]:
    """Return which boxes have their centre in a frame (x0, y0, x1, y1), without its far borders."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centre >= frame[:2]) & (centre < frame[2:])).all(dim=1)


def clipped(boxes: Float[Tensor, "*B K 4"], frame: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B K 4"]:
    """Return boxes cut at a frame; those beyond it have no area."""
    low, high = frame[..., None, :2], frame[..., None, 2:]
    return torch.cat([boxes[..., i : i + 2].maximum(low).minimum(high) for i in (0, 2)], dim=-1)
