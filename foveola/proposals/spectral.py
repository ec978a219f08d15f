"""The second eigenvector of the normalised cut, of many small dense graphs (Shi and Malik, 2000)."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

EXACT = 128  # patches up to which all eigenvectors are computed: as quick, and nothing can converge slowly
RESIDUAL = 1e-8  # of a unit vector z: |M z - mu z|
CHECK = 8  # steps of Lanczos between two looks at the residual
LANCZOS_STEPS = 256  # after which a graph gets all its eigenvectors instead
SAME_SIZE = 1e-6  # of entries that count as equal
BREAKDOWN = 1e-12  # a Krylov space that grows by less than this is whole


class Eigen(NamedTuple):
    """The second smallest eigenvalue of each of B graphs, in [0, 2], and its vector y, with y^T D y = 1.

    The largest entry of y by absolute value is positive, the first of equals. Where nothing tells the nodes
    apart (all weights are the same, or there is one node) the value is 1 and the vector zero.
    """

    values: Float64[Tensor, "B"]
    vectors: Float64[Tensor, "B N"]


def second_eigenvectors(weights: Float[Tensor, "B N N"], exact: int = EXACT) -> Eigen:
    """Return the second smallest solution of (D - W) y = lambda D y, D being the row sums of W.

    With z = D^1/2 y that is the second largest eigenvector of M = D^-1/2 W D^-1/2, whose largest is
    D^1/2 1. Up to `exact` nodes all eigenvectors are computed (LAPACK, cuSOLVER), above by Lanczos in the
    complement of the first one, from the same start for all, with full orthogonalisation, until
    |M z - mu z| <= 1e-8; a graph that does not converge in 256 steps gets all its eigenvectors, too. The
    angle to the true vector is then about 1e-8 / gap, the distance to the next eigenvalue. All in float64; a
    graph's result does not depend on the others. `weights` must be symmetric, with positive sums of rows.
    """
    if weights.device.type == "cpu" and len(weights) > 1:  # one at a time stays in the cache
        each = [second_eigenvectors(one[None], exact) for one in weights]
        return Eigen(torch.cat([one.values for one in each]), torch.cat([one.vectors for one in each]))
    w = weights.double()
    scale = w.sum(dim=2).rsqrt()
    matrix = scale[:, :, None] * w * scale[:, None]
    first = 1 / scale
    first = first / torch.linalg.vector_norm(first, dim=1, keepdim=True)
    if w.shape[1] <= exact:
        mu, z = _all_at_once(matrix, first)
    else:
        mu, z, converged = _lanczos(matrix, first)
        if not converged.all():
            mu[~converged], z[~converged] = _all_at_once(matrix[~converged], first[~converged])
    y = scale * z
    size = y.abs()
    equals = size >= (1 - SAME_SIZE) * size.amax(dim=1, keepdim=True)
    largest = y.gather(1, equals.int().argmax(dim=1, keepdim=True))  # the first of them
    least, most = w.flatten(1).aminmax(dim=1)
    y = torch.where((least == most)[:, None], 0, y * torch.where(largest < 0, -1.0, 1.0))
    return Eigen(torch.where(least == most, 1.0, 1 - mu), y)


def _all_at_once(
    matrix: Float64[Tensor, "B N N"], first: Float64[Tensor, "B N"]
) -> tuple[Float64[Tensor, "B"], Float64[Tensor, "B N"]]:
    """The largest eigenvector but the known one, whose eigenvalue 1 becomes -1, where it is the last."""
    values, vectors = torch.linalg.eigh(matrix - 2 * first[:, :, None] * first[:, None])
    return values[:, -1], vectors[:, :, -1]


def _lanczos(
    matrix: Float64[Tensor, "B N N"], first: Float64[Tensor, "B N"]
) -> tuple[Float64[Tensor, "B"], Float64[Tensor, "B N"], Tensor]:
    """The largest eigenvector orthogonal to `first`, and whether it converged [B].

    Each graph keeps what it had when it converged, so the others do not change it.
    """
    batch, count, _ = matrix.shape
    steps = min(LANCZOS_STEPS, count - 2)
    basis = matrix.new_zeros(batch, steps + 2, count)
    basis[:, 0] = first
    start = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis[:, 1] = _unit(_orthogonal(start.to(matrix.device).expand(batch, -1), basis[:, :1]))[0]
    diagonal, beside = matrix.new_zeros(batch, steps), matrix.new_zeros(batch, steps)
    mu, z = matrix.new_zeros(batch), torch.zeros_like(first)
    converged = torch.zeros(batch, dtype=torch.bool, device=matrix.device)
    for k in range(steps):
        grown = _times(matrix, basis[:, k + 1])
        diagonal[:, k] = (grown * basis[:, k + 1]).sum(dim=1)
        basis[:, k + 2], beside[:, k] = _unit(_orthogonal(grown, basis[:, : k + 2]))
        if (k + 1) % CHECK and k + 1 < steps and bool((beside[:, k] > 0).all()):
            continue
        small = torch.diag_embed(diagonal[:, : k + 1])
        small += torch.diag_embed(beside[:, :k], 1) + torch.diag_embed(beside[:, :k], -1)
        values, vectors = torch.linalg.eigh(small)
        now = ~converged & (beside[:, k] * vectors[:, -1, -1].abs() <= RESIDUAL)
        if now.any():
            mu[now] = values[now, -1]
            z[now] = _times(basis[now, 1 : k + 2].mT, vectors[now, :, -1])
            converged |= now
            if converged.all():
                break
    return mu, z, converged


def _times(matrix: Float64[Tensor, "B n m"], vector: Float64[Tensor, "B m"]) -> Float64[Tensor, "B n"]:
    if len(matrix) == 1:  # a product of matrices would take three times as long for one column
        return torch.mv(matrix[0], vector[0])[None]
    return (matrix @ vector[:, :, None])[:, :, 0]


def _orthogonal(vector: Float64[Tensor, "B N"], basis: Float64[Tensor, "B k N"]) -> Float64[Tensor, "B N"]:
    """What no vector of the basis explains; twice, as the first time leaves what rounding cancels."""
    for _ in range(2):
        vector = vector - _times(basis.mT, _times(basis, vector))
    return vector


def _unit(vector: Float64[Tensor, "B N"]) -> tuple[Float64[Tensor, "B N"], Float64[Tensor, "B"]]:
    """A vector of length 1 and what its length was; zero and zero where nothing was left."""
    length = torch.linalg.vector_norm(vector, dim=1)
    length = torch.where(length > BREAKDOWN, length, 0.0)
    return torch.where(length[:, None] > 0, vector / length[:, None], 0.0), length
