"""Statistics of attention matrices: who reads what, how widely, how far, and how alike its readers are.

Each is computed for one head and one image, from float32 logits by the log of their sum of exponentials,
with what is left after the sum over patches in float64; averages come afterwards. Natural logarithms, and
nothing is added inside them. Tokens stand in the order [class token, registers, patches]; N patches, R
registers, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

LOWEST = -1e30  # stands for the logarithm of zero: its exponential is zero, its product with zero too


class Reference(NamedTuple):
    """What a statistic is where every token reads every token alike, and where it lies for any attention."""

    uniform: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Layout:
    """What the rows and columns of an attention matrix are."""

    class_token: bool
    registers: int
    grid: tuple[int, int]  # rows and columns of patches
    patch_size: int  # pixels

    @property
    def special(self) -> int:
        """Tokens before the patches."""
        return self.class_token + self.registers

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def centre(self) -> int:
        """The central patch, of an even grid the upper left one of the four."""
        rows, columns = self.grid
        return (rows - 1) // 2 * columns + (columns - 1) // 2

    @cached_property
    def distances(self) -> Float32[Tensor, "N N"]:
        """Pixels between the centres of any two patches."""
        rows, columns = self.grid
        positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).double()
        return (
            torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist") * self.patch_size
        ).float()


class Statistic(NamedTuple):
    """A number of each head, or of each block."""

    title: str
    unit: str
    reference: Callable[[Layout], Reference]


def _fraction(part: Callable[[Layout], int]) -> Callable[[Layout], Reference]:
    """The fraction of the attention that goes to one group of the T tokens."""
    return lambda at: Reference(part(at) / (at.special + at.patches), 0.0, 1.0)


def _entropy(at: Layout) -> Reference:
    return Reference(math.log(at.patches), 0.0, math.log(at.patches))


def _distance(at: Layout) -> Reference:
    d = at.distances.double()
    return Reference(d.mean().item(), 0.0, d.amax(dim=1).mean().item())


def _relative_distance(at: Layout) -> Reference:
    side = math.sqrt(at.patches) * at.patch_size
    return Reference(*(None if value is None else value / side for value in _distance(at)))


def _positive(at: Layout) -> Reference:
    return Reference(None, 0.0, None)


HEAD_STATISTICS = {
    "class_to_class": Statistic("class token's attention to itself", "share", _fraction(lambda at: 1)),
    "class_to_registers": Statistic(
        "class token's attention to registers", "share", _fraction(lambda at: at.registers)
    ),
    "class_to_patches": Statistic(
        "class token's attention to patches", "share", _fraction(lambda at: at.patches)
    ),
    "class_entropy": Statistic("entropy of the class token's attention to patches", "nats", _entropy),
    "head_divergence": Statistic(
        "KL divergence from the class token's other heads",
        "nats",
        lambda at: Reference(0.0, 0.0, None),
    ),
    "patch_to_class": Statistic("patches' attention to the class token", "share", _fraction(lambda at: 1)),
    "patch_to_registers": Statistic(
        "patches' attention to registers", "share", _fraction(lambda at: at.registers)
    ),
    "patch_self": Statistic(
        "a patch's attention to itself, of all patches",
        "share",
        lambda at: Reference(1 / at.patches, 0.0, 1.0),
    ),
    "patch_entropy": Statistic("entropy of a patch's attention to patches", "nats", _entropy),
    "nmi": Statistic(
        "normalised mutual information of queries and keys", "", lambda at: Reference(0.0, 0.0, 1.0)
    ),
    "distance": Statistic("mean attention distance", "pixels", _distance),
    "distance_share": Statistic("mean attention distance", "sides of the image", _relative_distance),
}
BLOCK_STATISTICS = {
    "aggregation_entropy": Statistic("entropy of the mean of the class token's heads", "nats", _entropy),
    "lowest_entropy": Statistic("entropy of the class token's sharpest head", "nats", _entropy),
    "class_norm": Statistic("norm of the class token", "", _positive),
    "register_norm": Statistic("norm of registers, mean", "", _positive),
    "patch_norm": Statistic("norm of patches, mean", "", _positive),
    "patch_norm_max": Statistic("norm of patches, largest of an image", "", _positive),
    "outliers": Statistic(
        "patches of outlying norm in an image", "patches", lambda at: Reference(None, 0.0, at.patches)
    ),
    "outlier_share": Statistic("patches of outlying norm", "share", lambda at: Reference(None, 0.0, 1.0)),
    "outlier_share_fixed": Statistic(
        "patches of a norm above the given one", "share", lambda at: Reference(None, 0.0, 1.0)
    ),
}


def missing(at: Layout, heads: int) -> set[str]:
    """Return statistics that this encoder has not: NaN in tensors, null in files."""
    names = {name for name in (*HEAD_STATISTICS, *BLOCK_STATISTICS) if not at.class_token and "class" in name}
    names |= set() if at.class_token else {"head_divergence", "lowest_entropy"}
    names |= set() if heads > 1 else {"head_divergence"}
    return names | (set() if at.registers else {"class_to_registers", "patch_to_registers", "register_norm"})


# -- of one block --------------------------------------------------------------------------------------------


class HeadParts(NamedTuple):
    """Statistics of heads of a block, for a batch of images."""

    statistics: Float64[Tensor, "b g S"]  # in the order of HEAD_STATISTICS, without head_divergence: NaN
    class_rows: Float64[Tensor, "b g T"] | None  # logarithm of what the class token reads
    centre_rows: Float64[Tensor, "b g T"]  # logarithm of what the central patch reads


def head_statistics(
    logits: Float32[Tensor, "b g T T"], at: Layout, distances: Float32[Tensor, "N N"] | None = None
) -> HeadParts:
    """Return statistics of attention softmax(logits), of each image and head. Overwrites `logits`.

    `distances` are `at.distances` on the device of the logits. Five sweeps over the matrix suffice: with the
    largest logit of each row subtracted, z = sum e^l and s = sum l e^l give the entropy ln z - s / z; the
    information of queries about keys is the entropy of the mean row minus the mean of the entropies.
    """
    distances = at.distances.to(logits.device) if distances is None else distances
    special, full = at.special, math.log(at.patches)
    found = dict.fromkeys(HEAD_STATISTICS, logits.new_full(logits.shape[:2], torch.nan, dtype=torch.float64))
    class_rows = logits[:, :, 0].double().log_softmax(dim=-1) if at.class_token else None
    centre_rows = logits[:, :, special + at.centre].double().log_softmax(dim=-1)
    if class_rows is not None:
        found |= _class_statistics(class_rows, at)
    patches = logits[:, :, special:]
    others, own = patches[..., :special].double(), patches[..., special:]
    peak = own.amax(dim=-1, keepdim=True)
    weights = own.sub_(peak).exp().contiguous()
    z = weights.sum(dim=-1).double()
    entropy = (z.log() - own.mul_(weights).sum(dim=-1).double() / z).clamp(0, full).mean(dim=-1)
    weights.mul_(z.reciprocal().to(weights.dtype)[..., None])
    found["patch_entropy"] = entropy
    found["patch_self"] = weights.diagonal(dim1=-2, dim2=-1).double().mean(dim=-1)
    found["nmi"] = _nmi(weights.mean(dim=-2).double(), entropy)
    far = torch.mul(weights, distances, out=weights).sum(dim=-1).double().mean(dim=-1)
    found["distance"] = far
    found["distance_share"] = far / (math.sqrt(at.patches) * at.patch_size)
    total = torch.cat((others, peak.double() + z.log()[..., None]), dim=-1).logsumexp(dim=-1, keepdim=True)
    fractions = (others - total).exp().mean(dim=-2)
    if at.class_token:
        found["patch_to_class"] = fractions[..., 0]
    if at.registers:
        found["patch_to_registers"] = fractions[..., int(at.class_token) :].sum(dim=-1)
    statistics = torch.stack([found[name] for name in HEAD_STATISTICS], dim=-1)
    return HeadParts(statistics, class_rows, centre_rows)


def _class_statistics(rows: Float64[Tensor, "b g T"], at: Layout) -> dict[str, Tensor]:
    found = {"class_to_class": rows[..., 0].exp(), "class_entropy": entropy_of(over_patches(rows, at))}
    found["class_to_patches"] = rows[..., at.special :].exp().sum(dim=-1)
    if at.registers:
        found["class_to_registers"] = rows[..., 1 : at.special].exp().sum(dim=-1)
    return found


def _nmi(mean: Float64[Tensor, "b g N"], entropy: Float64[Tensor, "b g"]) -> Float64[Tensor, "b g"]:
    """Mutual information of query and key over the root of the product of their entropies (Park et al.).

    Queries are drawn alike; keys are distributed as the `mean` of the rows, whose entropies have the mean
    `entropy`. 0 where all queries read one key: then there is nothing to know.
    """
    keys = torch.special.entr(mean / mean.sum(dim=-1, keepdim=True)).sum(dim=-1)
    scale = (keys * math.log(mean.shape[-1])).sqrt()
    nonzero = scale > 0
    return torch.where(nonzero, (keys - entropy) / torch.where(nonzero, scale, 1.0), 0.0).clamp(0, 1)


def logits_for(weights: Float[Tensor, "b g T T"]) -> Float32[Tensor, "b g T T"]:
    """Return logits whose softmax are the given attention matrices, zeros included."""
    return weights.double().log().clamp(min=LOWEST).float()


# -- aggregation vectors -------------------------------------------------------------------------------------


def over_patches(rows: Float64[Tensor, "... T"], at: Layout) -> Float64[Tensor, "... N"]:
    """Return logarithms of what is read of the patches alone: other tokens dropped, the rest summing to
    one.
    """
    return rows[..., at.special :].log_softmax(dim=-1)


def mean_head(rows: Float64[Tensor, "b heads T"], at: Layout) -> Float64[Tensor, "b N"]:
    """Return logarithms of the mean over the heads, then renormalised over the patches (Selective
    Aggregation).
    """
    return over_patches(rows.logsumexp(dim=1) - math.log(rows.shape[1]), at)


def sharpest_head(rows: Float64[Tensor, "b heads T"], at: Layout) -> Float64[Tensor, "b N"]:
    """Return logarithms over the patches of each image's head of lowest entropy."""
    every = over_patches(rows, at)
    return every[torch.arange(len(every), device=every.device), entropy_of(every).argmin(dim=1)]


def entropy_of(log: Float64[Tensor, "... N"]) -> Float64[Tensor, "..."]:
    """Return the entropy in nats of distributions given by logarithms."""
    return -(log.exp() * log).sum(dim=-1).clamp(-math.log(log.shape[-1]), 0)


def divergences(log: Float64[Tensor, "b V N"]) -> Float64[Tensor, "b V V"]:
    """Return KL(p || q) = sum p ln(p / q) in nats of V distributions given by logarithms; row p, column q."""
    p = log.exp()
    own = (p * log).sum(dim=-1, keepdim=True)
    return (own - p @ log.mT).clamp(min=0)


def head_divergence(matrix: Float64[Tensor, "b heads heads"]) -> Float64[Tensor, "b heads"]:
    """Return the mean divergence of each head from the others; NaN for a single head."""
    heads = matrix.shape[1]
    total = matrix.sum(dim=2) - matrix.diagonal(dim1=1, dim2=2)
    return total / (heads - 1) if heads > 1 else torch.full_like(total, torch.nan)


# -- norms ---------------------------------------------------------------------------------------------------


def norm_statistics(
    x: Float[Tensor, "b T D"], at: Layout, deviations: float, factor: float, fixed: float | None
) -> dict[str, Float64[Tensor, "b"]]:
    """Return norms of what a block gives, by kind of token, and the patches whose norm is far above the
    others'.

    A patch is an outlier if its norm is above `factor` times the median of its image, and above median +
    `deviations` times 1.4826 times the median distance from the median (the standard deviation, were they
    normal). `fixed`: the fraction of patches above a norm that is the same for all images.
    """
    norms = torch.linalg.vector_norm(x.float(), dim=-1).double()
    patches = norms[:, at.special :]
    middle = patches.quantile(0.5, dim=1, keepdim=True)
    spread = 1.4826 * (patches - middle).abs().quantile(0.5, dim=1, keepdim=True)
    outlying = (patches > factor * middle) & (patches > middle + deviations * spread)
    none = torch.full_like(norms[:, 0], torch.nan)
    return {
        "class_norm": norms[:, 0] if at.class_token else none,
        "register_norm": norms[:, int(at.class_token) : at.special].mean(dim=1) if at.registers else none,
        "patch_norm": patches.mean(dim=1),
        "patch_norm_max": patches.amax(dim=1),
        "outliers": outlying.double().sum(dim=1),
        "outlier_share": outlying.double().mean(dim=1),
        "outlier_share_fixed": none if fixed is None else (patches > fixed).double().mean(dim=1),
    }
