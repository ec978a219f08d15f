"""Targets and losses of self-distillation, in float32 whatever the precision of the network.

Shapes: n rows, K prototypes, B images, T teacher views, S student views (the first T of which are the same
views).
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss, normalize, smooth_l1_loss

from foveola.cross_entropy import PrototypeWeights, TargetRows, cross_entropy
from foveola.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "*P n K"], temperature: float, iterations: int = 3
) -> Float[Tensor, "*P n K"]:
    """Return soft assignments in which all prototypes are used alike: Sinkhorn-Knopp on exp(logits /
    temperature).

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
        return (logits.float() - self.center).div_(temperature).softmax(dim=-1)

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
    targets: Float[Tensor, "B T K"] | TargetRows,
    predictions: Float[Tensor, "B S D"],
    temperature: float,
    prototypes: PrototypeWeights | None = None,
    image_weights: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over all pairs of a teacher view and another student view (DINO, Eq. 3).

    Naively: mean over pairs (t, s), s != t, and images of -sum_k targets[t] log softmax(logits[s] /
    temperature). The targets of a student view's partners are summed first, so the cost grows with views, not
    with pairs.

    Args:
        targets: distributions; as `Rows`, those of the T views of an image stand together.
        predictions: logits (D = K), or features whose logits with `prototypes` are meant.
        prototypes: (v, g), logit_k = g_k <v_k / |v_k|, prediction>. With them, no more than some rows of
            logits are in memory at a time.
        image_weights: what each image counts in the mean, 1 on average; None: all alike.
    """
    rows = targets.flatten(0, 1) if isinstance(targets, Tensor) else targets
    images, students = predictions.shape[:2]
    views = len(rows) // images
    if views * images != len(rows):
        raise ValueError(f"cross_view_loss: {len(rows)} targets for {images} images")
    own = min(views, students)
    pairs = views * students - own
    if not pairs:
        raise ValueError("cross_view_loss: a single view has no other one to predict")
    weights = predictions.new_full((images,), 1 / (pairs * images), dtype=torch.float32)
    if image_weights is not None:
        weights = weights * image_weights
    return cross_entropy(predictions, prototypes, rows, own, weights, temperature)


def masked_patch_loss(
    targets: Float[Tensor, "n K"] | TargetRows,
    predictions: Float[Tensor, "n D"],
    weights: Float[Tensor, "n"],
    temperature: float,
    prototypes: PrototypeWeights | None = None,
) -> Float[Tensor, ""]:
    """Return the weighted sum of cross-entropies of masked patches (iBOT, Eq. 2); zero for none, with zero
    gradient.

    `predictions` are logits, or features for `prototypes`, as in `cross_view_loss`.
    """
    if len(targets) != len(predictions):
        raise ValueError(f"masked_patch_loss: {len(targets)} targets for {len(predictions)} predictions")
    return cross_entropy(predictions[:, None], prototypes, targets, 0, weights, temperature)


def assignment_loss(
    targets: Float[Tensor, "n K"], predictions: Float[Tensor, "n K"], temperature: float
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of predictions / temperature against soft assignments (CAPI, loss 1)."""
    weights = predictions.new_full((len(targets),), 1 / max(len(targets), 1), dtype=torch.float32)
    return masked_patch_loss(targets, predictions, weights, temperature)


def mask_weights(masked: Bool[Tensor, "C N"], indices: Int64[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return the weight of each masked patch, given by its index in [C * N]: 1 / (masked patches of its view)
    / (views).

    Views without masked patches add nothing but stay in the mean, as in iBOT's code.
    """
    fraction = 1 / masked.sum(dim=1, keepdim=True).clamp(min=1) / masked.shape[0]
    return fraction[indices // masked.shape[1], 0].float()


@torch.no_grad()
def pixel_targets(pixels: Float[Tensor, "*n C"], normalised: bool = True, eps: float = 1e-6) -> Tensor:
    """Return what is to be reconstructed of patches with C numbers each: (x - mean) / sqrt(var + eps), in
    float32.

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
    """Return the mean squared (MAE) or absolute (SimMIM) error over patches and their pixels."""
    compare = mse_loss if kind == "squared" else l1_loss
    return compare(predictions.float(), targets)


def huber_loss(
    predictions: Float[Tensor, "*n D"], targets: Float[Tensor, "*n D"], beta: float = 1.0
) -> Float[Tensor, ""]:
    """Return the mean over all numbers of e^2 / (2 beta) for errors |e| < beta, else |e| - beta / 2 (I-JEPA:
    beta 1).
    """
    return smooth_l1_loss(predictions.float(), targets.float(), beta=beta)


def koleo_loss(features: Float[Tensor, "n D"], floor: float = 1e-6) -> Float[Tensor, ""]:
    """Return the Kozachenko-Leonenko estimator: -mean_i log distance(x_i, nearest other x_j), x unit vectors
    (DINOv2).

    Pushes each feature away from its nearest neighbour, both ways. Zero for fewer than two rows.

    Distances below `floor` count as `floor` and push nothing: equal rows have no direction to part in, and
    the gradient of a row is at most 1 / floor for each neighbour. It is just above float32's rounding of
    unit vectors, as with LayerScale the tokens of different images start 1e-5 apart. Neighbours are
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


def cosine_distance(mine: Float[Tensor, "*n D"], theirs: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
    """Return 1 - cos(x, y) of each row, in [0, 2], as half the squared distance of the unit vectors.

    Zero, and not only about zero, where both are the same.
    """
    with torch.autocast(mine.device.type, enabled=False):
        return 0.5 * (normalize(mine.float(), dim=-1) - normalize(theirs.float(), dim=-1)).square().sum(
            dim=-1
        )


def gram_loss(
    mine: Float[Tensor, "C N D"],
    theirs: Float[Tensor, "C N D"],
    counted: Bool[Tensor, "C N"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over C views and over pairs of patches of (cos(x_i, x_j) - cos(y_i, y_j))^2 (DINOv3).

    With X and Y the unit vectors of a view's patches this is ||X X^T - Y Y^T||_F^2 / N^2, averaged over
    views. Of a view with `counted` patches only their pairs count; a view without any is left out.
    """
    with torch.autocast(mine.device.type, enabled=False):
        x, y = (normalize(rows.float(), dim=-1) for rows in (mine, theirs))
        apart = (x @ x.mT - y @ y.mT).square()
        if counted is None:
            return apart.mean()
        pairs = (counted[:, :, None] & counted[:, None]).float()
        number = pairs.sum(dim=(1, 2))
        means = (apart * pairs).sum(dim=(1, 2)) / number.clamp(min=1)
        return means.sum() / (number > 0).sum().clamp(min=1)


def entropy(probabilities: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Return the Shannon entropy in nats of distributions along the last axis."""
    # Twice as fast on a CPU as torch.special.entr; what is clamped adds nothing.
    logs = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
    return -(logs * probabilities).sum(dim=-1)
