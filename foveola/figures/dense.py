"""Features of every patch of an image, at any resolution: whole, or in overlapping tiles where it is big."""

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from foveola.config import UserError
from foveola.models.encoder import Encoder
from foveola.models.transform import fit_to_patches
from foveola.models.vit import Inputs

PATCHES_AT_ONCE = (
    4096  # patches of an image that is encoded at once when nobody says how; more are cut into tiles
)
OVERLAP = 0.5  # of a tile's side that it shares with the next


def patch_map(
    encoder: Encoder,
    image: Shaped[np.ndarray, "H W ch"],
    size: int | None = None,
    tile: int | None = None,
    overlap: float = OVERLAP,
) -> Float32[np.ndarray, "h w D"]:
    """Return features of the h x w patches of an image, after the final norm.

    The image is resized so that its longer side has `size` pixels, in whole patches, its aspect ratio kept.
    Positions are interpolated, computed anew or rotary, as the encoder has them.

    Args:
        size: pixels of the longer side; None = that of the encoder's transform.
        tile: pixels a side of the squares in which a larger image is encoded; 0 = always at once; None = at
            once up to 4096 patches, above in tiles of the transform's size.
        overlap: fraction of a tile's side that it has in common with the next. Where tiles overlap, features
            are averaged with weights that fall towards a tile's border, so that no seams show.

    A tile is encoded as an image of its own: it knows nothing of what lies outside, and its positions are
    those of a whole image, except with a position field, which is read where the tile lies. Memory is that
    of the result and of 4096 patches (or one tile) in the network. Raises UserError for sizes below a patch.
    """
    if size is not None and size < encoder.patch_size:
        raise UserError(f"size={size}: a patch of this encoder has {encoder.patch_size} pixels a side")
    if not 0 <= overlap < 1:
        raise UserError(f"overlap={overlap}: expected a fraction of a tile, at least 0 and below 1")
    pixels = fit_to_patches(image, encoder.config.transform, encoder.patch_size, size)
    grid = tuple(side // encoder.patch_size for side in pixels.shape[1:])
    if tile is None:
        tile = 0 if grid[0] * grid[1] <= PATCHES_AT_ONCE else encoder.config.transform.crop
    side = round(tile / encoder.patch_size)
    if tile and not side:
        raise UserError(f"tile={tile}: a patch of this encoder has {encoder.patch_size} pixels a side")
    if not side or (grid[0] <= side and grid[1] <= side):
        return _encode(encoder, pixels[None], [(0.0, 0.0, 1.0, 1.0)])[0]
    return _tiled(encoder, pixels, side, overlap)


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Return where tiles of `side` patches begin along an axis of `length`: evenly, from end to end."""
    if length <= side:
        return [0]
    step = max(int(side * (1 - overlap)), 1)
    count = -(-(length - side) // step) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _tiled(
    encoder: Encoder, pixels: Shaped[Tensor, "ch H W"], side: int, overlap: float
) -> Float32[np.ndarray, "h w D"]:
    patch = encoder.patch_size
    rows, columns = (length // patch for length in pixels.shape[1:])
    high, wide = min(side, rows), min(side, columns)
    corners = [(y, x) for y in starts(rows, high, overlap) for x in starts(columns, wide, overlap)]
    weights = np.outer(_ramp(high), _ramp(wide))[:, :, None]
    total, weight_sums = np.zeros((rows, columns, 0), np.float32), np.zeros((rows, columns, 1), np.float32)
    at_once = max(PATCHES_AT_ONCE // (high * wide), 1)
    for start in range(0, len(corners), at_once):
        block = corners[start : start + at_once]
        cuts = [pixels[:, patch * y : patch * (y + high), patch * x : patch * (x + wide)] for y, x in block]
        positions = [(x / columns, y / rows, (x + wide) / columns, (y + high) / rows) for y, x in block]
        for (y, x), features in zip(block, _encode(encoder, torch.stack(cuts), positions), strict=True):
            if not total.shape[2]:
                total = np.zeros((rows, columns, features.shape[2]), np.float32)
            total[y : y + high, x : x + wide] += weights * features
            weight_sums[y : y + high, x : x + wide] += weights
    total /= weight_sums
    return total


def _ramp(length: int) -> Float32[np.ndarray, "{length}"]:
    """Weights that rise from the border of a tile to its middle, linearly."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
    return (distance / distance.max()).astype(np.float32)


@torch.inference_mode()
def _encode(
    encoder: Encoder, pixels: Shaped[Tensor, "B ch H W"], positions: list[tuple[float, float, float, float]]
) -> Float32[np.ndarray, "B h w D"]:
    images = encoder.normalise(pixels.to(encoder.device))
    network = encoder.backbone
    where = None
    if not encoder.wrapped and network.pos_field is not None:  # of somebody else's network nobody knows
        where = torch.tensor(positions, device=encoder.device)
    features = network(images) if where is None else network(images, Inputs(positions=where))
    return features.patches.unflatten(1, features.grid).float().cpu().numpy()
