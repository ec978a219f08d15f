"""Masks that SAM and SAM 2 cut, `hf:NAME` or `hf:FOLDER`: where a grid of points lies, or of given boxes."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from foveola.config import UserError, key, to_dict
from foveola.data.instances import AGNOSTIC
from foveola.data.sample import Objects
from foveola.proposals.found import (
    ClassMap,
    FoundInImage,
    ImagePixels,
    mask_boxes,
    nothing,
    proposals_of,
    weights_identity,
)
from foveola.proposals.hf_library import HubModel, pillows
from foveola.proposals.proposal import Proposals
from foveola.zoo.foreign import import_library

PROCESSORS = {"SamModel": "SamProcessor", "Sam2Model": "Sam2Processor"}
(UNKNOWN,) = AGNOSTIC  # the class of what no class is known of
NUMBERS_AT_ONCE = 2**28  # numbers of masks at the size of the image that are in memory at once: 1 GB


@dataclass(frozen=True)
class SegmenterConfig:
    """Settings of segmenters. Defaults: the automatic masks of SAM (its section 5 and code)."""

    prompt: Literal["points", "boxes"] = key(
        "points", "prompts: a grid of points (automatic masks), or the boxes of the objects of the data"
    )
    points_per_side: int = key(32, "points of the grid on each axis", at_least=1, at_most=128)
    score: float | None = key(
        None,
        "predicted IoU above which masks are kept; null = 0.88 for points, 0 for boxes",
        at_least=0,
        below=1,
    )
    stability: float = key(
        0.95,
        "stability from which on masks are kept: IoU of their pixels above +stability_offset and "
        "above -stability_offset",
        at_least=0,
        below=1,
    )
    stability_offset: float = key(1.0, "shift of the logits by which stability is judged", at_least=0)
    nms: float = key(0.7, "IoU of boxes above which the worse of two masks is dropped", above=0, at_most=1)
    prompts_at_once: int = key(64, "points or boxes of an image in a pass", at_least=1)

    def unread(self) -> dict[str, str]:
        """Return keys that change nothing, and why."""
        if self.prompt == "points":
            return {}
        of_points = ("points_per_side", "stability", "stability_offset", "nms")
        return dict.fromkeys(of_points, "each box has its one mask (prompt=boxes)")


class _Cut(NamedTuple):
    """Masks of an image, with the number of the prompt that each is of."""

    scores: Float[Tensor, "k"]
    boxes: Float[Tensor, "k 4"]
    prompts: Int64[Tensor, "k"]
    packed: UInt8[np.ndarray, "k bytes"]  # 8 pixels a byte


class Segmenter:
    """A `Proposer` that asks a segmenter.

    With `prompts` it wants the objects of each image, whose boxes it cuts masks for. Their classes are kept
    where it knows what they are (`of_classes`).
    """

    classes: tuple[str, ...] = AGNOSTIC
    batch_size = 1  # of images; their prompts fill a pass

    def __init__(self, model: Any, processor: Any, config: SegmenterConfig, name: str) -> None:
        self.model, self.processor, self.config, self.name = model, processor, config, name
        self.prompts = config.prompt == "boxes"
        usual = 0.0 if self.prompts else 0.88
        self.score = usual if config.score is None else config.score
        self.identity = weights_identity(model.state_dict())

    def of_classes(self, classes: Sequence[str]) -> "Segmenter":
        """Return the same for boxes whose labels are indices of these classes, which masks keep.

        What has no class is an "object".
        """
        other = copy(self)
        other.classes = tuple(dict.fromkeys([*classes, UNKNOWN]))
        return other

    def describe(self) -> dict[str, Any]:
        """Return kind, model, identity of the weights and settings."""
        settings = {**to_dict(self.config), "score": self.score}
        for name in ("prompts_at_once", *self.config.unread()):
            del settings[name]  # which change nothing that is found
        return {"kind": "segment", "model": self.name, "weights": self.identity, **settings}

    @torch.no_grad()
    def propose(
        self, images: Sequence[ImagePixels], objects: Sequence[Objects | None] | None = None, /
    ) -> list[Proposals]:
        """Return the masks of each image.

        Args:
            objects: of each image, boxes in its unit square; of `prompt=boxes` alone. Each has one mask, and
                an image without any has none.

        Raises UserError where objects are wanted and not given.
        """
        if self.prompts and objects is None:
            raise UserError(f"{self.name} is asked by boxes (prompt=boxes), and there are none")
        given = objects if self.prompts and objects is not None else [None] * len(images)
        return [self._look(image, each) for image, each in zip(images, given, strict=True)]

    def _look(self, image: ImagePixels, objects: Objects | None) -> Proposals:
        size = (image.shape[0], image.shape[1])
        shapes = self._boxes(objects, size) if self.prompts else self._points(size)
        found = self._cut(image, shapes, self._labels(objects, len(shapes))) if len(shapes) else nothing(size)
        kept = ClassMap(self.classes, np.arange(len(self.classes)))
        return proposals_of(found, size, self.score, kept, self.name)

    def _labels(self, objects: Objects | None, count: int) -> Int64[Tensor, "n"]:
        """The class of each prompt."""
        unknown = self.classes.index(UNKNOWN)
        if objects is None or objects.labels is None or self.classes == AGNOSTIC:
            return torch.full((count,), unknown)
        return torch.from_numpy(np.where(objects.labels < 0, unknown, objects.labels))

    def _points(self, size: tuple[int, int]) -> Float32[np.ndarray, "n 1 2"]:
        """A grid of points (x, y) in pixels, in the middles of as many cells that fill the image."""
        side = self.config.points_per_side
        middles = (np.arange(side) + 0.5) / side
        y, x = np.meshgrid(middles * size[0], middles * size[1], indexing="ij")
        return np.stack([x, y], -1).reshape(-1, 1, 2).astype(np.float32)

    def _boxes(self, objects: Objects | None, size: tuple[int, int]) -> Float32[np.ndarray, "n 4"]:
        boxes = np.zeros((0, 4)) if objects is None else objects.boxes
        return (boxes * np.array([size[1], size[0]] * 2)).astype(np.float32)

    def _cut(
        self, image: ImagePixels, shapes: Float32[np.ndarray, "n *_"], labels: Int64[Tensor, "n"]
    ) -> FoundInImage:
        """The masks that the model cuts for points or boxes of these classes in an image."""
        size = (image.shape[0], image.shape[1])
        parts = zip(*self._answers(image, shapes), strict=True)
        scores, boxes, prompts = (torch.cat(next(parts)) for _ in range(3))
        packed = np.concatenate(next(parts))
        if not self.prompts:
            kept = import_library("torchvision.ops", "detection").nms(boxes, scores, self.config.nms)
            scores, boxes, prompts, packed = scores[kept], boxes[kept], prompts[kept], packed[kept.numpy()]
        masks = np.unpackbits(packed, axis=1, count=size[0] * size[1]).reshape(-1, *size).astype(bool)
        return FoundInImage(boxes, scores, labels[prompts], torch.from_numpy(masks))

    def _answers(self, image: ImagePixels, shapes: Float32[np.ndarray, "n *_"]) -> Iterator[_Cut]:
        """Masks of prompts, a block of them at a time."""
        device, size = self.model.device, (image.shape[0], image.shape[1])
        prompt = {"input_boxes": [shapes.tolist()]} if self.prompts else {"input_points": [shapes.tolist()]}
        inputs = self.processor(images=pillows([image]), return_tensors="pt", **prompt)
        embedded = self.model.get_image_embeddings(inputs["pixel_values"].to(device))
        name = "input_boxes" if self.prompts else "input_points"
        of_sam = ("reshaped_input_sizes",)  # before padding, which SAM 2 has not
        sizes = {known: inputs[known] for known in of_sam if known in inputs}
        none = torch.zeros(0)
        packed = np.zeros((0, -(-size[0] * size[1] // 8)), np.uint8)
        yield _Cut(none, torch.zeros(0, 4), none.long(), packed)
        numbers = torch.arange(len(shapes)).split(self.config.prompts_at_once)
        prompts = inputs[name].to(device, torch.float32).split(self.config.prompts_at_once, dim=1)
        for number, some in zip(numbers, prompts, strict=True):
            labels = (
                {} if self.prompts else {"input_labels": torch.ones_like(some[..., 0], dtype=torch.int64)}
            )
            answer = self.model(
                image_embeddings=embedded, multimask_output=not self.prompts, **{name: some}, **labels
            )
            scores, masks = answer.iou_scores[0].flatten().float(), answer.pred_masks[0].flatten(0, 1).float()
            of = number.to(device).repeat_interleave(len(scores) // len(number))
            sure = scores > self.score
            count = max(NUMBERS_AT_ONCE // (size[0] * size[1]), 1)
            parts = (each[sure].split(count) for each in (scores, of, masks))
            for few, which, those in zip(*parts, strict=True):
                if len(few):
                    (large,) = self.processor.image_processor.post_process_masks(
                        [those[None]], [size], binarize=False, **sizes
                    )
                    yield self._kept(few, which, large[0])

    def _kept(
        self, scores: Float[Tensor, "k"], prompts: Int64[Tensor, "k"], logits: Float[Tensor, "k H W"]
    ) -> _Cut:
        """What is stable of masks at the size of the image."""
        masks = logits > 0
        stable = masks.flatten(1).any(dim=1)
        if not self.prompts:
            offset = self.config.stability_offset
            inner, outer = ((logits > shift).flatten(1).sum(dim=1) for shift in (offset, -offset))
            stable &= inner > self.config.stability * outer
        masks = masks[stable]
        packed = np.packbits(masks.flatten(1).cpu().numpy(), axis=1)
        return _Cut(scores[stable].cpu(), mask_boxes(masks).cpu(), prompts[stable].cpu(), packed)


def segmenter(model: str, config: SegmenterConfig, device: str | torch.device = "cpu") -> Segmenter:
    """Open a segmenter as a `Proposer`: `hf:NAME` or `hf:FOLDER` of a SAM or SAM 2 of transformers.

    Code that comes with a model is never run. Raises UserError, in one line, for models that are not found,
    that are no such segmenters or whose library is not installed.
    """
    kind, _, rest = model.partition(":")
    if kind != "hf":
        raise UserError(
            f"{model} is no segmenter: expected hf:NAME or hf:FOLDER, such as hf:facebook/sam-vit-base"
        )
    found = HubModel.named(rest)
    auto = import_library("transformers.models.auto.modeling_auto", "hf")
    made = auto.MODEL_FOR_MASK_GENERATION_MAPPING_NAMES.get(found.config.model_type, found.architecture)
    if made not in PROCESSORS:
        raise UserError(f"{found.where} is a {made}: segmenters are {' and '.join(PROCESSORS)}")
    processor = found.processor(PROCESSORS[made])
    network = found.model("AutoModelForMaskGeneration", torch.device(device))
    return Segmenter(network, processor, config, model)
