"""Object-aware cropping (ODIS): boxes that hold the target object, judged without resampling a pixel."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveola.config import key
from foveola.data.sample import Chosen
from foveola.geometry import box_sums, covered_patches, random_boxes, sample


@dataclass(frozen=True)
class ObjectsConfig:
    """How objects steer the views. Defaults: the ODIS paper (Sections 4 and E)."""

    aware: bool = key(True, "global views must hold the target object")
    attention: bool = key(True, "object tokens of global views read only the patches of their object")
    candidates: int = key(20, "boxes drawn for a global view before giving up", at_least=1, at_most=10_000)
    min_visible: float = key(
        0.0, "fraction of the object that a view must hold; 0 = more than nothing", at_least=0, at_most=1
    )
    min_coverage: float = key(
        1 / 256,
        "fraction of a patch that makes it the object's; 1/256 = any pixel of 16 x 16",
        above=0,
        at_most=1,
    )
    aware_local: bool = key(False, "local views must hold the object, too (Table 5, OALC)")
    attention_local: bool = key(False, "object tokens of local views read only their object (Table 5, MALC)")
    image_token: bool = key(False, "a further token that reads the whole view, for an image-level term")

    def __post_init__(self) -> None:
        if self.attention_local and not self.attention:
            raise ValueError("attention_local: needs attention=true; without it there are no object tokens")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle: dict[str, str] = {}
        if not (self.aware or self.aware_local):
            idle |= dict.fromkeys(("candidates", "min_visible"), "aware=false: no view looks for an object")
        if not self.attention:
            idle["min_coverage"] = "attention=false: no token is restricted to patches"
        return idle


def object_boxes(
    aspects: Float[Tensor, "B"],
    masks: Float[Tensor, "B M s s"],
    whole: Bool[Tensor, "B M"],
    count: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    config: ObjectsConfig,
    generators: tuple[torch.Generator, torch.Generator],
) -> tuple[Float[Tensor, "B V 4"], Float[Tensor, "B V"]]:
    """Return boxes that hold every target object of their image, and how many draws each took (0 = none held
    it).

    All candidates are drawn at once; a view takes its first one in which each object shows more than
    `min_visible` of its area. If there is none it takes the one that shows most of the object shown least.
    Objects that are the whole image accept the first draw, so that such images are cropped as without
    objects: the first of the `generators` is that of plain cropping, the other serves further candidates.
    """
    first, retries = generators
    # Drawn on the CPU, judged where the masks are: no step waits for the device.
    batch = aspects.shape[0]
    boxes = random_boxes(aspects, count, scale, ratio, first)[:, :, None]
    if config.candidates > 1:
        more = random_boxes(aspects, count * (config.candidates - 1), scale, ratio, retries)
        boxes = torch.cat((boxes, more.view(batch, count, config.candidates - 1, 4)), dim=2)
    boxes = boxes.to(masks.device, non_blocking=True)
    objects = masks.shape[1]
    flat = boxes.flatten(1, 2)[:, None].expand(-1, objects, -1, -1)
    total = masks.sum(dim=(2, 3)).clamp(min=1e-6)
    visible = box_sums(masks, flat) / total[..., None]
    visible = torch.where(whole[..., None], 2.0, visible)  # above any threshold
    least = visible.amin(dim=1).view(batch, count, config.candidates)
    good = least > max(config.min_visible - 1e-6, 1e-6)
    chosen = torch.where(good.any(dim=2), good.to(torch.uint8).argmax(dim=2), least.argmax(dim=2))
    tries = torch.where(good.any(dim=2), chosen + 1, 0).to(torch.float32)
    return boxes.gather(2, chosen[:, :, None, None].expand(-1, -1, 1, 4))[:, :, 0], tries


def object_patches(
    masks: Float[Tensor, "B M s s"],
    boxes: Float[Tensor, "B V 4"],
    flips: Bool[Tensor, "B V"],
    grid: tuple[int, int],
    min_coverage: float,
) -> Bool[Tensor, "B V M N"]:
    """Return the patches of each view that belong to each object: covered fraction >= `min_coverage`; may be
    empty.
    """
    coverage = sample(masks, boxes, flips, grid, kernel="area")
    return covered_patches(coverage, min_coverage)


def object_weights(chosen: Chosen, by: Literal["area", "score"]) -> Float[Tensor, "B M"]:
    """Return what each object token counts in the mean of a batch: 1 on average in every image.

    Within an image, objects count in proportion to their areas, or scores (below 0: not at all; all alike
    where none has any). One that was drawn several times counts as often as if it had been once. So the mean
    over all objects of an image, weighted by area, is what drawing one by its area (ODIS, section 4) gives
    on average.
    """
    values = chosen.areas if by == "area" else chosen.scores.clamp(min=0)
    times = (chosen.which[:, :, None] == chosen.which[:, None]).sum(dim=2)
    values = torch.where(values.sum(dim=1, keepdim=True) > 0, values, 1.0) / times
    return values / values.mean(dim=1, keepdim=True)
