"""Mask R-CNN on a pyramid: torchvision's proposals, RoIAlign, matching, losses and NMS; heads as in ViTDet.

Ours is what counts as nothing: proposals beyond the image, and those in crowds that belong to no object.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.init import normal_, zeros_
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.poolers import LevelMapper

from foveola.tasks.pyramid import FINEST, LEVELS, ChannelNorm
from foveola.tasks.regions import centred_inside, clipped, fraction_inside

RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
CROWDED = (
    0.5  # fraction of a proposal in regions that count as nothing, above which it is no example of background
)
BELONGS_FROM = 0.5  # IoU from which a proposal belongs to an object
CANONICAL = 224, 4  # a box of that side is read from the level of that number, where level 2 has strides of 4

ViewTargets = list[
    dict[str, Tensor]
]  # of each view: boxes [K, 4] in pixels, labels [K] from 1, masks [K, H, W]
Ignored = Sequence[Bool[Tensor, "H W"] | None]  # pixels of each view that count as nothing


class AnchorProposals(RegionProposalNetwork):
    """Boxes that may hold an object, of any class: two convolutions on each level, three anchors a cell."""

    def __init__(self, channels: int, strides: Sequence[float], anchor: float) -> None:
        sizes = tuple((max(round(anchor * stride), 1),) for stride in strides)
        super().__init__(
            AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
            RPNHead(channels, len(RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.strides = tuple(strides)

    def propose(
        self, maps: list[Tensor], size: tuple[int, int], inside: Float[Tensor, "B 4"]
    ) -> tuple[list[Float[Tensor, "_ 4"]], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return boxes in views of `size` (rows, columns), best first, cut at the image, which lies `inside`.

        Anchors whose centre is beyond the image propose nothing. Also returns what `losses` needs.
        """
        found, moves = self.head(maps)
        counts = [level[0].numel() for level in found]
        objectness, deltas = (part.float() for part in concat_box_prediction_layers(found, moves))
        anchors = self.anchors(maps)
        proposals = self.box_coder.decode(deltas.detach(), [anchors] * len(inside)).view(len(inside), -1, 4)
        there = torch.stack([centred_inside(anchors, frame) for frame in inside])
        proposals = torch.where(there[..., None], clipped(proposals, inside), 0.0)
        scores = objectness.detach().view_as(there).masked_fill(~there, -torch.inf)
        boxes, _ = self.filter_proposals(proposals, scores, [size] * len(inside), counts)
        return boxes, (objectness, deltas, anchors, there)

    def anchors(self, maps: list[Tensor]) -> Float[Tensor, "A 4"]:
        """Return the anchors of a view: level by level, cell by cell, each with its ratios.

        As torchvision's generator, which takes strides for whole numbers of pixels; not all of patches of 14
        are.
        """
        made = self.anchor_generator
        made.set_cell_anchors(torch.float32, maps[0].device)
        grids = [list(level.shape[-2:]) for level in maps]
        return torch.cat(made.grid_anchors(grids, [[stride, stride] for stride in self.strides]))  # type: ignore[arg-type]

    def losses(
        self, made: tuple[Tensor, ...], inside: Float[Tensor, "B 4"], targets: ViewTargets, ignored: Ignored
    ) -> dict[str, Tensor]:
        """Return how wrong anchors are about being objects, and of those that are, about their boxes."""
        objectness, deltas, anchors, there = made
        assigned = [
            self._assign(anchors, *each) for each in zip(there, inside, targets, ignored, strict=True)
        ]
        labels, matched = [list(column) for column in zip(*assigned, strict=True)]
        if not any(bool((label >= 0).any()) for label in labels):  # all of it is crowd or padding
            return {"proposal": objectness.sum() * 0, "proposal_box": deltas.sum() * 0}
        wanted = self.box_coder.encode(matched, [anchors] * len(inside))
        proposal, box = self.compute_loss(objectness, deltas, labels, list(wanted))
        return {"proposal": proposal, "proposal_box": box}

    def _assign(
        self, anchors: Tensor, there: Tensor, frame: Tensor, target: dict[str, Tensor], ignored: Tensor | None
    ) -> tuple[Float[Tensor, "A"], Float[Tensor, "A 4"]]:
        """1 for an object, 0 for background, -1 for neither; and the box of the object that is nearest."""
        labels, matched = anchors.new_full((len(anchors),), -1.0), torch.zeros_like(anchors)
        inside = anchors[there]
        if len(inside):
            (label,), (box,) = self.assign_targets_to_anchors([inside], [target])
            if ignored is not None:
                label[(label == 0) & (fraction_inside(ignored, clipped(inside, frame)) > CROWDED)] = -1.0
            labels[there], matched[there] = label, box
        return labels, matched


def countable(boxes: Float[Tensor, "P 4"], target: dict[str, Tensor], ignored: Tensor | None) -> Tensor:
    """Return proposals without those that lie in what counts as nothing, and belong to no object."""
    if ignored is None:
        return boxes
    crowded = fraction_inside(ignored, boxes) > CROWDED
    if len(target["boxes"]):
        crowded &= box_iou(boxes, target["boxes"]).amax(dim=1) < BELONGS_FROM
    return boxes[~crowded]


def make_regions(config: Any, classes: int, strides: Sequence[float]) -> RoIHeads:
    """Return the second stage, with keys of a `DetectionConfig`: box heads, and where asked for mask heads.

    Box head: convolutions with LayerNorm and one linear layer on 7 x 7 cells of each proposal. Mask head:
    convolutions with LayerNorm on 14 x 14, a transposed one to 28 x 28, a mask for each class.
    """
    channels, hidden, layers = config.channels, config.hidden, [config.channels] * config.convolutions
    predictor = FastRCNNPredictor(hidden, classes + 1)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        normal_(layer.weight, std=deviation)
        zeros_(layer.bias)
    masks: dict[str, nn.Module] = {}
    if config.masks:
        masks = {
            "mask_roi_pool": _pool(14, strides),
            "mask_head": MaskRCNNHeads(channels, layers, 1, norm_layer=ChannelNorm),
            "mask_predictor": MaskRCNNPredictor(channels, channels, classes + 1),
        }
    return RoIHeads(
        _pool(7, strides),
        FastRCNNConvFCHead((channels, 7, 7), layers, [hidden], norm_layer=ChannelNorm),
        predictor,
        fg_iou_thresh=BELONGS_FROM,
        bg_iou_thresh=BELONGS_FROM,
        batch_size_per_image=config.proposals,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.score,
        nms_thresh=config.nms,
        detections_per_img=config.detections,
        **masks,
    )


def _pool(cells: int, strides: Sequence[float]) -> MultiScaleRoIAlign:
    """RoIAlign on the level that fits a box; torchvision would guess strides, and only as powers of two."""
    names = [str(level) for level in range(LEVELS)]
    pool = MultiScaleRoIAlign(names, cells, sampling_ratio=2)
    side, level = CANONICAL
    pool.scales = [1 / stride for stride in strides[:LEVELS]]
    scale: Any = side * strides[0] / FINEST
    pool.map_levels = LevelMapper(2, 1 + LEVELS, scale, level)
    return pool
