"""From canvases to a `Batch` of views: all geometry drawn at once, then pixels, colours and token masks.

Everything random is drawn on the CPU from named streams seeded by (seed, step, rank), so that a step does not
depend on the device, and switching one kind of augmentation off does not shift the draws of another.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foveola.config import key
from foveola.data.sample import Canvases
from foveola.geometry import random_boxes, sample
from foveola.views import color
from foveola.views.blocks import BlocksConfig, draw_blocks
from foveola.views.color import ColorConfig
from foveola.views.objects import ObjectsConfig, object_boxes, object_patches
from foveola.views.placement import PlacementConfig, place_views
from foveola.views.position_masks import PositionMaskingConfig, draw_both
from foveola.views.tokens import DroppingConfig, MaskingConfig, draw_drops, draw_masks


class Streams:
    """Random streams by name, each a pure function of (seed, step, rank, name)."""

    def __init__(self, seed: int, step: int, rank: int = 0) -> None:
        self.origin = (seed, step, rank)

    def __call__(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(repr((*self.origin, name)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class ViewsConfig:
    """Which views of an image are made. Defaults: the multi-crop of DINO, iBOT and ODIS."""

    global_size: int = key(224, "pixels a side of a global view", at_least=1, at_most=2**13)
    global_count: int = key(2, "global views of an image", at_least=1, at_most=100)
    global_scale: tuple[float, float] = key(
        (0.25, 1.0), "share of the image's area that a global view covers"
    )
    local_size: int = key(96, "pixels a side of a local view", at_least=1, at_most=2**13)
    local_count: int = key(10, "local views of an image", at_least=0, at_most=1000)
    local_scale: tuple[float, float] = key((0.05, 0.25), "share of the image's area that a local view covers")
    ratio: tuple[float, float] = key((3 / 4, 4 / 3), "width / height of a view's box in true pixels")
    flip: float = key(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    color: ColorConfig = key(factory=ColorConfig, help="colour augmentation")
    objects: ObjectsConfig | None = key(None, "object-aware views and attention; null = objects are not used")
    masking: MaskingConfig | None = key(None, "patches hidden from the student; null = none")
    placement: PlacementConfig | None = key(
        None,
        "moves views in the position field, all of an image together; null = they stay where they were cut",
    )
    position_masking: PositionMaskingConfig | None = key(
        None, "patches of global views whose position is hidden from the student; null = none"
    )
    dropping: DroppingConfig | None = key(
        None, "patches of global views that the student does not get at all; null = none"
    )
    blocks: BlocksConfig | None = key(
        None, "blocks of patches to predict from a context (I-JEPA), instead of `dropping`; null = none"
    )

    def __post_init__(self) -> None:
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}: needs 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("ratio: needs 0 < low <= high")
        if self.dropping is not None and self.blocks is not None:
            raise ValueError("dropping and blocks both choose what the student gets: set one of them to null")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle: dict[str, str] = {}
        if not self.local_count:
            local = ["local_size", "local_scale"]
            local += ["objects.aware_local", "objects.attention_local"] * (self.objects is not None)
            local += ["masking.local"] * (self.masking is not None)
            idle |= dict.fromkeys(local, "there are no local views (local_count=0)")
        if self.global_count == 1:
            same = ("masking.per_image", "position_masking.per_image")
            idle |= dict.fromkeys(same, "an image has one global view")
        return idle

    def check(self, patch_size: int) -> None:
        """Raise ValueError unless views are made of whole patches."""
        sizes = {"global_size": self.global_size}
        if self.local_count:
            sizes["local_size"] = self.local_size
        for name, size in sizes.items():
            if size % patch_size:
                below = size - size % patch_size
                near = " or ".join(str(side) for side in (below, below + patch_size) if side)
                raise ValueError(
                    f"views.{name}={size} is not a multiple of the patch size {patch_size}; try {near}"
                )
        side = self.global_size // patch_size
        try:
            if self.dropping is not None:
                self.dropping.counts(side**2)
            if self.blocks is not None:
                self.blocks.check((side, side))
        except ValueError as error:
            raise ValueError(f"views.{error}") from error


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

    pixels: Float[Tensor, "B V 3 H W"]
    boxes: Float[Tensor, "B V 4"]  # where they were cut from their images
    flips: Bool[Tensor, "B V"]
    positions: Float[Tensor, "B V 4"]  # where they stand in the position field: their boxes unless moved
    objects: Bool[Tensor, "B V M N"] | None = None  # patches that each token may read; None: one reads all
    hidden_contents: Hidden | None = None
    hidden_positions: Hidden | None = None
    selection: Selection | None = None  # None: the student gets all patches


@dataclass(frozen=True, eq=False)
class Batch:
    """Views of B images on the training device: the large (global) ones, and small (local) ones if any."""

    large: Views
    small: Views | None
    labels: Int64[Tensor, "B"]
    indices: Int64[Tensor, "B"]
    facts: dict[str, Tensor]  # scalars worth logging


def make_views(canvases: Canvases, config: ViewsConfig, patch_size: int, streams: Streams) -> Batch:
    """Draw and cut all views of a batch on the device of `canvases`."""
    kinds = [_Kind.large(config, patch_size)]
    if config.local_count:
        kinds.append(_Kind.small(config, patch_size))
    cutter = _Cutter(canvases, config, streams)
    boxes = [cutter.boxes(kind) for kind in kinds]
    flips = [cutter.flips(kind) for kind in kinds]
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
        )
        for i, kind in enumerate(kinds)
    ]
    return Batch(
        large=views[0],
        small=views[1] if config.local_count else None,
        labels=canvases.labels,
        indices=canvases.indices,
        facts=cutter.facts,
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
        self.pixels = pixels.div_(255).transpose(1, 2)
        self.masks = canvases.object_masks.to(torch.float32).div_(255) if config.objects else None
        self.facts: dict[str, Tensor] = {}

    def boxes(self, kind: _Kind) -> Float[Tensor, "B V 4"]:
        """Boxes at random, or such that hold the objects."""
        config, canvases = self.config, self.canvases
        aspects, first = canvases.aspects.cpu(), self.streams(kind.stream("boxes"))
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

    def flips(self, kind: _Kind) -> Bool[Tensor, "B V"]:
        generator = self.streams(kind.stream("flips"))
        flips = torch.rand((len(self.pixels), kind.count), generator=generator) < self.config.flip
        return flips.to(self.device, non_blocking=True)

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
    ) -> Float[Tensor, "B V 3 H W"]:
        """The pixels of the views, in their colours."""
        looks = kind.looks.expand(boxes.shape[:2])
        drawn = color.draw_colors(self.config.color, looks.flatten(), self.streams(kind.stream("color")))
        blur = drawn.blur.view(boxes.shape[:2]) if drawn.blur.any() else None
        views = sample(self.pixels, boxes, flips, kind.size, "bicubic", blur, self.canvases.extents)
        return color.apply(views.flatten(0, 1), drawn, self.config.color).unflatten(0, boxes.shape[:2])
