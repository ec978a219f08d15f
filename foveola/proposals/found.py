"""What models of others say of an image, before it is proposals: classes by name, boxes cut at the image."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foveola.config import ConfigError, UserError, nearest
from foveola.data.values import ImagePixels
from foveola.proposals.proposal import Proposals

NAMELESS = ("__background__", "N/A")  # of outputs that are no class, in lists of names


@dataclass(frozen=True, eq=False)
class FoundInImage:
    """What a model finds in an image, in any order: boxes in its pixels, scores, indices in the model's
    names, masks at its size.
    """

    boxes: Float[Tensor, "K 4"]
    scores: Float[Tensor, "K"]
    labels: Int64[Tensor, "K"]
    masks: Bool[Tensor, "K H W"] | None = None


Find = Callable[[Sequence[ImagePixels], float], list[FoundInImage]]


@dataclass(frozen=True, eq=False)
class OpenedDetector:
    """A model of another library that finds objects.

    `find(images, score)` returns what scores more in each image. With `one_size` the model sees all images at
    one size, so that any may stand in a batch. `score` is the usual threshold, `sees` that of a
    `Proposer`, `reads` names the keys that are read besides those that all read.
    """

    names: tuple[str, ...]
    find: Find
    identity: str
    score: float = 0.5
    one_size: bool = False
    sees: Callable[[Any], Any] | None = None
    reads: frozenset[str] = field(default=frozenset())


@dataclass(frozen=True, eq=False)
class ClassMap:
    """The classes that count, and of each output of a model the index among them, -1 for none."""

    classes: tuple[str, ...]
    index: Int64[np.ndarray, "C"]


def chosen(names: Sequence[str], wanted: Sequence[str] | None, agnostic: bool, model: str) -> ClassMap:
    """Return which outputs of a model are kept, and as what.

    Outputs of one name are one class, and those without a name are left out. Raises ConfigError for a wanted
    class that the model does not know, or that is named twice.
    """
    known = tuple(dict.fromkeys(name for name in names if name not in NAMELESS))
    selected = known if wanted is None else tuple(wanted)
    for name in selected:
        if name not in known:
            near = nearest(name, known)
            hint = (
                f"did you mean {near!r}?"
                if near
                else f"it knows {', '.join(known[:5])}{', ...' * (len(known) > 5)}"
            )
            raise ConfigError(f"classes: {model} knows no {name!r}; {hint}")
    if len(set(selected)) < len(selected) or not selected:
        raise ConfigError(
            f"classes: expected different names of classes, got {', '.join(selected) or 'none'}"
        )
    index_of = {name: 0 if agnostic else row for row, name in enumerate(selected)}
    index = np.array([index_of.get(name, -1) for name in names], np.int64)
    return ClassMap(("object",) if agnostic else selected, index)


def proposals_of(
    found: FoundInImage, size: tuple[int, int], score: float, class_map: ClassMap, model: str
) -> Proposals:
    """Return what a model found in an image of `size` (rows, columns) as proposals, best first.

    Boxes are cut at the image. What scores `score` or less, has a class that is not kept, a box without area
    or a mask without pixels is left out. Raises UserError for numbers that are not finite.
    """
    boxes, scores = (each.detach().float().cpu() for each in (found.boxes, found.scores))
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise UserError(f"{model} gives numbers that are not finite")
    boxes = torch.stack([boxes[:, i].clamp(0, size[1 - i % 2]) for i in range(4)], dim=1)
    labels = torch.from_numpy(class_map.index)[found.labels.cpu()]
    there = (labels >= 0) & (scores > score) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if found.masks is not None:
        there &= found.masks.flatten(1).any(dim=1).cpu()
    order = scores.masked_fill(~there, -torch.inf).argsort(descending=True, stable=True)[: int(there.sum())]
    masks = None if found.masks is None else found.masks[order.to(found.masks.device)].cpu().numpy()
    return Proposals(boxes[order].numpy(), scores[order].numpy(), labels[order].numpy(), masks)


def nothing(size: tuple[int, int]) -> FoundInImage:
    """Return that nothing was found in an image of `size`."""
    none = torch.zeros(0)
    return FoundInImage(torch.zeros(0, 4), none, none.long(), torch.zeros(0, *size, dtype=torch.bool))


def mask_boxes(masks: Bool[Tensor, "K H W"]) -> Float[Tensor, "K 4"]:
    """Return the least boxes that hold the pixels of masks, (x0, y0, x1, y1); zeros where there are none."""
    sides = []
    for axis in (1, 2):  # columns, then rows
        there = masks.any(dim=axis)
        first, last = there.float().argmax(dim=1), there.shape[1] - there.flip(1).float().argmax(dim=1)
        sides += [first * there.any(dim=1), last * there.any(dim=1)]
    return torch.stack([sides[0], sides[2], sides[1], sides[3]], dim=1).float()


def weights_identity(state: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that change with any tensor of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def frozen(model: Any, device: torch.device) -> Any:
    """Return a module of another library on `device`, for inference alone."""
    return model.requires_grad_(False).eval().to(device)
