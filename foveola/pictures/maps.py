"""What a network looks at and what it finds alike, as arrays."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from foveola.models.encoder import Encoder


@torch.no_grad()
def object_attention(
    encoder: Encoder,
    images: Float[Tensor, "B 3 H W"],
    objects: Bool[Tensor, "B M N"] | None = None,
    block: int = -1,
) -> Float[Tensor, "B M h w"]:
    """Attention of each object token over the patches in a block, averaged over heads; sums to at most one.

    What is missing from one goes to the token itself and to registers.

    Args:
        images: normalised, in whole patches.
        objects: patches that each token may read; None = one token that reads all.
        block: which block; negative numbers count from the last.
    """
    captured: list[Tensor] = []

    def look(module, inputs) -> None:
        x, _, *others = inputs
        captured.append(module.weights(x, *others))

    attention = encoder.backbone.get_submodule(f"blocks.{range(len(encoder.backbone.blocks))[block]}.attn")
    handle = attention.register_forward_pre_hook(look)
    try:
        features = encoder(images, objects)
    finally:
        handle.remove()
    count, registers = features.objects.shape[1], features.registers.shape[1]
    weights = captured[0][:, :, :count, count + registers :].mean(dim=1)
    return weights.unflatten(-1, features.grid).clone()


def neighbours(
    queries: Float[Tensor, "n D"], bank: Float[Tensor, "N D"], count: int
) -> Int64[Tensor, "n count"]:
    """Rows of the bank by falling cosine similarity to each query."""
    queries, bank = (torch.nn.functional.normalize(x.float(), dim=1) for x in (queries, bank))
    return (queries @ bank.T).topk(count, dim=1).indices


def heat(
    picture: UInt8[np.ndarray, "H W 3"], weights: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture in gray with `weights` as warm light over it, the largest weight brightest."""
    from PIL import Image

    height, width = picture.shape[:2]
    strength = weights / max(float(weights.max()), 1e-12)
    plane = Image.fromarray(strength.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST)
    share = np.asarray(plane)[:, :, None]
    warm = np.stack([np.ones_like(share), 0.85 * share**1.5, 0.1 * share**3], axis=2)[..., 0]
    gray = picture.mean(axis=2, keepdims=True) / 255 * 0.55
    return np.rint(255 * (gray * (1 - 0.8 * share) + 0.8 * share * warm)).clip(0, 255).astype(np.uint8)


def outline(
    picture: UInt8[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "h w"],
    color: tuple[int, int, int] = (255, 220, 0),
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture with everything outside `mask` darkened and the border of the mask drawn."""
    height, width = picture.shape[:2]
    rows, columns = np.arange(height) * mask.shape[0] // height, np.arange(width) * mask.shape[1] // width
    full = mask[rows][:, columns]
    out = np.where(full[:, :, None], picture, picture * 0.45).astype(np.uint8)
    inner = full.copy()
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        shifted = np.roll(full, step, axis)
        edge = (slice(0, 1) if step > 0 else slice(-1, None),)
        shifted[edge if axis == 0 else (slice(None), *edge)] = False
        inner &= shifted
    out[full & ~inner] = color
    return out
