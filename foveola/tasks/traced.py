"""A detector's answer without branches on its own data, so that torch.export can express it.

torchvision's proposals, NMS over classes and RoIAlign over levels look at how many boxes there are and go on
by one way or another, which a program cannot. Here are the same steps with its operators `nms` and
`roi_align`, for one view.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import softmax
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import nms, roi_align

from foveola.tasks.pyramid import LEVELS
from foveola.tasks.regions import centred_inside, clipped

APART = 2.0**20  # pixels, above any side of a view
LEAST_PROPOSED, LEAST_FOUND = 1e-3, 1e-2  # pixels: torchvision drops boxes with a side below that


def traced_answer(
    head: Any, features: Float[Tensor, "1 D h w"], extent: Int64[Tensor, "2"]
) -> dict[str, Tensor]:
    """Return what `detect` of a head finds in a view: boxes in its pixels, labels from 1, scores, masks.

    The image lies in the upper left of the view, over `extent` (rows, columns). Masks are those of boxes, [K,
    28, 28].
    """
    maps = head.pyramid(features)
    rows, columns = extent.to(torch.float32).unbind()
    frame = torch.stack((torch.zeros_like(rows), torch.zeros_like(rows), columns, rows))
    boxes, regions = _proposals(head, maps, frame), head.regions
    logits, moves = regions.box_predictor(regions.box_head(_pooled(regions.box_roi_pool, maps, boxes)))
    scores, count = softmax(logits, -1)[:, 1:], logits.shape[1]
    decoded = clipped(regions.box_coder.decode_single(moves, boxes).reshape(-1, 4), frame)
    decoded = decoded.reshape(-1, count, 4)[:, 1:]
    labels = torch.arange(1, count, device=scores.device).expand_as(scores)
    good = (scores > regions.score_thresh) & _wide(decoded, LEAST_FOUND)
    kept = _best(decoded[good], scores[good], labels[good], regions.nms_thresh, regions.detections_per_img)
    found: dict[str, Tensor] = {"boxes": kept[0], "labels": kept[2], "scores": kept[1]}
    if regions.mask_roi_pool is not None:
        assert regions.mask_head is not None
        assert regions.mask_predictor is not None
        pooled = _pooled(regions.mask_roi_pool, maps, found["boxes"])
        masks = regions.mask_predictor(regions.mask_head(pooled)).sigmoid()
        of_label = found["labels"][:, None, None, None].expand(-1, 1, *masks.shape[2:])
        found["masks"] = masks.gather(1, of_label)[:, 0]
    return found


def _proposals(head: Any, maps: list[Tensor], frame: Float[Tensor, "4"]) -> Float[Tensor, "P 4"]:
    """What `AnchorProposals.propose` gives for one view at inference."""
    made = head.proposals
    found, moves = made.head(maps)
    counts = [level[0].numel() for level in found]
    objectness, deltas = concat_box_prediction_layers(found, moves)
    anchors = made.anchors(maps)
    boxes = made.box_coder.decode_single(deltas, anchors)
    there = centred_inside(anchors, frame)
    scores = objectness.flatten().masked_fill(~there, -torch.inf)
    best, levels = [], []
    for level, level_scores in enumerate(scores.split(counts)):
        first = sum(counts[:level])
        best.append(first + level_scores.topk(min(counts[level], made.pre_nms_top_n())).indices)
        levels.append(torch.full_like(best[-1], level))
    chosen, level = torch.cat(best), torch.cat(levels)
    boxes, scores = clipped(boxes[chosen], frame), scores[chosen].sigmoid()
    good = there[chosen] & _wide(boxes, LEAST_PROPOSED)
    return _best(boxes[good], scores[good], level[good], made.nms_thresh, made.post_nms_top_n())[0]


def _wide(boxes: Float[Tensor, "*N 4"], least: float) -> Bool[Tensor, "*N"]:
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(dim=-1)


def _best(
    boxes: Float[Tensor, "N 4"], scores: Float[Tensor, "N"], groups: Int64[Tensor, "N"], iou: float, most: int
) -> tuple[Float[Tensor, "K 4"], Float[Tensor, "K"], Int64[Tensor, "K"]]:
    """Return what NMS within each group leaves, the best first, `most` of them.

    Groups are moved apart, in float64, where no rounding matters. The last two boxes are left by any NMS, and
    cut off: torch.export takes for granted that an NMS leaves two.
    """
    spare = boxes.new_tensor([[0.0, 0, 1, 1], [2, 2, 3, 3]], dtype=torch.float64)
    apart = torch.cat((boxes.double() + APART * (groups[:, None] + 1), spare))
    ranked = torch.cat((scores.double(), spare.new_full((len(spare),), -1.0)))
    kept = nms(apart, ranked, iou)[: -len(spare)][:most]
    return boxes[kept], scores[kept], groups[kept]


def _pooled(pool: Any, maps: list[Tensor], boxes: Float[Tensor, "K 4"]) -> Float[Tensor, "K C r r"]:
    """RoIAlign of each box on the level that fits it: on all levels, of which one is taken."""
    levels = pool.map_levels([boxes])
    rois = torch.cat((torch.zeros_like(boxes[:, :1]), boxes), dim=1)
    parts = []
    for level in range(LEVELS):
        read = roi_align(maps[level], rois, pool.output_size, pool.scales[level], pool.sampling_ratio)
        parts.append(torch.where((levels == level)[:, None, None, None], read, 0.0))
    return torch.stack(parts).sum(dim=0)
