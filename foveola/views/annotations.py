"""What is annotated in views: instances, cut as their pixels are."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from foveola.data.sample import Instances
from foveola.geometry import boxes_in_views, masks_in_views, pixels_inside

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
) -> tuple[ViewInstances, Float[Tensor, ""]]:
    """Return the instances of views of `size` pixels a side, and the share of all that no pixel is left of.

    Those are gone: their box lies outside of the view or the image, or their mask covers half of no pixel.
    """
    views = boxes.shape[1]
    inside = pixels_inside(boxes, flips, (size, size)).to(boxes.dtype)
    # Pairs of an instance and a view of its image, those of a view together.
    view = (instances.image[:, None] * views + torch.arange(views, device=boxes.device)).flatten()
    order = view.argsort(stable=True)
    view, pair = view[order], order // views
    of_view = boxes.flatten(0, 1)[view], flips.flatten()[view]
    whole = boxes_in_views(instances.boxes[pair], *of_view, (size, size))
    limits = inside.flatten(0, 1)[view]
    found = torch.minimum(torch.maximum(whole, limits[:, [0, 1, 0, 1]]), limits[:, [2, 3, 2, 3]])
    seen = (found[:, 2:] > found[:, :2]).all(dim=1).nonzero()[:, 0]
    masks = None
    if instances.masks is not None:
        cut = ((found - whole).abs() > CUT).any(dim=1)
        masks, seen = _paste(instances, pair, of_view, seen, size)
        found[seen] = torch.where(cut[seen, None], _boxes_of(masks), found[seen])
    pair, kept = pair[seen], len(seen)
    lost = torch.tensor(1 - kept / max(len(view), 1))
    return ViewInstances(view[seen], found[seen], instances.labels[pair], instances.crowd[pair], masks), lost


def _paste(
    instances: Instances,
    pair: Int64[Tensor, "P"],
    of_view: tuple[Float[Tensor, "P 4"], Bool[Tensor, "P"]],
    seen: Int64[Tensor, "S"],
    size: int,
) -> tuple[UInt8[Tensor, "T {size} {size}"], Int64[Tensor, "T"]]:
    """Masks of those of the `seen` pairs that cover any pixel, and which pairs these are; some at a time."""
    assert instances.masks is not None
    masks = torch.empty(len(seen), size, size, dtype=torch.uint8, device=seen.device)
    left, end = [seen[:0]], 0
    for some in seen.split(max(PASTED // (4 * size**2), 1)):
        source, (boxes, flips) = pair[some], of_view
        pasted = masks_in_views(
            instances.masks[source], instances.boxes[source], boxes[some], flips[some], (size, size)
        )
        some_left = pasted.flatten(1).any(dim=1).nonzero()[:, 0]
        masks[end : end + len(some_left)] = pasted[some_left]
        left.append(some[some_left])
        end += len(some_left)
    return masks[:end], torch.cat(left)


def _boxes_of(masks: UInt8[Tensor, "T H W"]) -> Float[Tensor, "T 4"]:
    """The smallest boxes around masks that are not empty."""
    edges = []
    for axis in (1, 2):  # over rows: columns that hold a pixel, and the other way round
        some = masks.amax(dim=axis) if len(masks) else masks.new_zeros(0, 1)
        edges.append((some.argmax(dim=1), some.shape[1] - some.flip(1).argmax(dim=1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack((x0, y0, x1, y1), dim=1).float()
