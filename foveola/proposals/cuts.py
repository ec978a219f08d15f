"""Objects from features of patches: TokenCut, MaskCut, LOST, and maps that are thresholded. Pure functions.

All take a batch of images with the same grid (rows, columns), features or maps row-major, and return for each
image masks over its patches. An image has no object where nothing tells its patches apart: a mask without
patches, and one of all patches, is none.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from foveola.proposals.spectral import second_eigenvectors

WEAK_EDGE = 1e-5  # weight of an edge between patches that are not similar, so that every graph hangs together
AGAIN = 0.5  # IoU with the object before from which MaskCut has found it again
NO_DIFFERENCE = 1e-5  # of the length of features that do not differ, what is left once their mean is off
TINY = 0.01  # fraction of the image up to which a further object of MaskCut is none


class CutObjects(NamedTuple):
    """The objects of B images: at most K masks each, best first; an empty mask is no object."""

    masks: Bool[Tensor, "B K N"]
    scores: Float32[Tensor, "B K"]  # `objectness`; 0 of empty masks


def centred(features: Float[Tensor, "B N D"]) -> Float32[Tensor, "B N D"]:
    """Return features less their mean over the image's patches; zero where that leaves rounding alone.

    Some encoders (DINOv2's keys) have so much in common to all patches that none differ by their cosines.
    """
    x = features.float()
    length = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    x = x - x.mean(dim=1, keepdim=True)
    return torch.where(torch.linalg.vector_norm(x, dim=2, keepdim=True) > NO_DIFFERENCE * length, x, 0.0)


def affinity(
    features: Float[Tensor, "B N D"], tau: float, hidden: Bool[Tensor, "B N"] | None = None
) -> Float32[Tensor, "B N N"]:
    """Return the graph of TokenCut: 1 between patches whose cosine similarity is above `tau`, else 1e-5.

    `hidden` patches are similar to none, not even to themselves (MaskCut).
    """
    x = normalize(features.float(), dim=2)
    if hidden is not None:
        x = x.masked_fill(hidden[..., None], 0)
    return torch.where(x @ x.mT > tau, 1.0, WEAK_EDGE)


def tokencut(features: Float[Tensor, "B N D"], grid: tuple[int, int], tau: float = 0.2) -> CutObjects:
    """Return one object of each image (TokenCut, Wang et al. 2022, Section 3).

    The second eigenvector of the normalised cut is split at its mean. The object is on the side of its
    largest absolute value: the 4-connected patches around that one.
    """
    vector = second_eigenvectors(affinity(features, tau)).vectors
    seed = vector.argmax(dim=1)  # where the absolute value is largest, by `Eigen`
    front = vector > vector.mean(dim=1, keepdim=True)
    return _scored(around(front, seed, grid)[:, None], features, grid)


def maskcut(
    features: Float[Tensor, "B N D"], grid: tuple[int, int], tau: float = 0.15, objects: int = 3
) -> CutObjects:
    """Return up to `objects` objects of each image, none of which overlap (CutLER, Wang et al. 2023, Section
    3.1).

    TokenCut again and again, each time without the patches of the objects before. A side that has three or
    four corners of the image is background, whatever its values. A further object is none, and ends the
    search, where it is the one before again (IoU above 0.5), or where what is new in it has 1 % of the
    patches or less. (The published code looks at the corners of the side that is positive by accident of its
    solver; here that is the side of the largest absolute value.)
    """
    batch, count, _ = features.shape
    masks = torch.zeros(batch, objects, count, dtype=torch.bool, device=features.device)
    hidden = masks.new_zeros(batch, count)
    alive = torch.arange(batch, device=features.device)
    for index in range(objects):
        vector = second_eigenvectors(affinity(features[alive], tau, hidden[alive])).vectors
        front = vector > vector.mean(dim=1, keepdim=True)
        behind = (corners(front, grid) >= 3)[:, None] & vector.any(dim=1, keepdim=True)
        seed = torch.where(behind, -vector, vector).argmax(dim=1)
        mask = around(front ^ behind, seed, grid)
        new = mask & ~hidden[alive]
        if index:
            before = masks[alive, index - 1]
            again = (mask & before).sum(dim=1) > AGAIN * (mask | before).sum(dim=1)
            new = new & ~(again | (new.sum(dim=1) <= TINY * count))[:, None]
        masks[alive, index] = new
        hidden[alive] |= new
        alive = alive[new.any(dim=1)]
        if not len(alive):
            break
    return _scored(masks, features, grid)


def lost(features: Float[Tensor, "B N D"], grid: tuple[int, int], k: int = 100) -> CutObjects:
    """Return one object of each image (LOST, Simeoni et al. 2021, Section 3).

    Patches are alike if their product is positive. The seed is the patch that is alike to the fewest, the
    first of equals. Of the `k` patches that are alike to the fewest, those that are alike to the seed vote: a
    patch belongs to the object if the sum of its products with them is positive, and if such patches connect
    it to the seed.
    """
    x = features.float()
    product = x @ x.mT
    alike = (product > 0).sum(dim=2) - (product.diagonal(dim1=1, dim2=2) > 0).int()
    order = alike.argsort(dim=1, stable=True)
    seed = order[:, 0]
    candidates = torch.zeros_like(alike, dtype=torch.bool).scatter(1, order[:, :k], True)
    with_seed = product.gather(1, seed[:, None, None].expand(-1, 1, x.shape[1]))[:, 0] > 0
    votes = ((candidates & with_seed).to(x.dtype)[:, None] @ product)[:, 0]
    return _scored(around(votes > 0, seed, grid)[:, None], features, grid)


def brightest(
    maps: Float[Tensor, "B N"], features: Float[Tensor, "B N D"], grid: tuple[int, int], fraction: float = 0.6
) -> CutObjects:
    """Return one object of each image from a map that is nowhere negative, such as attention (DINO).

    The brightest patches that together have `fraction` of the map's sum are kept, and of these the largest
    4-connected part, the first of equals. A constant map has no object.
    """
    weights = maps.double() / maps.double().sum(dim=1, keepdim=True)
    dark_first, order = weights.sort(dim=1, stable=True)
    bright = torch.zeros_like(weights, dtype=torch.bool).scatter(
        1, order, dark_first.cumsum(1) > 1 - fraction
    )
    bright &= (maps.amin(dim=1) < maps.amax(dim=1))[:, None]
    labels = connected(bright.unflatten(1, grid)).flatten(1)
    count = maps.shape[1]
    sizes = torch.zeros(len(maps), count + 1, dtype=torch.int64, device=maps.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    largest = sizes[:, :count].argmax(dim=1, keepdim=True)
    return _scored(((labels == largest) & bright)[:, None], features, grid)


def separation(features: Float[Tensor, "B N D"], masks: Bool[Tensor, "B K N"]) -> Float32[Tensor, "B K"]:
    """Return how much more alike an object's patches are to each other than to the others.

    That is the mean cosine similarity of its pairs of patches, less that of the pairs of one of its own and
    one of the others: in [-2, 2]. 0 of a mask of no patches, or of all.
    """
    x = normalize(features.double(), dim=2)
    inside = masks.double()
    own, other = inside @ x, (1 - inside) @ x
    size = inside.sum(dim=2)
    rest = inside.shape[2] - size
    within = own.square().sum(dim=2) / size.square().clamp(min=1)
    between = (own * other).sum(dim=2) / (size * rest).clamp(min=1)
    return torch.where((size > 0) & (rest > 0), within - between, 0.0).float()


def objectness(
    features: Float[Tensor, "B N D"], masks: Bool[Tensor, "B K N"], grid: tuple[int, int]
) -> Float32[Tensor, "B K"]:
    """Return how sure it is that masks are objects, in [0, 1]: half the `separation`, negative ones being 0,
    times the fraction of the image's border that the mask leaves free.
    """
    border = torch.ones(grid, dtype=torch.bool, device=masks.device)
    border[1:-1, 1:-1] = False
    free = 1 - (masks & border.flatten()).sum(dim=2) / border.sum()
    return separation(features, masks).clamp(min=0) / 2 * free


def connected(masks: Bool[Tensor, "B h w"]) -> Int64[Tensor, "B h w"]:
    """Return of each patch the first index of the 4-connected part of the mask that it is in; h w outside."""
    rows, columns = masks.shape[1:]
    outside = rows * columns
    index = torch.arange(outside, device=masks.device).view(1, rows, columns)
    labels = torch.where(masks, index, outside)
    while True:
        grown = labels.clone()
        grown[:, 1:] = torch.minimum(grown[:, 1:], labels[:, :-1])
        grown[:, :-1] = torch.minimum(grown[:, :-1], labels[:, 1:])
        grown[:, :, 1:] = torch.minimum(grown[:, :, 1:], labels[:, :, :-1])
        grown[:, :, :-1] = torch.minimum(grown[:, :, :-1], labels[:, :, 1:])
        grown = torch.where(masks, grown, outside)
        # What the first patch of its part has learned meanwhile: a long part takes few rounds.
        further = grown.flatten(1).gather(1, grown.flatten(1).clamp(max=outside - 1)).view_as(grown)
        grown = torch.where(masks, further, outside)
        if torch.equal(grown, labels):
            return labels
        labels = grown


def around(
    masks: Bool[Tensor, "B N"], seeds: Int64[Tensor, "B"], grid: tuple[int, int]
) -> Bool[Tensor, "B N"]:
    """Return the 4-connected part of each mask that holds its seed, empty where the seed is outside."""
    labels = connected(masks.unflatten(1, grid)).flatten(1)
    return masks & (labels == labels.gather(1, seeds[:, None]))


def corners(masks: Bool[Tensor, "B N"], grid: tuple[int, int]) -> Int64[Tensor, "B"]:
    """Return how many of the four corners of the grid are in each mask."""
    field = masks.unflatten(1, grid)
    return field[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(dim=1)


def _scored(
    masks: Bool[Tensor, "B K N"], features: Float[Tensor, "B N D"], grid: tuple[int, int]
) -> CutObjects:
    masks = masks & ~masks.all(dim=2, keepdim=True)
    return CutObjects(masks, objectness(features, masks, grid))
