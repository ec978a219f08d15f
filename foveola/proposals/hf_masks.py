"""Objects of MaskFormer, Mask2Former and OneFormer: queries that each have a class and a mask."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveola.geometry import sample
from foveola.proposals.found import (
    FoundInImage,
    ImagePixels,
    OpenedDetector,
    mask_boxes,
    nothing,
    weights_identity,
)
from foveola.proposals.hf_library import HubModel, has_one_size, pillows

LEFT_OF_SEGMENT = 0.8  # fraction of a mask that no surer one may take (Mask2Former's OVERLAP_THRESHOLD)


def open_mask_model(found: HubModel, segments: str, device: torch.device) -> OpenedDetector:
    """Open such a model. Instances may overlap; panoptic segments share the image out, stuff among them.

    Raises UserError for what is not found or not whole.
    """
    one = found.config.model_type == "oneformer"
    processor = found.processor("AutoProcessor" if one else "AutoImageProcessor")
    images_alone = processor.image_processor if one else processor
    model = found.model("AutoModelForUniversalSegmentation", device)
    cut = panoptic if segments == "panoptic" else instances
    names = found.class_names()

    def find(images: Sequence[ImagePixels], score: float) -> list[FoundInImage]:
        task = {"task_inputs": [segments] * len(images)} if one else {}
        inputs = processor(images=pillows(images), return_tensors="pt", **task).to(device)
        outputs = model(**inputs)
        found = []
        for image, filled, classes, masks in zip(
            images,
            inputs["pixel_mask"],
            outputs.class_queries_logits,
            outputs.masks_queries_logits,
            strict=True,
        ):
            size, part = image.shape[:2], inside(filled)
            found.append(cut(classes, masks, part, size, score))
        return found

    identity = weights_identity(model.state_dict())
    return OpenedDetector(
        names, find, identity, one_size=has_one_size(images_alone), reads=frozenset({"segments"})
    )


def inside(filled: Tensor) -> Float[Tensor, "1 1 4"]:
    """Return the box of the image in the padded square, in its unit; `filled` are its pixels, [H, W]."""
    rows, columns = filled.bool().any(dim=1).float().mean(), filled.bool().any(dim=0).float().mean()
    zero = torch.zeros_like(rows)
    return torch.stack([zero, zero, columns, rows])[None, None]


def instances(
    classes: Float[Tensor, "Q C"],
    masks: Float[Tensor, "Q h w"],
    part: Float[Tensor, "1 1 4"],
    size: tuple[int, int],
    score: float,
) -> FoundInImage:
    """Return the objects that score more: as many pairs of query and class as there are queries, best first.

    The score is the probability of the class times the mean probability of the mask within it (Mask2Former,
    section A). `classes` and `masks` are logits, of classes the last is none; `part` is the image's part of
    the map. Masks are cut at the pixels of the image, not at those of the map.
    """
    chances = classes.softmax(dim=-1)[:, :-1]
    chance, pairs = chances.flatten().topk(min(len(masks), chances.numel()))
    kept: list[tuple[Tensor, Tensor, Bool[Tensor, "H W"]]] = []
    for one, pair in zip(chance, pairs, strict=True):
        if one <= score:  # the mask makes it no surer
            break
        logits = sample(masks[None, pair // chances.shape[1], None], part, None, size, "linear")[0, 0, 0]
        mask = logits > 0
        sure = logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6)
        if one * sure > score and mask.any():
            kept.append((one * sure, pair % chances.shape[1], mask))
    if not kept:
        return nothing(size)
    scores, labels, cut = (torch.stack(column) for column in zip(*kept, strict=True))
    return FoundInImage(mask_boxes(cut), scores, labels, cut)


def panoptic(
    classes: Float[Tensor, "Q C"],
    masks: Float[Tensor, "Q h w"],
    part: Float[Tensor, "1 1 4"],
    size: tuple[int, int],
    score: float,
) -> FoundInImage:
    """Return segments that share the image out, as Mask2Former's official code does (arguments: `instances`).

    Each pixel belongs to the query whose class and mask are surest together, if its mask is surer than not.
    Queries whose class scores `score` or less have none, nor those of which surer ones take too much
    (`LEFT_OF_SEGMENT`).
    """
    chance, labels = classes.softmax(dim=-1).max(dim=-1)
    queries = ((labels < classes.shape[1] - 1) & (chance > score)).nonzero()[:, 0].tolist()
    if not queries:
        return nothing(size)
    surest = torch.zeros(size, device=masks.device)
    owner = torch.full(size, -1, device=masks.device)
    own = []
    for query in queries:
        sure = sample(masks[None, query, None], part, None, size, "linear")[0, 0, 0].sigmoid()
        own.append(sure >= 0.5)
        sure = sure * chance[query]
        owner = torch.where(sure > surest, query, owner)
        surest = surest.maximum(sure)
    kept, cut = [], []
    for query, mask in zip(queries, own, strict=True):
        left = owner == query
        if (left & mask).any() and left.sum() >= LEFT_OF_SEGMENT * mask.sum():
            kept.append(query)
            cut.append(left & mask)
    if not kept:
        return nothing(size)
    found = torch.stack(cut)
    return FoundInImage(mask_boxes(found), chance[kept], labels[kept], found)
