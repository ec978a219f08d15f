"""Which views of an image are made."""

from dataclasses import dataclass

from foveola.config import key
from foveola.views.blocks import BlocksConfig
from foveola.views.color import ColorConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.placement import PlacementConfig
from foveola.views.position_masks import PositionMaskingConfig
from foveola.views.rescale import RescaleConfig
from foveola.views.tokens import DroppingConfig, MaskingConfig


@dataclass(frozen=True)
class ViewsConfig:
    """Which views of an image are made. Defaults: the multi-crop of DINO, iBOT and ODIS."""

    global_size: int = key(224, "pixels a side of a global view", at_least=1, at_most=2**13)
    global_count: int = key(2, "global views of an image", at_least=1, at_most=100)
    global_scale: tuple[float, float] = key(
        (0.25, 1.0), "fraction of the image's area that a global view covers"
    )
    local_size: int = key(96, "pixels a side of a local view", at_least=1, at_most=2**13)
    local_count: int = key(10, "local views of an image", at_least=0, at_most=1000)
    local_scale: tuple[float, float] = key((0.05, 0.25), "fraction of the image's area in a local view")
    ratio: tuple[float, float] = key((3 / 4, 4 / 3), "width / height of a view's box in true pixels")
    rescale: RescaleConfig | None = key(
        None,
        "views are random windows of the image, resized at random and padded, instead of random boxes "
        "(fine-tuning); null = boxes",
    )
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
        if self.rescale is not None:
            if self.local_count:
                raise ValueError("rescale: windows are global views alone: set local_count=0")
            parts = ("objects", "masking", "placement", "position_masking", "dropping", "blocks")
            for name in parts:
                if getattr(self, name) is not None:
                    raise ValueError(f"rescale pads views, which {name} does not expect: set one to null")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle: dict[str, str] = {}
        if not self.local_count:
            local = ["local_size", "local_scale"]
            local += ["objects.aware_local", "objects.attention_local"] * (self.objects is not None)
            local += ["masking.local"] * (self.masking is not None)
            idle |= dict.fromkeys(local, "there are no local views (local_count=0)")
        if self.rescale is not None:
            idle |= dict.fromkeys(("global_scale", "ratio"), "rescale chooses windows")
        if self.global_count == 1:
            same = ("masking.per_image", "position_masking.per_image")
            idle |= dict.fromkeys(same, "an image has one global view")
        return idle

    def check(self, patch_size: int, annotations: str | None = None) -> None:
        """Raise ValueError unless views are made of whole patches, and what they do suits the `annotations`
        that a method learns from.
        """
        if self.rescale is not None and annotations is None:
            raise ValueError(
                "views.rescale pads views, as only methods with annotations expect it: set it to null"
            )
        if self.rescale is not None and self.rescale.max_class_share and annotations != "label_maps":
            raise ValueError(
                f"views.rescale.max_class_share needs label maps, but the method learns from {annotations}: "
                "set it to null"
            )
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
