"""Features without labels: rank, spread, alignment, uniformity, nearest others. Pure functions."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from foveola.evaluation.metrics import unit_rows

EPSILON = 1e-7  # RankMe's, for float32 features
ROWS_AT_ONCE = 1024  # rows compared with all others at a time


class Moments:
    """Sums over rows of features that come in parts, in float64; memory is that of a D x D matrix."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "n D"]) -> None:
        """Add rows."""
        for part in rows.split(65536):
            x = part.double()
            self.count += len(x)
            self.sum += x.sum(dim=0)
            self.products += x.T @ x

    def plus(self, other: "Moments") -> "Moments":
        """Return the sums over the rows of both."""
        joined = Moments(len(self.sum))
        joined.count = self.count + other.count
        joined.sum, joined.products = self.sum + other.sum, self.products + other.products
        return joined

    def singular_values(self) -> Float64[Tensor, "r"]:
        """Return those of the matrix of all rows, not centred: r = min(n, D) of them, ascending."""
        values = torch.linalg.eigvalsh(self.products).clamp(min=0).sqrt()
        return values[-min(self.count, len(values)) :]

    def variances(self) -> Float64[Tensor, "D"]:
        """Return the variances along the principal components of the centred rows, ascending; what rounding
        leaves is zero.
        """
        mean = self.sum / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        values = torch.linalg.eigvalsh(covariance)
        return torch.where(values > 1e-12 * self.products.trace() / self.count, values, 0.0)


def moments(rows: Float[Tensor, "n D"]) -> Moments:
    """Return `Moments` of rows that are all there."""
    found = Moments(rows.shape[1])
    found.add(rows)
    return found


def rankme(singular: Float[Tensor, "*B r"], epsilon: float = EPSILON) -> Float64[Tensor, "*B"]:
    """Return RankMe (Garrido et al., 2023, eq. 1): exp(-sum p ln p), p = s / sum(s) + epsilon, of singular
    values s.

    Between 1 (all features on a line through 0) and r = min(n, D) (all directions alike), but for epsilon.
    0 where all singular values are 0.
    """
    s = singular.double()
    total = s.sum(dim=-1, keepdim=True)
    p = s / torch.where(total > 0, total, 1.0) + epsilon
    rank = (-(p * p.log()).sum(dim=-1)).exp()
    return torch.where(total[..., 0] > 0, rank, 0.0)


def rows_rankme(features: Float[Tensor, "*B n D"]) -> Float64[Tensor, "*B"]:
    """Return RankMe of the rows of each matrix, through the smaller of the two Gram matrices, in float64."""
    x = features.double()
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    return rankme(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt())


def first_fraction(variances: Float[Tensor, "D"]) -> float:
    """Return the fraction of the variance along the first principal component, in percent; 100 without any
    variance.
    """
    total = variances.sum()
    return 100.0 if total <= 0 else (100 * variances.amax() / total).item()


def spread(features: Float[Tensor, "n D"]) -> float:
    """Return the mean over dimensions of the standard deviation of unit rows, times sqrt(D).

    1 = in all directions alike; 0 = at one point.
    """
    x = unit_rows(features).double()
    return (x.std(dim=0, correction=0).mean() * x.shape[1] ** 0.5).item()


def alignments(first: Float[Tensor, "n D"], second: Float[Tensor, "n D"]) -> Float64[Tensor, "n"]:
    """Return the squared distance of the unit features of two views of each image (Wang and Isola,
    2020; alpha = 2).

    0 = the same; 2 = at right angles, as of unrelated images in all directions; at most 4. Their mean is
    the alignment.
    """
    return (unit_rows(first).double() - unit_rows(second).double()).square().sum(dim=1)


def uniformity(features: Float[Tensor, "n D"], t: float = 2.0) -> float:
    """Return ln of the mean over pairs of different rows of exp(-t d^2), d their distance as unit rows (eq.
    5).

    0 = all the same; -2t is what random directions in many dimensions come to. Raises ValueError for one row.
    """
    n = len(features)
    if n < 2:
        raise ValueError("uniformity is of pairs: it needs two rows")
    x = unit_rows(features).double()
    total = 0.0
    for start in range(0, n, ROWS_AT_ONCE):
        part = x[start : start + ROWS_AT_ONCE]
        distances = (2 - 2 * (part @ x.T)).clamp_(min=0)
        kernel = (-t * distances).exp_()
        kernel[torch.arange(len(part)), start + torch.arange(len(part))] = 0.0
        total += kernel.sum().item()
    return math.log(total / (n * (n - 1)))


def nearest_other(features: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
    """Return the cosine similarity of each row to the nearest of the others. Raises ValueError for one
    row.
    """
    if len(features) < 2:
        raise ValueError("nearest_other needs two rows")
    x = unit_rows(features)
    best = []
    for start in range(0, len(x), ROWS_AT_ONCE):
        similarities = x[start : start + ROWS_AT_ONCE] @ x.T
        here = torch.arange(len(similarities))
        similarities[here, start + here] = -torch.inf
        best.append(similarities.amax(dim=1))
    return torch.cat(best)


def mean_cosine(features: Float[Tensor, "n D"]) -> float:
    """Return the mean cosine similarity over pairs of different rows: |sum of unit rows|^2 without the n
    ones.
    """
    x = unit_rows(features).double()
    n = len(x)
    own = x.square().sum()
    return ((x.sum(dim=0).square().sum() - own) / (n * (n - 1))).item()
