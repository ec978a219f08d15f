"""From canvases to a `Batch` of views: all geometry drawn at once, then pixels, colours and token masks.

Everything random is drawn on the CPU from named streams seeded by (seed, step, rank), so that a step does not
depend on the device, and switching one kind of augmentation off does not shift the draws of another.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from foveola.data.sample import IGNORE, Canvases, Chosen
from foveola.geometry import pixels_inside, random_boxes, sample, sample_labels
from foveola.logged import Averages
from foveola.views import color
from foveola.views.annotations import ViewInstances, cut_instances
from foveola.views.blocks import draw_blocks
from foveola.views.config import ViewsConfig
from foveola.views.objects import object_boxes, object_patches
from foveola.views.placement import place_views
from foveola.views.position_masks import draw_both
from foveola.views.rescale import RescaleConfig, choose_windows, draw_windows
from foveola.views.tokens import draw_drops, draw_masks


class Streams:
    """Random streams by name, each a pure function of (seed, step, rank, name)."""

    def __init__(self, seed: int, step: int, rank: int = 0) -> None:
        self.origin = (seed, step, rank)

    def __call__(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(repr((*self.origin, name)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True, eq=False)
class Hidden:
    """Patches of views that the student gets without their contents, or without their position."""

    mask: Bool[Tensor, "B V N"]
    indices: Int64[Tensor, "P"]  # of the hidden patches in [B * V * N], ascending

    @classmethod
    def of(cls, mask: Bool[Tensor, "B V N"], device: torch.device) -> "Hidden":
        """Return a mask that was drawn on the CPU, and its indices, on the training device."""
        # Found on the CPU, where the mask was drawn: counting on a GPU would make every step wait for it.
        indices = mask.flatten().nonzero()[:, 0]
        return cls(mask.to(device, non_blocking=True), indices.to(device, non_blocking=True))


@dataclass(frozen=True, eq=False)
class Selection:
    """Patches of views by index: those that the student gets, and those of the others that it predicts."""

    kept: Int64[Tensor, "B V K"]
    predicted: Int64[Tensor, "B V Q"]


@dataclass(frozen=True, eq=False)
class Views:
    """V views of each of B images, all of one size, on the training device; N patches and M object tokens."""

    pixels: Float[Tensor, "B V C H W"]
    boxes: Float[Tensor, "B V 4"]  # where they were cut from their images
    flips: Bool[Tensor, "B V"]
    positions: Float[Tensor, "B V 4"]  # where they stand in the position field: their boxes unless moved
    objects: Bool[Tensor, "B V M N"] | None = None  # patches that each token may read; None: one reads all
    hidden_contents: Hidden | None = None
    hidden_positions: Hidden | None = None
    selection: Selection | None = None  # None: the student gets all patches
    label_maps: UInt8[Tensor, "B V H W"] | None = None  # classes, IGNORE where there is none, and in padding
    instances: ViewInstances | None = None

    @property
    def inside(self) -> Int64[Tensor, "B V 4"]:
        """The pixels x0, y0, x1, y1 of each view that lie in its image; all of it unless it is padded."""
        height, width = self.pixels.shape[-2:]
        return pixels_inside(self.boxes, self.flips, (height, width))

    def selected(self) -> "SelectedPatches":
        """Return each view as an image of its own, with the patches that its student gets and predicts.

        Raises ValueError where the student gets all patches.
        """
        if self.selection is None:
            raise ValueError("the student gets all patches of these views: there is no selection")
        parts = self.pixels, self.selection.kept, self.selection.predicted
        return SelectedPatches(*(part.flatten(0, 1) for part in parts))


class SelectedPatches(NamedTuple):
    """Views as images of their own, and of each the patches that the student gets and those it predicts."""

    images: Float[Tensor, "BV C H W"]
    kept: Int64[Tensor, "BV K"]
    predicted: Int64[Tensor, "BV Q"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Views of B images on the training device: the large (global) ones, and small (local) ones if any."""

    large: Views
    small: Views | None
    labels: Int64[Tensor, "B"]
    indices: Int64[Tensor, "B"]
    facts: dict[str, Tensor | Averages]  # what is worth logging
    classes: Bool[Tensor, "B K"] | None = None  # which each image has, where it may have several
    chosen: Chosen | None = None  # what is known of the objects whose tokens the views have


def make_views(canvases: Canvases, config: ViewsConfig, patch_size: int, streams: Streams) -> Batch:
    """Draw and cut all views of a batch on the device of `canvases`."""
    kinds = [_Kind.large(config, patch_size)]
    if config.local_count:
        kinds.append(_Kind.small(config, patch_size))
    cutter = _Cutter(canvases, config, streams)
    drawn = [cutter.flips(kind) for kind in kinds]
    boxes = [cutter.boxes(kind, flip) for kind, flip in zip(kinds, drawn, strict=True)]
    flips = [flip.to(cutter.device, non_blocking=True) for flip in drawn]
    positions = cutter.positions(boxes)
    objects = cutter.objects(kinds, boxes, flips)
    contents, unplaced = cutter.hidden(kinds)
    selection = cutter.selection(kinds[0])
    views = [
        Views(
            pixels=cutter.cut(kind, boxes[i], flips[i]),
            boxes=boxes[i],
            flips=flips[i],
            positions=positions[i],
            objects=objects[i],
            hidden_contents=contents[i],
            hidden_positions=None if kind.local else unplaced,
            selection=None if kind.local else selection,
            label_maps=cutter.label_maps(kind, boxes[i], flips[i]),
            instances=cutter.instances(kind, boxes[i], flips[i]),
        )
        for i, kind in enumerate(kinds)
    ]
    return Batch(
        large=views[0],
        small=views[1] if config.local_count else None,
        labels=canvases.labels,
        indices=canvases.indices,
        facts=cutter.facts,
        classes=canvases.classes,
        chosen=canvases.chosen,
    )


@dataclass(frozen=True)
class _Kind:
    """What tells large and small views apart."""

    local: bool
    count: int
    size: int
    scale: tuple[float, float]
    grid: tuple[int, int]
    aware: bool  # they must hold the object
    tokens: bool  # they have object tokens (or the image's) that read some patches only

    @classmethod
    def large(cls, config: ViewsConfig, patch_size: int) -> "_Kind":
        objects, side = config.objects, config.global_size // patch_size
        aware = objects is not None and objects.aware
        tokens = objects is not None and (objects.attention or objects.image_token)
        scale = config.global_scale
        return cls(False, config.global_count, config.global_size, scale, (side, side), aware, tokens)

    @classmethod
    def small(cls, config: ViewsConfig, patch_size: int) -> "_Kind":
        objects, side = config.objects, config.local_size // patch_size
        aware = objects is not None and objects.aware_local
        tokens = objects is not None and objects.attention_local
        return cls(
            True, config.local_count, config.local_size, config.local_scale, (side, side), aware, tokens
        )

    def stream(self, name: str) -> str:
        """The name of the random stream of this kind's draws."""
        return f"local {name}" if self.local else name

    @property
    def looks(self) -> Int64[Tensor, "V"]:
        """Which colour augmentation each view gets: of the first large one, of others, of small ones."""
        return torch.tensor([2] * self.count if self.local else [0] + [1] * (self.count - 1))


class _Cutter:
    """Draws and cuts the views of one batch of canvases, kind by kind."""

    def __init__(self, canvases: Canvases, config: ViewsConfig, streams: Streams) -> None:
        self.canvases, self.config, self.streams = canvases, config, streams
        self.device = canvases.images.device
        # Rows before channels, as `sample` multiplies them: this copy is the only one.
        pixels = canvases.images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        self.pixels = pixels.div_(torch.iinfo(canvases.images.dtype).max).transpose(1, 2)
        self.masks = canvases.object_masks.to(torch.float32).div_(255) if config.objects else None
        self.facts: dict[str, Tensor | Averages] = {}
        self.outside: float | None = None  # the longest side of boxes, where they reach out of their image

    def boxes(self, kind: _Kind, flips: Bool[Tensor, "B V"]) -> Float[Tensor, "B V 4"]:
        """Boxes at random, or such that hold the objects; or random windows of resized images."""
        config, canvases = self.config, self.canvases
        aspects, first = canvases.aspects.cpu(), self.streams(kind.stream("boxes"))
        if config.rescale is not None:
            windows = draw_windows(config.rescale, aspects, flips, kind.size, first)
            self.outside = windows.longest
            return self._window(config.rescale, windows.boxes, kind.size).to(self.device, non_blocking=True)
        if not kind.aware or self.masks is None or config.objects is None:
            boxes = random_boxes(aspects, kind.count, kind.scale, config.ratio, first)
            return boxes.to(self.device, non_blocking=True)
        boxes, tries = object_boxes(
            aspects,
            self.masks,
            canvases.whole,
            kind.count,
            kind.scale,
            config.ratio,
            config.objects,
            (first, self.streams(kind.stream("boxes again"))),
        )
        if not kind.local:
            self.facts["objects/first_try"] = (tries == 1).float().mean()
            self.facts["objects/missed"] = (tries == 0).float().mean()
            self.facts["objects/whole"] = canvases.whole.float().mean()
        return boxes.to(self.device, non_blocking=True)

    def _window(
        self, rescale: RescaleConfig, windows: Float[Tensor, "W B V 4"], size: int
    ) -> Float[Tensor, "B V 4"]:
        """One of the windows that were drawn for each view."""
        if rescale.max_class_share is None:
            return windows[0]
        maps = self.canvases.label_maps
        assert maps is not None  # the configuration sees to it
        return choose_windows(windows, maps, self.canvases.extents, rescale.max_class_share, size)

    def flips(self, kind: _Kind) -> Bool[Tensor, "B V"]:
        """Which views are mirrored; on the CPU."""
        generator = self.streams(kind.stream("flips"))
        return torch.rand((len(self.pixels), kind.count), generator=generator) < self.config.flip

    def positions(self, boxes: list[Tensor]) -> list[Tensor]:
        """Where the views stand in the position field: those of an image move together."""
        if self.config.placement is None:
            return boxes
        moved = place_views(self.config.placement, torch.cat(boxes, dim=1), self.streams("placement"))
        return list(moved.split([each.shape[1] for each in boxes], dim=1))

    def objects(self, kinds: list[_Kind], boxes: list[Tensor], flips: list[Tensor]) -> list[Tensor | None]:
        """The patches that each token of each view may read, [B, V, M, N]; None where one token reads all.

        An image whose object left no patch in some large view is treated as one whose object is the whole
        image, in all of its views: an object token never has nothing to read, and teacher and student agree
        on what it stands for.
        """
        found: list[Tensor | None] = []
        lost: Tensor | None = None
        for kind, box, flip in zip(kinds, boxes, flips, strict=True):
            objects = self.config.objects
            if not kind.tokens or self.masks is None or objects is None:
                found.append(None)
                continue
            readable = self.masks if objects.attention else torch.ones_like(self.masks)
            patches = object_patches(readable, box, flip, kind.grid, objects.min_coverage)
            empty = ~patches.any(dim=-1)  # [B, V, M]
            if lost is None:
                lost = empty.any(dim=1)
                self.facts["objects/lost"] = lost.float().mean()
            # A small view without its object has no pair to agree with: it is read as a whole.
            patches |= (empty | lost[:, None])[..., None]
            if not kind.local:
                self.facts["objects/patches"] = patches.float().mean()
            if objects.image_token:
                patches = torch.cat((patches, torch.ones_like(patches[:, :, :1])), dim=2)
            found.append(patches)
        return found

    def hidden(self, kinds: list[_Kind]) -> tuple[list[Hidden | None], Hidden | None]:
        """Patches of each kind of views without contents, and of the large ones without position."""
        config, batch, large = self.config, len(self.pixels), kinds[0]
        masked: list[Tensor | None] = [None] * len(kinds)
        unplaced = None
        if config.position_masking is not None:
            masked[0], unplaced = draw_both(
                config.position_masking, config.masking, batch, large.count, large.grid, self.streams
            )
        for i, kind in enumerate(kinds):
            if config.masking is None or masked[i] is not None or (kind.local and not config.masking.local):
                continue
            drawn = draw_masks(
                config.masking, batch, kind.count, kind.grid, self.streams(kind.stream("masks"))
            )
            if unplaced is not None:  # images without some positions keep their contents, in small views too
                drawn &= ~unplaced.flatten(1).any(dim=1)[:, None, None]
            masked[i] = drawn
        contents = [None if mask is None else Hidden.of(mask, self.device) for mask in masked]
        return contents, None if unplaced is None else Hidden.of(unplaced, self.device)

    def selection(self, kind: _Kind) -> Selection | None:
        """Patches that the student gets, and those that it predicts, if it does not get all."""
        config, views = self.config, len(self.pixels) * kind.count
        if config.dropping is not None:
            drawn = draw_drops(config.dropping, views, kind.grid, self.streams("drops"))
        elif config.blocks is not None:
            drawn = draw_blocks(config.blocks, views, kind.grid, self.streams("blocks"))
            self.facts["blocks/context"] = torch.tensor(float(drawn[0].shape[1]))
            self.facts["blocks/target"] = torch.tensor(drawn[1].shape[1] / config.blocks.targets)
        else:
            return None
        shape = len(self.pixels), kind.count, -1
        return Selection(*(indices.view(shape).to(self.device, non_blocking=True) for indices in drawn))

    def cut(
        self, kind: _Kind, boxes: Float[Tensor, "B V 4"], flips: Bool[Tensor, "B V"]
    ) -> Float[Tensor, "B V C H W"]:
        """The pixels of the views, in their colours; padding is 0."""
        looks = kind.looks.expand(boxes.shape[:2])
        drawn = color.draw_colors(
            self.config.color, looks.flatten(), self.streams(kind.stream("color")), self.pixels.shape[1]
        )
        blur = drawn.blur.view(boxes.shape[:2]) if drawn.blur.any() else None
        blur = None if blur is None else blur.to(self.device, non_blocking=True)
        extents = self.canvases.extents
        views = sample(self.pixels, boxes, flips, kind.size, "bicubic", blur, extents, self.outside)
        inside = None
        if self.outside is not None:
            inside = _within(pixels_inside(boxes, flips, (kind.size, kind.size)), kind.size).flatten(0, 1)
            self.facts["views/padding"] = 1 - inside.float().mean()
        views = color.apply(views.flatten(0, 1), drawn, self.config.color, inside)
        return views.unflatten(0, boxes.shape[:2])

    def label_maps(
        self, kind: _Kind, boxes: Float[Tensor, "B V 4"], flips: Bool[Tensor, "B V"]
    ) -> UInt8[Tensor, "B V H W"] | None:
        """The label maps of the views."""
        maps = self.canvases.label_maps
        if maps is None:
            return None
        return sample_labels(maps, boxes, flips, kind.size, IGNORE, self.canvases.extents)

    def instances(
        self, kind: _Kind, boxes: Float[Tensor, "B V 4"], flips: Bool[Tensor, "B V"]
    ) -> ViewInstances | None:
        """The instances in the views."""
        if self.canvases.instances is None:
            return None
        found, lost = cut_instances(self.canvases.instances, boxes, flips, kind.size)
        if not kind.local:
            self.facts["instances/view"] = torch.tensor(len(found.view) / flips.numel())
            self.facts["instances/lost"] = lost
        return found


def _within(inside: Int64[Tensor, "B V 4"], size: int) -> Bool[Tensor, "B V 1 {size} {size}"]:
    """Which pixels of views lie within x0, y0, x1, y1."""
    at = torch.arange(size, device=inside.device)
    x0, y0, x1, y1 = inside[..., None].unbind(-2)
    columns, rows = (at >= x0) & (at < x1), (at >= y0) & (at < y1)
    return (rows[..., :, None] & columns[..., None, :])[:, :, None]
