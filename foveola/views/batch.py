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
    """Which views of a picture are made. Defaults: the multi-crop of DINO, iBOT and ODIS."""

    global_size: int = key(224, "pixels a side of a global view", at_least=1, at_most=2**13)
    global_count: int = key(2, "global views of a picture", at_least=1, at_most=100)
    global_scale: tuple[float, float] = key(
        (0.25, 1.0), "share of the picture's area that a global view covers"
    )
    local_size: int = key(96, "pixels a side of a local view", at_least=1, at_most=2**13)
    local_count: int = key(10, "local views of a picture", at_least=0, at_most=1000)
    local_scale: tuple[float, float] = key(
        (0.05, 0.25), "share of the picture's area that a local view covers"
    )
    ratio: tuple[float, float] = key((3 / 4, 4 / 3), "width / height of a view's box in true pixels")
    flip: float = key(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    color: ColorConfig = key(factory=ColorConfig, help="colour augmentation")
    objects: ObjectsConfig | None = key(None, "object-aware views and attention; null = objects are not used")
    masking: MaskingConfig | None = key(None, "patches hidden from the student; null = none")
    placement: PlacementConfig | None = key(
        None, "views moved in the position field, all of a picture together; null = where they were cut"
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
        """Keys that nothing reads with these settings, and why."""
        idle: dict[str, str] = {}
        if not self.local_count:
            local = ["local_size", "local_scale"]
            local += ["objects.aware_local", "objects.attention_local"] * (self.objects is not None)
            local += ["masking.local"] * (self.masking is not None)
            idle |= dict.fromkeys(local, "there are no local views (local_count=0)")
        if self.global_count == 1:
            same = ("masking.per_picture", "position_masking.per_picture")
            idle |= dict.fromkeys(same, "a picture has one global view")
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
class Batch:
    """Views of B pictures on the training device. M object tokens; without objects masks are None, M is 1."""

    global_views: Float[Tensor, "B V 3 H W"]
    global_boxes: Float[Tensor, "B V 4"]
    global_flips: Bool[Tensor, "B V"]
    global_objects: Bool[Tensor, "B V M N"] | None
    local_views: Float[Tensor, "B L 3 h w"] | None
    local_boxes: Float[Tensor, "B L 4"] | None
    local_flips: Bool[Tensor, "B L"] | None
    local_objects: Bool[Tensor, "B L M n"] | None
    masked: Bool[Tensor, "B V N"] | None
    masked_indices: Int64[Tensor, "P"] | None  # of the masked patches in [B * V * N], ascending
    local_masked: Bool[Tensor, "B L n"] | None
    keep: Int64[Tensor, "B V K"] | None  # patches of global views that the student gets
    predict: Int64[Tensor, "B V Q"] | None  # and those of the others that it predicts
    labels: Int64[Tensor, "B"]
    indices: Int64[Tensor, "B"]
    facts: dict[str, Tensor]
    # Where views stand in the position field, and patches whose position the student does not get.
    global_places: Float[Tensor, "B V 4"] | None = None  # None: at their boxes
    local_places: Float[Tensor, "B L 4"] | None = None
    unplaced: Bool[Tensor, "B V N"] | None = None
    unplaced_indices: Int64[Tensor, "U"] | None = None  # as masked_indices


def make_views(canvases: Canvases, config: ViewsConfig, patch_size: int, streams: Streams) -> Batch:
    """Draw and cut all views of a batch on the device of `canvases`.

    A picture whose object left no patch in some global view is treated as one whose object is the whole
    picture, in all of its views: an object token never has nothing to read, and teacher and student agree on
    what it stands for.
    """
    objects = config.objects
    # Rows before channels, as `sample` multiplies them: this copy is the only one.
    pixels = canvases.images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    pixels = pixels.div_(255).transpose(1, 2)
    masks = canvases.object_masks.to(torch.float32).div_(255) if objects else None
    facts: dict[str, Tensor] = {}

    global_boxes = _boxes(canvases, masks, config, False, streams, facts)
    local_boxes = _boxes(canvases, masks, config, True, streams, facts) if config.local_count else None
    global_flips = _flips(global_boxes, config, streams("flips"))
    local_flips = None if local_boxes is None else _flips(local_boxes, config, streams("local flips"))

    global_places = local_places = None
    if config.placement is not None:
        boxes = global_boxes if local_boxes is None else torch.cat((global_boxes, local_boxes), dim=1)
        places = place_views(config.placement, boxes, streams("placement"))
        global_places = places[:, : config.global_count]
        local_places = None if local_boxes is None else places[:, config.global_count :]

    def grid(size: int) -> tuple[int, int]:
        return size // patch_size, size // patch_size

    global_objects = local_objects = None
    if objects and masks is not None and (objects.attention or objects.image_token):
        readable = masks if objects.attention else torch.ones_like(masks)
        global_objects = object_patches(
            readable, global_boxes, global_flips, grid(config.global_size), objects.min_coverage
        )
        lost = ~global_objects.any(-1).all(dim=1)  # [B, M]: absent from a view
        facts["objects/lost"] = lost.float().mean()
        global_objects |= lost[:, None, :, None]
        facts["objects/patches"] = global_objects.float().mean()
        if objects.image_token:
            everything = torch.ones_like(global_objects[:, :, :1])
            global_objects = torch.cat((global_objects, everything), dim=2)
        if objects.attention_local and local_boxes is not None and local_flips is not None:
            local_objects = object_patches(
                masks, local_boxes, local_flips, grid(config.local_size), objects.min_coverage
            )
            # A local view without its object has no pair to agree with: it is read as a whole.
            local_objects |= ~local_objects.any(-1, keepdim=True) | lost[:, None, :, None]
            if objects.image_token:
                everything = torch.ones_like(local_objects[:, :, :1])
                local_objects = torch.cat((local_objects, everything), dim=2)

    kinds = torch.full(global_boxes.shape[:2], 1)
    kinds[:, 0] = 0
    global_views = _pixels(
        pixels,
        canvases.extents,
        global_boxes,
        global_flips,
        config.global_size,
        kinds,
        config,
        streams("color"),
    )
    local_views = None
    if local_boxes is not None:
        kinds = torch.full(local_boxes.shape[:2], 2)
        local_views = _pixels(
            pixels,
            canvases.extents,
            local_boxes,
            local_flips,
            config.local_size,
            kinds,
            config,
            streams("local color"),
        )

    masked = masked_indices = local_masked = unplaced = unplaced_indices = shown = None
    batch, views = global_boxes.shape[:2]
    if config.position_masking is not None:
        masked, unplaced = draw_both(
            config.position_masking, config.masking, batch, views, grid(config.global_size), streams
        )
        shown = ~unplaced.any(dim=2).any(dim=1)  # pictures whose contents may be masked, in local views too
        unplaced_indices = unplaced.flatten().nonzero()[:, 0].to(pixels.device, non_blocking=True)
        unplaced = unplaced.to(pixels.device, non_blocking=True)
    elif config.masking is not None:
        masked = draw_masks(config.masking, batch, views, grid(config.global_size), streams("masks"))
    if config.masking is not None and masked is not None:
        if config.masking.local and config.local_count:
            local_masked = draw_masks(
                config.masking, batch, config.local_count, grid(config.local_size), streams("local masks")
            )
            if shown is not None:
                local_masked &= shown[:, None, None]
            local_masked = local_masked.to(pixels.device, non_blocking=True)
        # Found on the CPU, where the masks were drawn: counting on a GPU would make every step wait for it.
        masked_indices = masked.flatten().nonzero()[:, 0].to(pixels.device, non_blocking=True)
        masked = masked.to(pixels.device, non_blocking=True)
    keep = predict = drops = None
    if config.dropping is not None:
        drops = draw_drops(config.dropping, batch * views, grid(config.global_size), streams("drops"))
    elif config.blocks is not None:
        drops = draw_blocks(config.blocks, batch * views, grid(config.global_size), streams("blocks"))
        facts["blocks/context"] = torch.tensor(float(drops[0].shape[1]))
        facts["blocks/target"] = torch.tensor(drops[1].shape[1] / config.blocks.targets)
    if drops is not None:
        keep, predict = (
            indices.view(batch, views, -1).to(pixels.device, non_blocking=True) for indices in drops
        )
    return Batch(
        global_views=global_views,
        global_boxes=global_boxes,
        global_flips=global_flips,
        global_objects=global_objects,
        local_views=local_views,
        local_boxes=local_boxes,
        local_flips=local_flips,
        local_objects=local_objects,
        masked=masked,
        masked_indices=masked_indices,
        local_masked=local_masked,
        keep=keep,
        predict=predict,
        labels=canvases.labels,
        indices=canvases.indices,
        facts=facts,
        global_places=global_places,
        local_places=local_places,
        unplaced=unplaced,
        unplaced_indices=unplaced_indices,
    )


def _boxes(
    canvases: Canvases,
    masks: Tensor | None,
    config: ViewsConfig,
    local: bool,
    streams: Streams,
    facts: dict[str, Tensor],
) -> Float[Tensor, "B V 4"]:
    count = config.local_count if local else config.global_count
    scale = config.local_scale if local else config.global_scale
    name = "local boxes" if local else "boxes"
    aspects, objects = canvases.aspects.cpu(), config.objects
    if objects and masks is not None and (objects.aware_local if local else objects.aware):
        boxes, tries = object_boxes(
            aspects,
            masks,
            canvases.whole,
            count,
            scale,
            config.ratio,
            objects,
            streams(name),
            streams(f"{name} again"),
        )
        if not local:
            facts["objects/first_try"] = (tries == 1).float().mean()
            facts["objects/missed"] = (tries == 0).float().mean()
            facts["objects/whole"] = canvases.whole.float().mean()
    else:
        boxes = random_boxes(aspects, count, scale, config.ratio, streams(name))
    return boxes.to(canvases.images.device, non_blocking=True)


def _flips(boxes: Tensor, config: ViewsConfig, generator: torch.Generator) -> Bool[Tensor, "B V"]:
    flips = torch.rand(boxes.shape[:2], generator=generator) < config.flip
    return flips.to(boxes.device, non_blocking=True)


def _pixels(
    pixels: Float[Tensor, "B 3 R C"],
    extents: Int64[Tensor, "B 2"],
    boxes: Float[Tensor, "B V 4"],
    flips: Bool[Tensor, "B V"] | None,
    size: int,
    kinds: Int64[Tensor, "B V"],
    config: ViewsConfig,
    generator: torch.Generator,
) -> Float[Tensor, "B V 3 H W"]:
    drawn = color.draw(config.color, kinds.flatten(), generator)
    blur = drawn.blur.view(boxes.shape[:2]) if drawn.blur.any() else None
    views = sample(pixels, boxes, flips, size, "bicubic", blur, extents)
    return color.apply(views.flatten(0, 1), drawn, config.color).unflatten(0, boxes.shape[:2])
