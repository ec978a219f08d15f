"""How images are made for a model of another library: as the library has it, as its authors, or as usual."""

import re
from collections.abc import Callable
from typing import Any

from foveola.config import UserError

PREPROCESSING = {
    "timm": ("timm", "official", "imagenet"),
    "hf": ("own", "official", "imagenet"),
}  # defaults first
# Families by the names of their models; the square that their authors' evaluations encode (None: the model's
# size), and the shorter side of the resized image over it. All resize bicubically and cut the centre.
OFFICIAL: tuple[tuple[str, int | None, float], ...] = (
    (r"dinov2", 224, 8 / 7),  # dinov2/data/transforms.py: 256, 224
    (r"dinov3", 224, 8 / 7),  # dinov3/eval/knn.py: 256, 224
    (r"\.dino$|facebook/dino-", 224, 8 / 7),  # dino/eval_knn.py, eval_linear.py: 256, 224
    (r"\.mae$|vit-mae-", 224, 8 / 7),  # mae/main_linprobe.py: 256, 224
    (r"(^|/)deit3_", None, 1.0),  # deit, DeiT III: --eval-crop-ratio 1.0
    (r"(^|/)deit[_-]", None, 8 / 7),  # deit/datasets.py: 256 / 224 of the size
)


def check_kind(library: str, name: str, kind: str | None) -> None:
    """Raise UserError unless the library's models know this kind of `preprocess`."""
    if kind is not None and kind not in PREPROCESSING[library]:
        raise UserError(f"{library}:{name}: preprocess={kind}: expected {', '.join(PREPROCESSING[library])}")


def transform_of(
    library: str, name: str, kind: str | None, size: int | None, own: Callable[[int | None], dict[str, Any]]
) -> dict[str, Any]:
    """Return a tree for TransformConfig.

    Args:
        name: of the model, in its library.
        kind: one of KINDS, None = the first: the library's settings, the `official` ones of the model's
            authors in their evaluations, or `imagenet`: 256, 224, bicubic, ImageNet's mean and deviation.
        size: pixels a side that are encoded; the shorter side keeps its ratio to them.
        own: gives the library's settings, for a size if there is one.

    Raises UserError where the authors' evaluations are not known.
    """
    kind = kind or PREPROCESSING[library][0]
    if kind == "imagenet":
        return _square(size or 224, 8 / 7)
    if kind != "official":
        return own(size)
    known = next(((side, ratio) for family, side, ratio in OFFICIAL if re.search(family, name.lower())), None)
    if known is None:
        others = " or ".join(other for other in PREPROCESSING[library] if other != "official")
        raise UserError(
            f"{library}:{name}: preprocess=official is known of DINO, DINOv2, DINOv3, MAE and DeiT, by the "
            f"model's name; take {others}"
        )
    settings, (side, ratio) = own(None), known
    geometry = _square(size or side or settings["crop"], ratio)
    return settings | geometry | {"interpolation": "bicubic", "squash": False}


def _square(crop: int, ratio: float) -> dict[str, Any]:
    return {"resize": round(crop * ratio), "crop": crop}
