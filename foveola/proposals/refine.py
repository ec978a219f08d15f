"""From masks over patches to masks of pixels: the patches themselves, or edges where the colours change."""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch.nn.functional import interpolate

from foveola.config import UserError

Refine = Literal["none", "grabcut"]
GRABCUT_ROUNDS = 1  # of GrabCut: a second one changes little
CHANGED = 0.5  # IoU with the patches below which the colours say nothing of the object


def enlarged(masks: Bool[np.ndarray, "K h w"], size: tuple[int, int]) -> Bool[np.ndarray, "K H W"]:
    """Return masks over patches at the pixels of an image: each pixel has the value of the patch at its
    centre.
    """
    rows, columns = (
        ((np.arange(large) + 0.5) * small / large).astype(np.int64)
        for large, small in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows[:, None], columns]


def grabcut(
    masks: Bool[np.ndarray, "K h w"], pixels: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]
) -> Bool[np.ndarray, "K H2 W2"]:
    """Return masks of pixels, of `size`, whose edges follow the colours of an image (Rother et al., 2004).

    For each mask, within a patch of its border, GrabCut decides on `pixels`, the image as it was encoded, so
    that the cost does not depend on the image; what is further inside or outside stays. A mask that becomes
    another one (IoU below 0.5) stays as it is. Pixels that several claim are the first one's. The result is
    enlarged linearly. Raises UserError without OpenCV.
    """
    cv2 = opencv()
    taken = np.zeros(pixels.shape[:2], bool)
    found = np.zeros((len(masks), *pixels.shape[:2]), bool)
    for index, mask in enumerate(masks):
        plain = enlarged(mask[None], pixels.shape[:2])[0]
        cut = _one(cv2, mask, pixels, plain)
        if (cut & plain).sum() < CHANGED * (cut | plain).sum():
            cut = plain
        found[index] = cut & ~taken
        taken |= cut
    large = interpolate(torch.from_numpy(found)[:, None].float(), size, mode="bilinear", align_corners=False)
    return (large[:, 0] > 0.5).numpy()


def _one(
    cv2: Any,
    mask: Bool[np.ndarray, "h w"],
    pixels: UInt8[np.ndarray, "H W 3"],
    plain: Bool[np.ndarray, "H W"],
) -> Bool[np.ndarray, "H W"]:
    square = np.ones((3, 3), np.uint8)
    shrunk, grown = (edit(mask.astype(np.uint8), square) > 0 for edit in (cv2.erode, cv2.dilate))
    inside, near = enlarged(np.stack((shrunk, grown)), plain.shape)
    labels = np.where(plain, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[inside], labels[~near] = cv2.GC_FGD, cv2.GC_BGD
    if plain.all() or not plain.any():
        return plain
    cv2.setRNGSeed(0)  # its clusters of colours begin at random
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.ascontiguousarray(pixels), labels, None, *models, GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def opencv() -> Any:
    """Return OpenCV. Raises UserError where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "refine=grabcut needs OpenCV: pip install 'foveola[proposals]', or write refine=none"
        ) from error
    return cv2
