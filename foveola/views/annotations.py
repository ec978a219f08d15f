"""What is annotated in views: instances, cut as their pixels are."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from foveola.data.sample import Instances
from foveola.geometry import boxes_in_views, masks_in_views, pixels_inside
from foveola.logged import Averages

PASTED = 2**26  # bytes of float32 pixels of masks that are pasted at once
CUT = 1e-3  # pixels by which a box must reach out of its view to be cut


class ViewInstances(NamedTuple):
    """The T >= 0 instances that are seen in V views of each of B images, those of a view together.

    `view` is b V + v, ascending. `boxes` are (x0, y0, x1, y1) in pixels of the view, within its pixels of the
    image; of an instance with a mask that the view cuts, the box of the pixels that are left. `labels` are
    class indices (-1 unknown). Where `crowd` is true, a region counts as nothing. `masks` are 1 where an
    instance covers half of a pixel or more; None where objects are boxes.
    """

    view: Int64[Tensor, "T"]
    boxes: Float[Tensor, "T 4"]
    labels: Int64[Tensor, "T"]
    crowd: Bool[Tensor, "T"]
    masks: UInt8[Tensor, "T H W"] | None


def cut_instances(
    instances: Instances, boxes: Float[Tensor, "B V 4"], flips: Bool[Tensor, "B V"], size: int
) -> tuple[ViewInstances, Averages]:
    """Return the instances of views of `size` pixels a side, and the fraction without a pixel left.

    Those are gone: their box lies outside of the view or the image, or their mask covers half of no pixel.
    """
    count = boxes.shape[1]
    inside = pixels_inside(boxes, flips, (size, size)).to(boxes.dtype)
    # Pairs of an instance and a view of its image, those of a view together.
    view = (instances.image[:, None] * count + torch.arange(count, device=boxes.device)).flatten()
    order = view.argsort(stable=True)
    view, pair = view[order], order // count
    of_view = boxes.flatten(0, 1)[view], flips.flatten()[view]
    whole = boxes_in_views(instances.boxes[pair], *of_view, (size, size))
    limits = inside.flatten(0, 1)[view]
    found = torch.minimum(torch.maximum(whole, limits[:, [0, 1, 0, 1]]), limits[:, [2, 3, 2, 3]])
    seen = (found[:, 2:] > found[:, :2]).all(dim=1).nonzero()[:, 0]
    masks = None
    if instances.masks is not None:
        cut = ((found - whole).abs() > CUT).any(dim=1)
        views, mirrored = (each[seen] for each in of_view)
        masks, around = _paste(instances, pair[seen], views, mirrored, found[seen], size)
        found[seen] = torch.where(cut[seen, None], around, found[seen])
        covers = (around[:, 2] > 0).nonzero()[:, 0]
        masks, seen = _compact(masks, covers), seen[covers]
    pair, count = pair[seen], len(seen)
    lost = Averages((torch.tensor(float(len(view) - count)),), len(view))
    return ViewInstances(view[seen], found[seen], instances.labels[pair], instances.crowd[pair], masks), lost


def _paste(
    instances: Instances,
    which: Int64[Tensor, "S"],
    views: Float[Tensor, "S 4"],
    flips: Bool[Tensor, "S"],
    boxes: Float[Tensor, "S 4"],
    size: int,
) -> tuple[UInt8[Tensor, "S {size} {size}"], Float[Tensor, "S 4"]]:
    """Masks of instances in views, and the boxes around their pixels (0 where there is none).

    Each is pasted into a window of the view around its box in it (`boxes`), whose side is a power of two,
    together with others of such windows: small ones cost little.
    """
    assert instances.masks is not None
    masks = torch.zeros(len(which), size, size, dtype=torch.uint8, device=which.device)
    around = torch.zeros_like(boxes)
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) + 2  # pixels that are touched, at most
    sides = (2 ** sides.log2().ceil()).long().clamp(max=size)
    for side in sides.unique().tolist():
        for block in (sides == side).nonzero()[:, 0].split(max(PASTED // (4 * side**2), 1)):
            corner = boxes[block, :2].long().clamp(max=size - side)
            start = corner.to(boxes.dtype)
            start[:, 0] = torch.where(flips[block], size - side - start[:, 0], start[:, 0])
            low, unit = views[block, :2], (views[block, 2:] - views[block, :2]) / size
            window = torch.cat((low + start * unit, low + (start + side) * unit), dim=1)
            source = which[block]
            pasted = masks_in_views(
                instances.masks[source], instances.boxes[source], window, flips[block], (side, side)
            ).to(torch.uint8)
            x, y = (corner[:, :, None] + torch.arange(side, device=corner.device)).unbind(1)
            masks[block[:, None, None], y[:, :, None], x[:, None, :]] = pasted
            around[block] = _boxes_of(pasted, corner)
    return masks, around


def _boxes_of(masks: UInt8[Tensor, "T h w"], corner: Int64[Tensor, "T 2"]) -> Float[Tensor, "T 4"]:
    """The smallest boxes around masks that lie at a corner; 0 around those that are empty."""
    edges = []
    for axis, low in zip((1, 2), corner.T, strict=True):  # over rows, which leaves columns; and over columns
        occupied = masks.amax(dim=axis)
        edges.append((low + occupied.argmax(dim=1), low + occupied.shape[1] - occupied.flip(1).argmax(dim=1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack((x0, y0, x1, y1), dim=1).float() * masks.amax(dim=(1, 2))[:, None]


def _compact(masks: UInt8[Tensor, "S H W"], indices: Int64[Tensor, "T"]) -> UInt8[Tensor, "T H W"]:
    """Some of the masks, by ascending index, in the memory of all of them: there may be hundreds of MB."""
    end = 0
    for block in indices.split(max(PASTED // masks[:1].numel(), 1)) if len(indices) < len(masks) else ():
        masks[end : end + len(block)] = masks[block]
        end += len(block)
    return masks[: len(indices)]
