"""Detection and instance segmentation as in ViTDet: Mask R-CNN on a simple pyramid over a plain ViT."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

from foveola.config import ConfigError, UserError, key
from foveola.data.sample import have_masks
from foveola.drawing.boxes import DrawnObjects
from foveola.methods.method import Output
from foveola.models.encoder import Encoder
from foveola.models.tokens import Inputs
from foveola.models.transform import resize
from foveola.models.vit import ViTConfig
from foveola.schedules import Progress
from foveola.tasks.drawn import VIEWS_DRAWN, detections_figure, drawn_detections, view_images
from foveola.tasks.pyramid import LEVELS, Pyramid, as_map, factors, strides
from foveola.tasks.regions import drawn
from foveola.tasks.task import (
    Detections,
    TaskConfig,
    TaskHead,
    TaskMethod,
    at_rest,
    check_annotated_views,
)
from foveola.views.batch import Batch, ViewsConfig

if TYPE_CHECKING:
    from foveola.tasks.rcnn import Ignored, ViewTargets

LEAST = 1.0  # pixels: of less of an object nothing can be learned, and it counts as nothing


@dataclass(frozen=True)
class DetectionConfig(TaskConfig):
    """Defaults: ViTDet, with the numbers of its Mask R-CNN."""

    annotations = "instances"
    protocol = "detect"
    knows_field = True  # a view is the whole field, as it is the whole of a table

    name: Literal["detection"] = key("detection", "which method this is")
    masks: bool | None = key(None, "whether masks of objects are learned; null = where the data have them")
    channels: int = key(256, "channels of the maps of the pyramid and of the heads", at_least=1)
    hidden: int = key(1024, "width of the linear layer of the box head", at_least=1)
    convolutions: int = key(4, "convolutions of the box head and of the mask head", at_least=0)
    anchor: float = key(8.0, "side of anchors, over the stride of their map", above=0)
    proposals: int = key(512, "proposals of an image from which the heads learn", at_least=1)
    image_size: int | None = key(
        None, "pixels of the longer side of an image at inference; null = views.global_size", at_least=8
    )
    score: float = key(0.05, "detections of lower scores are not given", at_least=0, below=1)
    nms: float = key(
        0.5, "IoU above which the worse of two detections of a class is dropped", above=0, at_most=1
    )
    detections: int = key(100, "largest number of detections of an image", at_least=1)

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views or the network cannot serve the method."""
        check_annotated_views(self.name, views)
        sizes = {"views.global_size": views.global_size, "method.image_size": self.image_size}
        for name, size in sizes.items():
            if size is not None:
                check_cells(size, model.patch_size, name)

    def with_data(self, source: Any) -> "DetectionConfig":
        """Return the same with the classes of the data, and whether masks are learned.

        Raises UserError for data without objects, ConfigError for masks of data that have none.
        """
        if not source.has_objects:
            raise UserError(f"data: {source.name} has no objects, which method.name=detection learns")
        classes = super().with_data(source).names
        there = have_masks(source) if self.masks is not False else False
        if self.masks and not there:
            raise ConfigError(f"method.masks=true: the objects of {source.name} are boxes; leave it out")
        return replace(self, classes=classes, masks=there)


def check_cells(size: int, patch_size: int, name: str) -> None:
    """Raise ValueError unless squares of that side are made of whole cells on all levels of the pyramid."""
    cell = round(patch_size / min(1.0, factors(patch_size)[-1]))
    if size % cell:
        near = " or ".join(str(side) for side in (size - size % cell, size - size % cell + cell) if side)
        raise ValueError(f"{name}={size} is not a multiple of {cell}, a cell of the coarsest map; try {near}")


class DetectionHead(TaskHead):
    """Pyramid, proposals, box heads and mask heads."""

    config: DetectionConfig

    def __init__(self, config: DetectionConfig, model: ViTConfig) -> None:
        super().__init__(config, model)
        try:
            from foveola.tasks import rcnn
        except ImportError as error:
            raise UserError(
                "method.name=detection needs torchvision: pip install 'foveola[detection]'"
            ) from error
        self.pyramid = Pyramid(model.shape[0], model.patch_size, config.channels)
        apart = strides(model.patch_size)
        self.proposals = rcnn.AnchorProposals(config.channels, apart, config.anchor)
        self.regions = rcnn.make_regions(config, len(config.names), apart)

    def losses(
        self,
        features: Float[Tensor, "B D h w"],
        size: tuple[int, int],
        inside: Float[Tensor, "B 4"],
        targets: "ViewTargets",
        ignored: "Ignored",
    ) -> dict[str, Tensor]:
        """Return the losses of views of `size` (rows, columns), by name.

        Args:
            features: what the encoder says of the views.
            inside: (x0, y0, x1, y1) of the image in each view, in pixels.
            targets: of each view its objects, in pixels.
            ignored: of each view the pixels that count as nothing; None for none.
        """
        from foveola.tasks import rcnn

        maps = self.pyramid(features)
        boxes, made = self.proposals.propose(maps, size, inside)
        losses = self.proposals.losses(made, inside, targets, ignored)
        each = zip(boxes, targets, ignored, strict=True)
        boxes = [rcnn.countable(*one) for one in each]
        if not sum(map(len, boxes)) + sum(len(target["boxes"]) for target in targets):
            nothing = torch.stack([parameter.sum() for parameter in self.regions.parameters()]).sum() * 0
            return losses | {"class": nothing}
        _, found = self.regions(_named(maps), boxes, [size] * len(inside), targets)
        names = {"loss_classifier": "class", "loss_box_reg": "box", "loss_mask": "mask"}
        return losses | {names[name]: value for name, value in found.items()}

    @torch.no_grad()
    def predict(self, encoder: Encoder, images: Sequence[Shaped[np.ndarray, "_ _ ch"]]) -> list[Detections]:
        """Return the objects of each image, which goes through the networks alone.

        Its longer side is resized to `image_size` (by default to the encoder's crop), and the rest of the
        square is the mean colour, as in training.
        """
        return [self._look(encoder, image) for image in images]

    def side(self, encoder: Encoder) -> int:
        """Return the pixels of a side of the square in which it looks at an image."""
        return self.config.image_size or encoder.config.transform.crop

    def _look(self, encoder: Encoder, image: Shaped[np.ndarray, "H W ch"]) -> Detections:
        side, (height, width) = self.side(encoder), image.shape[:2]
        rows, columns = (max(round(n * side / max(height, width)), 1) for n in (height, width))
        pixels = resize(image, rows, columns, encoder.config.transform.interpolation)
        view = torch.zeros(1, image.shape[2], side, side, device=encoder.device)
        view[:, :, :rows, :columns] = encoder.normalise(pixels[None].to(encoder.device))
        features = encoder_map(encoder.backbone, view)
        return self.answer(features, (side, side), (rows, columns), (height, width))

    def answer(
        self,
        features: Float[Tensor, "1 D h w"],
        size: tuple[int, int],
        image: tuple[int, int],
        true: tuple[int, int],
    ) -> Detections:
        """Return what `detect` finds in a view, in pixels of the image at its `true` size (rows, columns)."""
        (rows, columns), (height, width) = image, true
        found = self.detect(features, size, image)
        boxes = found["boxes"].float() * features.new_tensor([width / columns, height / rows] * 2).float()
        masks = None
        if "masks" in found:
            masks = pasted(found["masks"].float(), boxes, height, width).cpu()
        return Detections(
            self.config.names, boxes.cpu(), found["labels"].cpu() - 1, found["scores"].float().cpu(), masks
        )

    def detect(
        self, features: Float[Tensor, "1 D h w"], size: tuple[int, int], image: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return torchvision's detections in a view: boxes in its pixels, labels from 1, scores, masks.

        The image lies in its upper left and has the size `image` (rows, columns). Masks are those of boxes,
        [K, 1, 28, 28].
        """
        maps = self.pyramid(features)
        inside = features.new_tensor([[0, 0, image[1], image[0]]], dtype=torch.float32)
        boxes, _ = self.proposals.propose(maps, size, inside)
        return self.regions(_named(maps), boxes, [image])[0][0]

    def traced(
        self, network: Any, pixels: Float[Tensor, "1 ch S S"], extent: Int64[Tensor, "2"]
    ) -> dict[str, Tensor]:
        """Return what `detect` finds in a normalised view, in a way that torch.export can express.

        The image lies in the upper left, over `extent` (rows, columns), and all else is made the mean colour.
        Boxes are in pixels of the view, labels from 0, scores; masks of boxes are [K, 28, 28].
        """
        from foveola.tasks.traced import traced_answer

        side = torch.arange(pixels.shape[-1], device=pixels.device)
        there = (side[:, None] < extent[0]) & (side < extent[1])
        features = encoder_map(network, torch.where(there, pixels, 0.0))
        found = traced_answer(self, features, extent)
        return found | {"labels": found["labels"] - 1}


def _named(maps: list[Tensor]) -> dict[str, Tensor]:
    """The maps from which proposals are read, by the names that torchvision gets them by."""
    return {str(level): each for level, each in enumerate(maps[:LEVELS])}


def encoder_map(network: Any, pixels: Float[Tensor, "B ch H W"]) -> Float[Tensor, "B D h w"]:
    """Return patches after the last block as a map, without the final norm, as ViTDet reads them."""
    features = network(pixels, Inputs(final_norm=False))
    return as_map(features.patches, features.grid)


def pasted(
    masks: Float[Tensor, "K 1 m m"], boxes: Float[Tensor, "K 4"], height: int, width: int
) -> Bool[Tensor, "K {height} {width}"]:
    """Return masks of boxes as pixels of the image; one after the other, as each takes its memory."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    whole = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for k in range(len(masks)):
        whole[k] = paste_masks_in_image(masks[k : k + 1], boxes[k : k + 1], (height, width))[0, 0] > 0.5
    return whole


class Detection(TaskMethod):
    """Trains one network to find the objects that people drew."""

    Config = DetectionConfig
    Head = DetectionHead

    def __init__(self, config: DetectionConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__(config, model, views)
        self.masks = bool(config.masks)
        self.colors = views.color.mean, views.color.std
        # Views of the last step, where their images lie, features; then objects of each.
        self.shown: tuple[Tensor, ...] | None = None
        self.shown_objects: ViewTargets = []
        self.backbone.norm.requires_grad_(False)  # never used: data-parallel training would wait for it

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Compute the losses of a batch: of proposals and their boxes, of classes, boxes and masks."""
        views = batch.large
        pixels = views.pixels.flatten(0, 1)
        size, inside = (pixels.shape[-2], pixels.shape[-1]), views.inside.flatten(0, 1).float()
        targets, ignored = self.targets_of(views.instances, len(pixels), size)
        head = self.task_head
        assert isinstance(head, DetectionHead)
        features = encoder_map(self.backbone, pixels)
        losses = head.losses(features, size, inside, targets, ignored)
        self.shown = tuple(each[:VIEWS_DRAWN].detach().clone() for each in (pixels, inside, features))
        self.shown_objects = targets[:VIEWS_DRAWN]
        counts = torch.tensor([len(target["boxes"]) for target in targets], dtype=torch.float32)
        return Output(losses, {"objects/number": counts.mean(), **batch.facts})

    def targets_of(self, instances: Any, views: int, size: tuple[int, int]) -> "tuple[ViewTargets, Ignored]":
        """Return objects and ignored pixels of each view.

        Crowds, objects without a class, and slivers that the view's border leaves count as nothing.
        """
        sides = instances.boxes[:, 2:] - instances.boxes[:, :2]
        counts = (instances.labels >= 0) & ~instances.crowd & (sides >= LEAST).all(dim=1)
        targets, ignored = [], []
        for view in range(views):
            here = instances.view == view
            mine, others = here & counts, here & ~counts
            target = {"boxes": instances.boxes[mine].float(), "labels": instances.labels[mine] + 1}
            if self.masks:
                target["masks"] = instances.masks[mine]
            targets.append(target)
            ignored.append(_region(instances, others, size) if bool(others.any()) else None)
        return targets, ignored

    @torch.no_grad()
    def figures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Return views of the last step in columns: with their objects, and with what the head finds.

        The head is as the step left it, the features are as the step had them.
        """
        if self.shown is None:
            return {}
        views, inside, features = self.shown
        names, head, images = self.config.names, self.task_head, view_images(views, *self.colors)
        assert isinstance(head, DetectionHead)
        found, size = [], (views.shape[2], views.shape[3])
        with at_rest(head):
            for frame, seen in zip(inside.long().tolist(), features.float().split(1), strict=True):
                image = max(frame[3], 1), max(frame[2], 1)
                found.append(drawn_detections(head.answer(seen, size, image, image), size))
        truth = [
            DrawnObjects(
                each["boxes"].double().cpu().numpy(),
                tuple(names[k - 1] for k in each["labels"].tolist()),
                list(each["masks"].bool().cpu().numpy()) if self.masks else None,
            )
            for each in self.shown_objects
        ]
        return {"detections": detections_figure(images, truth, found)}

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        if self.masks:
            return []
        return ["objects of the data are boxes: box heads train alone, and no masks are predicted"]


def _region(instances: Any, which: Bool[Tensor, "T"], size: tuple[int, int]) -> Bool[Tensor, "H W"]:
    """The pixels of instances: of their masks, or of their boxes where there are none."""
    if instances.masks is None:
        return drawn(instances.boxes[which], *size)
    return instances.masks[which].bool().any(dim=0)
