"""Semantic segmentation: a class for every pixel, by a linear layer on patches or by a mask transformer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveola import distributed
from foveola.config import UserError, key
from foveola.data.sample import IGNORE
from foveola.methods.method import Output
from foveola.models.encoder import Encoder
from foveola.models.vit import Features, VisionTransformer, ViTConfig
from foveola.schedules import Progress
from foveola.tasks.decoders import DecoderConfig, enlarged_logits
from foveola.tasks.drawn import VIEWS_DRAWN, label_maps_figure, view_images
from foveola.tasks.sliding import LookConfig, label_map, looks
from foveola.tasks.task import Image, LabelMap, TaskConfig, TaskHead, TaskMethod, check_annotated_views
from foveola.views.batch import Batch, ViewsConfig


@dataclass(frozen=True)
class SegmentationConfig(TaskConfig):
    """Defaults: Segmenter with the linear decoder."""

    annotations = "label_maps"
    protocol = "segment"

    name: Literal["segmentation"] = key("segmentation", "which method this is")
    decoder: DecoderConfig = key(factory=DecoderConfig, help="from patches to logits")
    look: LookConfig = key(factory=LookConfig, help="how whole images are segmented, once it has learned")

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views or the network cannot serve the task."""
        check_annotated_views(self.name, views)
        self.decoder.check(model.shape[0])
        try:
            self.look.check(model.patch_size)
        except ValueError as error:
            raise ValueError(f"method.look.{error}") from error

    def with_data(self, source: Any) -> "SegmentationConfig":
        """Return the same with the classes of the data. Raises UserError for data without label maps."""
        if not hasattr(source, "label_map"):
            raise UserError(
                f"data: {source.name} has no label for each pixel, which segmentation learns; use masks:, "
                "voc:, ade20k: and so on"
            )
        found = super().with_data(source)
        assert isinstance(found, SegmentationConfig)
        if len(found.names) < 2:
            only = ", ".join(found.names)
            raise UserError(f"data: {source.name} has one class, {only!r}: there is nothing to tell apart")
        return found

    @property
    def pool(self) -> Literal["average"]:
        """What stands for an image in the encoder that is kept: patches are all that learned."""
        return "average"


class SegmentationHead(TaskHead):
    """A decoder on the patches of the last block, after the final norm."""

    config: SegmentationConfig

    def __init__(self, config: SegmentationConfig, model: ViTConfig) -> None:
        super().__init__(config, model)
        self.decoder = config.decoder.make(model.shape[0], len(config.names))

    def forward(
        self, features: Features, counted: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """Return the logits of patches. `counted` are those that have pixels of the image; None: all."""
        return self.decoder(features.patches, counted)

    def logits(
        self, backbone: VisionTransformer, images: Float[Tensor, "B ch H W"]
    ) -> Float32[Tensor, "B C H W"]:
        """Return logits at the pixels of normalised images of whole patches."""
        features = backbone(images)
        return enlarged_logits(self(features), features.grid, (images.shape[2], images.shape[3]))

    @torch.no_grad()
    def predict(
        self, encoder: Encoder, images: Sequence[Image], look: LookConfig | None = None
    ) -> list[LabelMap]:
        """Return the class of each pixel of images of any size; `look` is how, None as in its config."""
        transform, found = encoder.config.transform, []
        for image in images:
            own = looks(
                image, look or self.config.look, lambda seen: self.logits(encoder.backbone, seen),
                lambda pixels: encoder.normalise(pixels.to(encoder.device)), transform.crop,
                encoder.patch_size, transform.interpolation,
            )  # fmt: skip
            found.append(LabelMap(self.classes, label_map(own, (image.shape[0], image.shape[1]))))
        return found


class Segmentation(TaskMethod):
    """An encoder and a decoder learn the classes of pixels (Segmenter, Section 3).

    The loss is the mean cross-entropy of all labelled pixels of all processes; pixels of no class and of
    padding do not count. The released codes take the mean in each process instead, over its labelled pixels
    (Segmenter) or over all of its pixels (MMSegmentation), and then the mean of processes. With a frozen
    encoder it is the linear probe on augmented images (DINOv2, Section 7.4).
    """

    Config = SegmentationConfig
    Head = SegmentationHead

    def __init__(self, config: SegmentationConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__(config, model, views)
        self.seen: list[Int64[Tensor, 2]] = []  # labelled pixels: right ones and all, since the last look
        # Of the last step: views, their labels, logits of patches.
        self.shown: tuple[Tensor, ...] | None = None
        self.colors = views.color.mean, views.color.std

    def forward(self, batch: Batch, progress: Progress) -> Output:
        views, head = batch.large, self.student.task_head
        assert isinstance(head, SegmentationHead)
        assert views.label_maps is not None
        images, maps = views.pixels[:, 0], views.label_maps[:, 0]
        features = self.student.backbone(images)
        counted = inside_patches(views.inside[:, 0], features.grid, self.student.backbone.config.patch_size)
        answers = head(features, counted)
        logits = enlarged_logits(answers, features.grid, (images.shape[2], images.shape[3]))
        loss, right, labelled = summed_loss(logits, maps)
        self.shown = tuple(each[:VIEWS_DRAWN].detach().clone() for each in (images, maps, answers))
        # Gradients are averaged over processes, of which each has its own number of labelled pixels.
        weight = distributed.all_reduce_sum(labelled.float()).clamp(min=1)
        self.seen.append(torch.stack((right, labelled)))
        return Output({"segmentation": loss * distributed.world_size() / weight}, dict(batch.facts))

    def diagnose(self) -> dict[str, float]:
        """Return the fraction of labelled pixels of training views whose class was found."""
        if not self.seen:
            return {}
        right, count = distributed.all_reduce_sum(torch.stack(self.seen).sum(dim=0)).tolist()
        self.seen = []
        return {"pixel_accuracy": right / max(count, 1)}

    @torch.no_grad()
    def figures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Return views of the last step in columns: as they are, their labels, and the predictions."""
        if self.shown is None:
            return {}
        views, maps, predictions = self.shown
        size, patch_size = (views.shape[2], views.shape[3]), self.student.backbone.config.patch_size
        logits = enlarged_logits(predictions, (size[0] // patch_size, size[1] // patch_size), size)
        predicted = logits.argmax(dim=1).to(torch.uint8)
        images = view_images(views, *self.colors)
        return {"segmentation": label_maps_figure(images, maps, predicted, len(self.config.names))}


def summed_loss(
    logits: Float32[Tensor, "B C H W"], maps: UInt8[Tensor, "B H W"]
) -> tuple[Float32[Tensor, ""], Int64[Tensor, ""], Int64[Tensor, ""]]:
    """Return the sum of the cross-entropies of labelled pixels, how many are right, how many there are."""
    with torch.autocast(logits.device.type, enabled=False):
        labels = maps.long()
        total = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    right = (logits.detach().argmax(dim=1) == labels).sum()
    return total, right, (labels != IGNORE).sum()


def inside_patches(
    inside: Int64[Tensor, "B 4"], grid: tuple[int, int], patch_size: int
) -> Bool[Tensor, "B N"]:
    """Return which patches have pixels of the image, from the pixels x0, y0, x1, y1 that lie in it."""
    x0, y0, x1, y1 = inside.unbind(dim=1)
    rows, columns = (torch.arange(count, device=inside.device) * patch_size for count in grid)
    tall = (rows < y1[:, None]) & (rows + patch_size > y0[:, None])
    wide = (columns < x1[:, None]) & (columns + patch_size > x0[:, None])
    return (tall[:, :, None] & wide[:, None, :]).flatten(1)
