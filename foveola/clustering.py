"""Online clustering of patches, into clusters of equal size that say little of positions (CAPI)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import linear

from foveola.losses import sinkhorn


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
    """Assign patches to clusters of equal size, and the loss that moves the centroids (CAPI, Section 3.1).

    Logits l = patches weight^T + bias; assignments a' = sinkhorn(l / temperature) over the B images of all
    ranks, at each of the N positions on its own, or over all of them (`by_position=False`, CAPI Table 1i);
    loss = mean over patches of the cross-entropy -sum_k a'_k log softmax(l / student_temperature)_k. Gradient
    goes to weight and bias only.

    Only assignments of the `wanted` patches are returned; logits and assignments of the others exist for some
    positions at a time, about `chunk` numbers (by default 16 MiB on a CPU, for its caches, and 256 MiB on a
    GPU), because the gradient is taken on the way. Not so with by_position=False, where all compete: those
    N * B * K numbers exist at once.

    Args:
        patches: unit vectors, without gradient, position first.
        wanted: positions whose assignments are returned, Q for each image.
        past: patches of earlier images that take part in Sinkhorn-Knopp and in nothing else.
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
        image = torch.arange(batch, device=wanted.device).repeat(wanted.shape[0])
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
            targets = torch.where(here[:, None], assigned[slots, image], targets)
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


def position_information(
    seen: Float[Tensor, "N K"], usage: Float[Tensor, "N K"], floor: float = 0.1
) -> Float[Tensor, ""]:
    """Return nats by which a patch's position tells its assignment: 0 for none, at most ln N (positional
    collapse).

    The mean over the assignments `usage` of a batch of log p(k | position) / p(k), where p comes from `seen`,
    the mean assignments at each position in *earlier* batches. A lower bound of the mutual information: as it
    is estimated on other images than it is evaluated on, it does not mistake small samples for information.
    p(k | position) is mixed with a fraction `floor` of p(k), which bounds the loss where that is badly known.
    """
    overall = seen.mean(dim=0, keepdim=True)
    ratio = (1 - floor) * seen / overall.clamp(min=torch.finfo(seen.dtype).tiny) + floor
    return (usage * ratio.log()).sum(dim=1).mean()
