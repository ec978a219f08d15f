"""Targets and losses of self-distillation, in float32 whatever the precision of the network.

Shapes: n rows, K prototypes, B pictures, T teacher views, S student views (the first T of which are the same
views).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import l1_loss, linear, mse_loss, normalize, smooth_l1_loss

from foveola.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "*P n K"], temperature: float, iterations: int = 3
) -> Float[Tensor, "*P n K"]:
    """Soft assignments in which all prototypes are used alike: Sinkhorn-Knopp on exp(logits / temperature).

    Naively: A = exp(logits / temperature); repeat: divide each column of A by its sum over *all* rows of all
    ranks, then each row by its sum. Rows end as distributions; columns are equal only up to what the last row
    step undoes. Leading dimensions are problems of their own. A rank may have no rows.

    No logits / temperature overflows: what is exponentiated is at most 0 in each column, whose constants
    cancel in the first step, and then exactly 0 at the maximum of each row, whose constants are kept as the
    first row scale. Every sum that is divided by is then at least 1 / (n K) after one iteration; entries that
    underflow are below 1e-38 of their row. Only the scales of rows and columns iterate, and are multiplied in
    after every third iteration, before they can overflow: this is bound by memory traffic, not by exp().
    """
    log = logits.float() / temperature
    # A rank without rows still takes part in the reductions, with columns that weigh nothing.
    nothing = log.new_full((*log.shape[:-2], 1, log.shape[-1]), torch.finfo(log.dtype).min)
    log -= all_reduce_max(log.amax(dim=-2, keepdim=True) if log.shape[-2] else nothing)
    highest = log.amax(dim=-1, keepdim=True)
    matrix = log.sub_(highest).exp_()
    rows = highest.exp_()
    for done in range(1, iterations + 1):
        columns = all_reduce_sum(_product(rows.mT, matrix)).reciprocal()
        rows = _product(matrix, columns.mT).reciprocal()
        if done % 3 == 0 or done == iterations:
            matrix *= columns
            matrix /= matrix.sum(dim=-1, keepdim=True)
            rows = torch.ones_like(rows)
    return matrix


def _product(a: Float[Tensor, "*P n m"], b: Float[Tensor, "*P m K"]) -> Float[Tensor, "*P n K"]:
    """A matrix product in whole float32: neither autocast nor TF32 may round sums of probabilities."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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


@dataclass(frozen=True, eq=False)
class Clusters:
    """What `cluster` found; nothing here carries a gradient but the loss."""

    loss: Float[Tensor, ""]
    targets: Float[Tensor, "Q B K"]  # assignments of the wanted patches
    usage: Float[Tensor, "N K"]  # mean assignment at each position
    first: Bool[Tensor, "K"]  # prototypes that are the first choice of some patch


def cluster(
    patches: Float[Tensor, "N B D"],
    weight: Float[Tensor, "K D"],
    bias: Float[Tensor, "K"] | None,
    wanted: Int64[Tensor, "Q B"],
    *,
    temperature: float,
    student_temperature: float,
    iterations: int = 3,
    by_position: bool = True,
    past: Float[Tensor, "N M D"] | None = None,
    chunk: int | None = None,
) -> Clusters:
    """Assign patches to clusters in equal shares, and the loss that moves the centroids (CAPI, Section 3.1).

    Logits l = patches weight^T + bias; assignments a' = sinkhorn(l / temperature) over the B pictures of all
    ranks, at each of the N positions on its own, or over all of them (`by_position=False`, CAPI Table 1i);
    loss = mean over patches of the cross-entropy -sum_k a'_k log softmax(l / student_temperature)_k. Gradient
    goes to weight and bias only.

    Only assignments of the `wanted` patches are returned; logits and assignments of the others exist for some
    positions at a time, about `chunk` numbers (by default 16 MiB on a CPU, for its caches, and 256 MiB on a
    GPU), because the gradient is taken on the way. Not so with by_position=False, where all compete: those
    N * B * K numbers exist at once.

    Args:
        patches: unit vectors, without gradient, position first.
        wanted: positions whose assignments are returned, Q for each picture.
        past: patches of earlier pictures that take part in Sinkhorn-Knopp and in nothing else.
    """
    trained = torch.is_grad_enabled() and weight.requires_grad
    if chunk is None:
        chunk = 2**22 if patches.device.type == "cpu" else 2**26
    loss, *rest = _Cluster.apply(
        weight,
        bias,
        patches,
        wanted,
        past,
        (temperature, student_temperature, iterations, by_position, chunk, trained),
    )
    return Clusters(loss, *rest)


class _Cluster(torch.autograd.Function):
    """Takes the gradient in forward, chunk by chunk: d loss / d l = (softmax(l / t) - a') / t / (N B)."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        patches: Tensor,
        wanted: Tensor,
        past: Tensor | None,
        settings: tuple,
    ) -> tuple[Tensor, ...]:
        temperature, student_temperature, iterations, by_position, chunk, trained = settings
        positions, batch, _ = patches.shape
        count = weight.shape[0]
        rows = batch + (0 if past is None else past.shape[1])
        step = max(chunk // (rows * count), 1) if by_position else positions
        targets = patches.new_empty(wanted.numel(), count, dtype=torch.float32)
        usage = patches.new_empty(positions, count, dtype=torch.float32)
        first = torch.zeros(count, dtype=torch.bool, device=patches.device)
        loss = patches.new_zeros((), dtype=torch.float32)
        grad_weight = torch.zeros_like(weight) if trained else None
        grad_bias = torch.zeros_like(bias) if trained and bias is not None else None
        asked = wanted.flatten()  # [Q * B]
        picture = torch.arange(batch, device=wanted.device).repeat(wanted.shape[0])
        for start in range(0, positions, step):
            part = patches[start : start + step]
            everyone = part if past is None else torch.cat((part, past[start : start + step]), dim=1)
            logits = linear(everyone, weight, bias).float()
            if by_position:
                assigned = sinkhorn(logits, temperature, iterations)
            else:
                assigned = sinkhorn(logits.flatten(0, 1), temperature, iterations).view_as(logits)
            if past is not None:
                logits, assigned = logits[:, :batch], assigned[:, :batch]
            here = (asked >= start) & (asked < start + step)
            slots = torch.where(here, asked - start, 0)
            # Without asking the device how many there are: every slot is read, those elsewhere are kept.
            targets = torch.where(here[:, None], assigned[slots, picture], targets)
            usage[start : start + step] = assigned.mean(dim=1)
            first[assigned.argmax(dim=-1).flatten()] = True
            scores = (logits / student_temperature).log_softmax(dim=-1)
            loss -= torch.linalg.vecdot(assigned, scores).sum()
            if grad_weight is not None:
                slope = scores.exp_().sub_(assigned).flatten(0, 1)
                with torch.autocast(slope.device.type, enabled=False):
                    grad_weight.addmm_(slope.T, part.flatten(0, 1).to(slope.dtype))
                    if grad_bias is not None:
                        grad_bias += slope.sum(dim=0)
        scale = 1 / (positions * batch)
        if grad_weight is not None:
            grad_weight *= scale / student_temperature
        if grad_bias is not None:
            grad_bias *= scale / student_temperature
        ctx.gradients = grad_weight, grad_bias
        shaped = targets.view(*wanted.shape, count)
        outputs = (loss * scale, shaped, usage, first)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple:
        (weight, bias), slope = ctx.gradients, slopes[0]
        return (
            None if weight is None else weight * slope,
            None if bias is None else bias * slope,
            None,
            None,
            None,
            None,
        )


def assignment_loss(
    targets: Float[Tensor, "n K"], predictions: Float[Tensor, "n K"], temperature: float
) -> Float[Tensor, ""]:
    """Mean cross-entropy of predictions / temperature against soft assignments (CAPI, loss 1)."""
    logits = predictions.float() / temperature
    return (logits.logsumexp(dim=-1) - (targets * logits).sum(dim=-1)).mean()


def position_information(
    seen: Float[Tensor, "N K"], usage: Float[Tensor, "N K"], floor: float = 0.1
) -> Float[Tensor, ""]:
    """Nats by which a patch's position tells its assignment: 0 for none, at most ln N (positional collapse).

    The mean over the assignments `usage` of a batch of log p(k | position) / p(k), where p comes from `seen`,
    the mean assignments at each position in *earlier* batches. A lower bound of the mutual information: as it
    is estimated on other pictures than it is evaluated on, it does not mistake small samples for information.
    p(k | position) is mixed with a share `floor` of p(k), which bounds what is lost where it is badly known.
    """
    overall = seen.mean(dim=0, keepdim=True)
    ratio = (1 - floor) * seen / overall.clamp(min=torch.finfo(seen.dtype).tiny) + floor
    return (usage * ratio.log()).sum(dim=1).mean()


@torch.no_grad()
def pixel_targets(pixels: Float[Tensor, "*n C"], normalised: bool = True, eps: float = 1e-6) -> Tensor:
    """What is to be reconstructed of patches with C numbers each: (x - mean) / sqrt(var + eps), in float32.

    Mean and unbiased variance are each patch's own, over pixels and channels (MAE, Section 3, and its code).
    Not `normalised`: the pixels as they are (SimMIM).
    """
    pixels = pixels.float()
    if not normalised:
        return pixels
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) / (variance + eps).sqrt()


def pixel_loss(
    predictions: Float[Tensor, "*n C"],
    targets: Float[Tensor, "*n C"],
    kind: Literal["squared", "absolute"] = "squared",
) -> Float[Tensor, ""]:
    """Mean squared (MAE) or absolute (SimMIM) error over patches and their pixels."""
    compare = mse_loss if kind == "squared" else l1_loss
    return compare(predictions.float(), targets)


def huber_loss(
    predictions: Float[Tensor, "*n D"], targets: Float[Tensor, "*n D"], beta: float = 1.0
) -> Float[Tensor, ""]:
    """Mean over all numbers of e^2 / (2 beta) for errors |e| < beta, else |e| - beta / 2 (I-JEPA: beta 1)."""
    return smooth_l1_loss(predictions.float(), targets.float(), beta=beta)


def koleo_loss(features: Float[Tensor, "n D"], floor: float = 1e-6) -> Float[Tensor, ""]:
    """Kozachenko-Leonenko estimator: -mean_i log distance(x_i, nearest other x_j), x unit vectors (DINOv2).

    Pushes each feature away from its nearest neighbour, both ways. Zero for fewer than two rows.

    Distances below `floor` count as `floor` and push nothing: equal rows have no direction to part in, and
    the gradient of a row is at most 1 / floor for each neighbour. It is just above float32's rounding of
    unit vectors, as with LayerScale the tokens of different pictures start 1e-5 apart. Neighbours are
    therefore found by differences: dot products cannot tell distances below 3e-4.
    """
    if features.shape[0] < 2:
        return features.sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        x = normalize(features.float(), dim=1, eps=1e-8)
        with torch.no_grad():
            apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = apart.fill_diagonal_(torch.inf).argmin(dim=1)
        squares = ((x - x[nearest]) ** 2).sum(dim=1)
        return -0.5 * torch.log(squares.clamp(min=floor**2)).mean()


def entropy(probabilities: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Shannon entropy in nats of distributions along the last axis."""
    return torch.special.entr(probabilities).sum(dim=-1)
