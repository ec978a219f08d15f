"""What a network looks at and what it finds alike, as arrays."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from foveola.config import UserError
from foveola.models.encoder import Encoder

MASS = 0.6  # of a token's attention that its strongest patches hold together (DINO's and iBOT's images)
COSINES_AT_ONCE = 2**25  # cosines in memory at a time (128 MiB)


@torch.no_grad()
def token_attention(
    encoder: Encoder,
    images: Float[Tensor, "B ch H W"],
    objects: Bool[Tensor, "B M N"] | None = None,
    block: int = -1,
) -> Float[Tensor, "B M heads h w"]:
    """Return the attention of each object token over the patches in a block, of each head; sums to at most
    one.

    What is missing from one goes to the token itself and to registers.

    Args:
        images: normalised, in whole patches.
        objects: patches that each token may read; None = one token that reads all, the class token.
        block: which block; negative numbers count from the last.

    Raises UserError for a block that there is not, and where there is no class token.
    """
    if not encoder.config.model.class_token:
        raise UserError(
            "this encoder has no class token whose attention could be shown; ask for that of a patch"
        )
    seen = encoder.attention(images, objects, block)
    return seen.objects()[..., seen.special :].transpose(1, 2).unflatten(-1, seen.grid)


@torch.no_grad()
def object_attention(
    encoder: Encoder,
    images: Float[Tensor, "B ch H W"],
    objects: Bool[Tensor, "B M N"] | None = None,
    block: int = -1,
) -> Float[Tensor, "B M h w"]:
    """Return `token_attention`, averaged over heads."""
    return token_attention(encoder, images, objects, block).mean(dim=2)


@torch.no_grad()
def query_attention(
    encoder: Encoder,
    images: Float[Tensor, "B ch H W"],
    points: Float[Tensor, "B 2"],
    block: int = -1,
) -> Float[Tensor, "B heads h w"]:
    """Return what the patch under a point reads of the patches, of each head; every map sums to one.

    `points` are (x, y) in the unit square. Object tokens and registers are left out, and the rest of the
    patch's row of the attention matrix is divided by its sum (position field paper, Figure 6, which shows the
    mean over heads).
    """
    grid = images.shape[2] // encoder.patch_size, images.shape[3] // encoder.patch_size
    cells = [patch_under((x, y), grid) for x, y in points.tolist()]
    patches = torch.tensor([[row * grid[1] + column] for row, column in cells], device=images.device)
    seen = encoder.attention(images, block=block)
    weights = seen.patches(patches)[:, :, 0, seen.special :]
    return (weights / weights.sum(dim=-1, keepdim=True)).unflatten(-1, seen.grid)


@torch.no_grad()
def received_attention(
    encoder: Encoder, images: Float[Tensor, "B ch H W"], block: int = -1
) -> Float[Tensor, "B heads h w"]:
    """Return how much of the patches' attention to patches each patch receives, of each head; maps sum to
    one.

    The mean of the rows of all patches: for encoders without a class token, what everybody looks at.
    """
    seen = encoder.attention(images, block=block)
    return seen.received().unflatten(-1, seen.grid)


def strongest(weights: Float[Tensor, "*S h w"], mass: float = MASS) -> Bool[Tensor, "*S h w"]:
    """Return the fewest patches that hold at least the fraction `mass` of each map, the strongest first.

    Of equal patches the upper left ones first. A map of zeros has none.
    """
    flat = weights.flatten(-2).double()
    order = flat.argsort(dim=-1, descending=True, stable=True)
    sums = flat.gather(-1, order).cumsum(dim=-1)
    # A patch is needed while those before it hold less than the mass; 1e-12 is the rounding of the sums.
    before = torch.cat((torch.zeros_like(sums[..., :1]), sums[..., :-1]), dim=-1)
    needed = before < mass * sums[..., -1:] * (1 - 1e-12)
    return torch.zeros_like(needed).scatter(-1, order, needed).view(weights.shape)


def patch_under(point: tuple[float, float], grid: tuple[int, ...]) -> tuple[int, int]:
    """Return (row, column) of the patch that holds the point (x, y) of the unit square."""
    row, column = (
        min(max(int(coordinate * n), 0), n - 1) for coordinate, n in zip(point[::-1], grid, strict=True)
    )
    return row, column


def centre_of(point: tuple[float, float], grid: tuple[int, ...]) -> tuple[float, float]:
    """Return the centre (x, y) of the patch under a point."""
    row, column = patch_under(point, grid)
    return (column + 0.5) / grid[1], (row + 0.5) / grid[0]


# -- what is alike -------------------------------------------------------------------------------------------


def neighbours(
    queries: Float[Tensor, "n D"], references: Float[Tensor, "N D"], count: int
) -> Int64[Tensor, "n count"]:
    """Return rows of the references by falling cosine similarity to each query."""
    queries, references = (normalize(x.float(), dim=1) for x in (queries, references))
    return (queries @ references.T).topk(count, dim=1).indices


def similarity(
    features: Float[np.ndarray, "h w D"], point: tuple[float, float]
) -> Float32[np.ndarray, "h w"]:
    """Return the cosine of the features of every patch with those of the patch under the point (x, y), unit
    square.
    """
    unit = _unit(features)
    return unit @ unit[patch_under(point, features.shape[:2])]


class Pairs(NamedTuple):
    """Patches of two images that match, best first: (row, column) of each, and their cosine."""

    first: Int64[np.ndarray, "n 2"]
    second: Int64[np.ndarray, "n 2"]
    cosines: Float32[np.ndarray, "n"]


def correspondences(
    first: Float[np.ndarray, "h w D"], second: Float[np.ndarray, "h2 w2 D"], count: int = 12
) -> Pairs:
    """Return the best pairs of patches of two images that are each other's nearest neighbours, by cosine.

    At most `count` of them (iBOT shows 12): there can be fewer that agree. Of equals, the upper left first.
    """
    a, b = (_unit(x).reshape(-1, x.shape[-1]) for x in (first, second))
    forth, back = _nearest(a, b), _nearest(b, a)
    rows = np.flatnonzero(back[0][forth[0]] == np.arange(len(a)))
    cosines = forth[1][rows]
    order = np.argsort(-cosines, kind="stable")[:count]
    rows = rows[order]
    cells = [
        np.stack(np.divmod(index, grid.shape[1]), axis=1).astype(np.int64)
        for index, grid in ((rows, first), (forth[0][rows], second))
    ]
    return Pairs(cells[0], cells[1], cosines[order])


def _nearest(
    a: Float32[np.ndarray, "n D"], b: Float32[np.ndarray, "m D"]
) -> tuple[Int64[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """The row of b of highest cosine for each row of a, and that cosine; computed in blocks of a."""
    best, cosines = np.zeros(len(a), np.int64), np.zeros(len(a), np.float32)
    at_once = max(COSINES_AT_ONCE // len(b), 1)
    for start in range(0, len(a), at_once):
        part = a[start : start + at_once] @ b.T
        best[start : start + at_once] = part.argmax(axis=1)
        cosines[start : start + at_once] = part.max(axis=1)
    return best, cosines


def _unit(features: Float[np.ndarray, "*S D"]) -> Float32[np.ndarray, "*S D"]:
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    return (features / np.maximum(length, 1e-12)).astype(np.float32)
