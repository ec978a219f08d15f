"""Scale jitter: an image is resized at random, and a view is a random window of it, padded if need be.

The large-scale jitter of ViTDet and Mask R-CNN (0.1 to 2.0 at 1024 pixels), and what Segmenter and mmseg do
for label maps (0.5 to 2.0). As everywhere nothing is resized twice: a window is a box, which reaches out of
its image where that is smaller than the view.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from foveola.config import key
from foveola.data.sample import IGNORE
from foveola.geometry import sample_labels

WINDOWS = 10  # drawn for a view where one is looked for in which no class fills too much (mmseg's number)
COUNTED = 128  # at most this many rows and columns of a window are counted


@dataclass(frozen=True)
class RescaleConfig:
    """Defaults: the large-scale jitter of ViTDet."""

    range: tuple[float, float] = key(
        (0.1, 2.0), "side of the resized image, as a factor of global_size, uniform in this range"
    )
    side: Literal["long", "short"] = key("long", "side of the image that range is of")
    max_class_share: float | None = key(
        None,
        "of up to 10 windows take the first in which no class fills more than this fraction of the labelled "
        "pixels; null = the first",
        above=0,
        below=1,
    )

    def __post_init__(self) -> None:
        if not 0 < self.range[0] <= self.range[1] <= 100:
            raise ValueError("range: needs 0 < low <= high <= 100")


@dataclass(frozen=True, eq=False)
class Windows:
    """Candidate boxes of each view, on the CPU, and the longest side of any, in units of its image."""

    boxes: Float[Tensor, "W B V 4"]
    longest: float


def draw_windows(
    config: RescaleConfig,
    aspects: Float[Tensor, "B"],
    flips: Bool[Tensor, "B V"],
    size: int,
    generator: torch.Generator,
) -> Windows:
    """Draw `WINDOWS` windows of `size` pixels a side for each view, all of one size of image; CPU tensors.

    Sides of the resized image and corners of windows are whole pixels, corners uniform over what there is.
    Where the image is smaller than the window, it lies in the upper left of the view, and the rest is
    padding, right and below; also where the view is flipped.

    Args:
        aspects: width / height of each true image.
        flips: which views show their image mirrored.
    """
    batch, count = flips.shape
    uniform = torch.rand(1 + 2 * WINDOWS, batch, count, generator=generator)
    low, high = config.range
    length = (low + (high - low) * uniform[0]) * size
    aspects = aspects.to(torch.float32)[:, None]
    wide = (aspects >= 1) == (config.side == "long")  # the side that is set is the width
    width = torch.where(wide, length, length * aspects).round().clamp(min=1)
    height = torch.where(wide, length / aspects, length).round().clamp(min=1)
    left, top = (
        (part * (side - size + 1).clamp(min=1)).floor()
        for part, side in zip(uniform[1:].split(WINDOWS), (width, height), strict=True)
    )
    x0, x1, y0, y1 = left / width, (left + size) / width, top / height, (top + size) / height
    # A mirrored view begins where its box ends: so the image lies on the left of it, too.
    x0, x1 = torch.where(flips, 1 - x1, x0), torch.where(flips, 1 - x0, x1)
    return Windows(torch.stack((x0, y0, x1, y1), dim=-1), size / min(float(width.min()), float(height.min())))


def choose_windows(
    windows: Float[Tensor, "W B V 4"],
    label_maps: UInt8[Tensor, "B R C"],
    extents: Int64[Tensor, "B 2"],
    max_fraction: float,
    size: int,
) -> Float[Tensor, "B V 4"]:
    """Return each view's first window in which no class fills more than `max_fraction` of the labelled
    pixels.

    If there is none, the last. Pixels are counted on a grid of at most 128 x 128 of each window; one without
    a labelled pixel does not count as such. On the device of the maps.
    """
    count, batch, views = windows.shape[:3]
    boxes = windows.to(label_maps.device, non_blocking=True).permute(1, 0, 2, 3).flatten(1, 2)
    labels = sample_labels(label_maps, boxes, None, min(size, COUNTED), IGNORE, extents).flatten(2)
    counts = torch.zeros(batch, count * views, 256, device=labels.device)
    counts.scatter_add_(2, labels.long(), torch.ones((), device=labels.device).expand(labels.shape))
    counts[..., IGNORE] = 0
    total, largest = counts.sum(dim=-1), counts.amax(dim=-1)
    good = ((total > 0) & (largest <= max_fraction * total)).view(batch, count, views)
    good[:, -1] = True
    chosen = good.to(torch.uint8).argmax(dim=1)[:, None, :, None].expand(-1, 1, -1, 4)
    return boxes.view(batch, count, views, 4).gather(1, chosen)[:, 0]
