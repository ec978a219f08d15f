"""What the shapes of tensors say about the size of a ViT."""

import math
import re
from collections.abc import Iterable
from typing import Any

WRAPPERS = ("teacher", "target_encoder", "state_dict", "model", "student")  # dicts in files, preferred first
WIDTHS: dict[int, dict[str, Any]] = {
    192: {"size": "tiny", "heads": 3},
    384: {"size": "small", "heads": 6},
    768: {"size": "base", "heads": 12},
    1024: {"size": "large", "heads": 16},
    1280: {"size": "huge", "heads": 16},
    1408: {"size": "giant", "width": 1408, "heads": 16},  # I-JEPA's; DINOv2's is wider
    1536: {"size": "giant", "heads": 24},
}


def size_of(width: int, heads: int | None = None) -> dict[str, Any]:
    """Size, width and heads as keys of ViTConfig; of any width if the heads are known.

    Tensors do not tell how many heads share a width. Raises ValueError for widths of no published model.
    """
    if width in WIDTHS:
        return WIDTHS[width] | ({} if heads is None else {"heads": heads})
    if heads is None:
        raise ValueError(f"a ViT of width {width} is unknown; known widths: {', '.join(map(str, WIDTHS))}")
    return {"size": "small", "width": width, "heads": heads}


def depth_of(names: Iterable[str], prefix: str = "blocks.") -> int:
    """Blocks, by the highest number after `prefix`; 0 where there is none."""
    numbers = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in names)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio that gives `hidden` back as int(width * ratio), which rounding may bring below."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def patch_kernel(kernel: Any, name: str) -> tuple[int, int]:
    """(width, side of a patch) of the weights of a patch embedding. Raises ValueError unless they fit."""
    shape = tuple(kernel.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"{name} is {shape}, expected (width, 3, side, side)")
    return shape[0], shape[2]
