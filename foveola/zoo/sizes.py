"""What the shapes of tensors say about the size of a ViT, and what they do not."""

import math
import re
from collections.abc import Iterable
from typing import Any

WRAPPERS = ("teacher", "target_encoder", "state_dict", "model", "student")  # dicts in files, preferred first
WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
# Published networks of DINO, iBOT, DINOv2, I-JEPA, CAPI, DeiT by (width, depth, hidden channels of the MLP).
HEADS = {
    (192, 12, 768): 3,
    (384, 12, 1536): 6,
    (768, 12, 3072): 12,
    (1024, 24, 4096): 16,
    (1280, 32, 5120): 16,
    (1408, 40, 6144): 16,  # I-JEPA's giant; DINOv2's is wider
    (1536, 40, 4096): 24,  # gated: that many of each kind
}
MOCO = HEADS | {(384, 12, 1536): 12}  # its ViT-S has heads of 32 channels
MAE = {shape: heads for shape, heads in HEADS.items() if shape[0] >= 768}  # smaller ones are of other authors


def size_of(width: int, heads: int) -> dict[str, Any]:
    """Return size, width and heads as keys of ViTConfig."""
    known = {"size": WIDTHS[width]} if width in WIDTHS else {"size": "small", "width": width}
    return known | {"heads": heads}


def published_heads(shape: tuple[int, int, int], published: dict[tuple[int, int, int], int] = HEADS) -> int:
    """Return heads of the published network of this (width, depth, hidden channels).

    Tensors do not tell how many heads share a width. Raises ValueError for a shape that is not published.
    """
    if shape not in published:
        width, depth, hidden = shape
        raise ValueError(
            f"no published model of its kind has width {width}, depth {depth} and {hidden} channels in its "
            "MLP, and tensors do not tell the attention heads: say what its code says, as in "
            f"FILE?heads={max(width // 64, 1)}"
        )
    return published[shape]


def depth_of(names: Iterable[str], prefix: str = "blocks.") -> int:
    """Return blocks, by the highest number after `prefix`; 0 where there is none."""
    numbers = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in names)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def mlp_ratio(hidden: int, width: int) -> float:
    """Return a ratio that gives `hidden` back as int(width * ratio), which rounding may bring below."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def patch_kernel(kernel: Any, name: str) -> tuple[int, int]:
    """Return (width, side of a patch) of the weights of a patch embedding. Raises ValueError unless
    they fit.
    """
    shape = tuple(kernel.shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"{name} is {shape}, expected (width, channels, side, side)")
    return shape[0], shape[2]
