"""Targets and losses of self-distillation, in float32 whatever the precision of the network.

Shapes: n rows, K prototypes, B pictures, T teacher views, S student views (the first T of which are the same
views).
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from foveola.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "n K"], temperature: float, iterations: int = 3) -> Float[Tensor, "n K"]:
    """Soft assignments in which all prototypes are used alike: Sinkhorn-Knopp on exp(logits / temperature).

    Naively: A = exp(logits / temperature); repeat: divide each column of A by its sum over *all* rows of all
    ranks, then each row by its sum. Rows end as distributions; columns are equal only up to what the last row
    step undoes. Here in the log domain: no logits / temperature overflows. A rank may have no rows.
    """
    log = logits.float() / temperature
    # Without rows a rank still takes part in the reductions, with columns that weigh nothing.
    lowest = log.new_full((log.shape[1],), torch.finfo(log.dtype).min)
    for _ in range(iterations):
        highest = all_reduce_max(torch.cat((log, lowest[None])).amax(dim=0))
        log = log - (all_reduce_sum((log - highest).exp().sum(dim=0)).log() + highest)
        log = log.log_softmax(dim=1)
    return log.exp()


class Centering(nn.Module):
    """Softmax of logits minus their running mean: sharp targets that favour no prototype (DINO, Section 3.1).

    `update` only collects; `step`, called once after each optimiser step, moves the centre. So the targets of
    a step use the centre of the steps before it, and accumulated gradients count as one step.
    """

    center: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("total", torch.zeros(prototypes), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "n K"], temperature: float) -> Float[Tensor, "n K"]:
        return ((logits.float() - self.center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, mean: Float[Tensor, "K"], rows: int) -> None:
        """Count `rows` logits whose mean is `mean`."""
        self.total += mean.float() * rows
        self.count += rows

    @torch.no_grad()
    def step(self) -> None:
        total, count = all_reduce_sum(self.total), all_reduce_sum(self.count)
        moved = torch.lerp(total / count.clamp(min=1), self.center, self.momentum)
        # A step that overflowed was skipped; what it left here must not spoil the centre.
        self.center.copy_(torch.where((count > 0) & moved.isfinite().all(), moved, self.center))
        self.total.zero_()
        self.count.zero_()


def cross_view_loss(
    targets: Float[Tensor, "B T K"], predictions: Float[Tensor, "B S K"], temperature: float
) -> Float[Tensor, ""]:
    """Mean cross-entropy over all pairs of a teacher view and another student view (DINO, Eq. 3).

    Naively: mean over pairs (t, s), s != t, and pictures of -sum_k targets[t] log softmax(predictions[s] /
    temperature). The targets of a student view's partners are summed first, so the cost grows with views, not
    with pairs.
    """
    views, students = targets.shape[1], predictions.shape[1]
    logits = predictions.float() / temperature
    everyone = targets.sum(dim=1, keepdim=True)
    partners = torch.full((students,), float(views), device=logits.device)
    partners[:views] -= 1
    pairs = views * students - min(views, students)
    # A target sums to one, so a pair costs logsumexp(logits) - <target, logits>.
    with torch.autocast(logits.device.type, enabled=False):  # which would take einsum to half precision
        agreement = torch.einsum("bsk,bk->s", logits, everyone[:, 0]).sum()
    agreement = agreement - (logits[:, :views] * targets[:, :students]).sum()
    normaliser = (logits.logsumexp(dim=-1) * partners).sum()
    return (normaliser - agreement) / (pairs * targets.shape[0])


def masked_patch_loss(
    targets: Float[Tensor, "n K"],
    predictions: Float[Tensor, "n K"],
    weights: Float[Tensor, "n"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Weighted sum of cross-entropies of masked patches (iBOT, Eq. 2); zero for none, with zero gradient."""
    logits = predictions.float() / temperature
    return ((logits.logsumexp(dim=-1) - (targets * logits).sum(dim=-1)) * weights).sum()


def mask_weights(masked: Bool[Tensor, "C N"], indices: Int64[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Weight of each masked patch, given by its index in [C * N]: 1 / (masked patches of its view) / (views).

    Views without masked patches add nothing but stay in the mean, as in iBOT's code.
    """
    share = 1 / masked.sum(dim=1, keepdim=True).clamp(min=1) / masked.shape[0]
    return share[indices // masked.shape[1], 0].float()


def koleo_loss(features: Float[Tensor, "n D"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """Kozachenko-Leonenko estimator: -mean_i log distance(x_i, nearest other x_j), x unit vectors (DINOv2).

    Pushes each feature away from its nearest neighbour. Zero for fewer than two rows; finite for equal rows.
    """
    if features.shape[0] < 2:
        return features.sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        x = normalize(features.float(), dim=1, eps=eps)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
        distance = ((x - x[nearest] + eps) ** 2).sum(dim=1).sqrt()
        return -torch.log(distance + eps).mean()


def entropy(probabilities: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Shannon entropy in nats of distributions along the last axis."""
    return torch.special.entr(probabilities).sum(dim=-1)
