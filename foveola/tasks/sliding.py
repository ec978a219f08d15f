"""Label maps of images of any size and shape: looked at whole or by windows, at one or several scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import interpolate, pad

from foveola.config import key
from foveola.models.transform import resize

AT_ONCE = 8  # windows that are looked at together
ROOM = 2**26  # logits that are enlarged together: 256 MiB

Logits = Callable[
    [Float[Tensor, "b ch h w"]], Float[Tensor, "b C h w"]
]  # of normalised images, at their pixels


@dataclass(frozen=True)
class LookConfig:
    """How an image of any size is looked at."""

    mode: Literal["slide", "whole"] = key(
        "slide",
        "square windows one beside the other, whose logits are averaged where they overlap, or all at once",
    )
    size: int | None = key(
        None, "pixels of the shorter side to which an image is resized; null = a side of a view in training",
        at_least=1, at_most=2**14,
    )  # fmt: skip
    window: int | None = key(
        None, "pixels a side of a window; null = those of a view in training", at_least=1, at_most=2**13
    )
    stride: int | None = key(
        None, "pixels from one window to the next; null = two thirds of a window (DINOv2)", at_least=1
    )
    scales: tuple[float, ...] = key(
        (1.0,), "times `size`: an image is looked at in each, and the probabilities are averaged", above=0
    )
    flip: bool = key(False, "look at the mirror image, too")

    def __post_init__(self) -> None:
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales: needs different values, got {list(self.scales)}")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride={self.stride} leaves gaps between windows of window={self.window}")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        return (
            dict.fromkeys(("window", "stride"), "mode=whole has no windows") if self.mode == "whole" else {}
        )

    def check(self, patch_size: int) -> None:
        """Raise ValueError for windows that are not made of whole patches."""
        if self.window is not None and self.window % patch_size:
            raise ValueError(f"window={self.window} is not a multiple of the patch size {patch_size}")


def offsets(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin on a side: every `stride` pixels, and the last one at the end."""
    return [*range(0, max(length - window, 0), stride), max(length - window, 0)]


def slide(image: Float[Tensor, "ch h w"], logits: Logits, window: int, stride: int) -> Float[Tensor, "C h w"]:
    """Return the mean of the logits of all windows that hold each pixel of a normalised image.

    A side that is shorter than a window is filled up with zeros, the mean colour, to the right and below.
    """
    height, width = image.shape[1:]
    image = pad(image, (0, max(window - width, 0), 0, max(window - height, 0)))
    corners = list(product(*(offsets(side, window, stride) for side in image.shape[1:])))
    total, count = None, image.new_zeros(1, *image.shape[1:])
    for start in range(0, len(corners), AT_ONCE):
        block = corners[start : start + AT_ONCE]
        found = logits(torch.stack([image[:, y : y + window, x : x + window] for y, x in block]))
        if total is None:
            total = found.new_zeros(found.shape[1], *image.shape[1:])
        for (y, x), one in zip(block, found, strict=True):
            total[:, y : y + window, x : x + window] += one
            count[:, y : y + window, x : x + window] += 1
    assert total is not None
    return total.div_(count)[:, :height, :width]


def look_whole(image: Float[Tensor, "ch h w"], logits: Logits, patch_size: int) -> Float[Tensor, "C h w"]:
    """Return the logits of a normalised image, filled up with zeros to whole patches, at its own pixels."""
    height, width = image.shape[1:]
    image = pad(image, (0, -width % patch_size, 0, -height % patch_size))
    return logits(image[None])[0, :, :height, :width]


def looks(
    image: Shaped[np.ndarray, "H W ch"],
    config: LookConfig,
    logits: Logits,
    normalise: Callable[[Shaped[Tensor, "b ch h w"]], Float[Tensor, "b ch h w"]],
    view: int,
    patch_size: int,
    interpolation: Literal["bicubic", "bilinear"],
) -> list[Float[Tensor, "C _ _"]]:
    """Return the logits of an image at each scale, and of its mirror images, turned back.

    `view` is the side in pixels of a view in training: the size and window that are not given.
    """
    size, window = config.size or view, config.window or view
    found = []
    for scale in config.scales:
        factor = size * scale / min(image.shape[:2])
        height, width = (max(round(side * factor), 1) for side in image.shape[:2])
        small = normalise(resize(image, height, width, interpolation)[None])[0]
        for flipped in (False, True)[: 1 + config.flip]:
            seen = small.flip(-1) if flipped else small
            if config.mode == "whole":
                own = look_whole(seen, logits, patch_size)
            else:
                own = slide(seen, logits, window, min(config.stride or max(2 * window // 3, 1), window))
            found.append(own.flip(-1) if flipped else own)
    return found


def label_map(
    found: Sequence[Float[Tensor, "C _ _"]], size: tuple[int, int]
) -> UInt8[Tensor, "{size[0]} {size[1]}"]:
    """Return the class of the largest logit at each pixel of an image of this size, on the CPU.

    Logits are enlarged bilinearly. Of several looks the probabilities are averaged, as Segmenter and
    MMSegmentation do, not the logits.
    """
    height, width = size
    step = max(ROOM // (len(found[0]) * width), 1)
    labels = torch.empty(height, width, dtype=torch.uint8)
    for top in range(0, height, step):
        rows = range(top, min(top + step, height))
        strips = [enlarged_rows(one, rows, size) for one in found]
        if len(strips) > 1:
            strips = [torch.stack([strip.softmax(dim=0) for strip in strips]).mean(dim=0)]
        labels[top : rows.stop] = strips[0].argmax(dim=0).to("cpu", torch.uint8)
    return labels


def enlarged_rows(
    field: Float[Tensor, "C h w"], rows: range, size: tuple[int, int]
) -> Float[Tensor, "C n {size[1]}"]:
    """Return these rows of a field that is resized bilinearly, so that not all of it has to be in memory."""
    before = field.shape[1]
    at = torch.arange(rows.start, rows.stop, device=field.device, dtype=torch.float64)
    at = ((at + 0.5) * (before / size[0]) - 0.5).clamp(0, before - 1)
    low = at.long()
    fraction = (at - low).to(field.dtype)[:, None]
    mixed = torch.lerp(field[:, low], field[:, (low + 1).clamp(max=before - 1)], fraction)
    return interpolate(mixed[None], (len(rows), size[1]), mode="bilinear", align_corners=False)[0]
