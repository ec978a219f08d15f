"""Cross-entropy with many prototypes: no more than some rows of logits are in memory at a time.

n rows of features, K prototypes of width D. A prototype is a direction v_k and a length g_k, as in weight
normalisation: logit_k = g_k <v_k / |v_k|, h>. Neither the normalised prototypes nor all n * K logits are ever
made; the gradient is taken in the forward pass, while a part of the logits is there.
"""

import threading
from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

_ROOMS = threading.local()

PrototypeWeights = tuple[Float[Tensor, "K D"], Float[Tensor, "K 1"]]  # v and g


@runtime_checkable
class TargetRows(Protocol):
    """Targets of n rows, float32: a tensor [n, K], or what makes them when a loss asks, for each row once.

    What is made stands until anything else is asked for, and is not written to.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def rows_in_cache(device: torch.device, prototypes: int) -> int:
    """Return how many rows of logits to take at a time where one elementwise operation follows another."""
    return max((2**18 if device.type == "cpu" else 2**26) // prototypes, 1)


def room_for(
    use: Literal["logits", "targets"], rows: int, prototypes: int, device: torch.device
) -> Float32[Tensor, "rows K"]:
    """Return memory for a block of rows of logits or targets; the next block of this thread uses it again.

    On a CPU it is kept from step to step, since fresh memory costs as much as the work on it, and there is a
    gap after each row: rows a power of two apart would share a few sets of the caches, which slows matrix
    products by a fifth.
    """
    if device.type != "cpu":
        return torch.empty(rows, prototypes, device=device)
    apart = prototypes + 64
    kept: Tensor | None = getattr(_ROOMS, use, None)
    if kept is None or len(kept) < rows * apart:
        with torch.inference_mode(False):  # else training could not write to it
            kept = torch.empty(rows * apart, dtype=torch.float32, device=device)
        setattr(_ROOMS, use, kept)
    return kept[: rows * apart].view(rows, apart)[:, :prototypes]


def multiply(
    features: Float[Tensor, "b D"], v: Float[Tensor, "K D"], out: Float32[Tensor, "b K"]
) -> Float32[Tensor, "b K"]:
    """Return features v^T, written to `out`; rounded as autocast would."""
    dtype = precision(features)
    with torch.autocast(features.device.type, enabled=False):
        if dtype == torch.float32:
            return torch.mm(features.float(), v.T, out=out)
        return out.copy_(features.to(dtype) @ v.to(dtype).T)


def precision(features: Tensor) -> torch.dtype:
    """Return the dtype in which products with features are taken."""
    kind = features.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype


def scales_of(prototypes: PrototypeWeights) -> Float32[Tensor, "K"]:
    """Return g_k / |v_k|, by which a product with v_k becomes a logit."""
    v, g = prototypes
    return (g.detach()[:, 0] / torch.linalg.vector_norm(v.detach(), dim=1)).float()


def first_choice(rows: Float[Tensor, "n K"]) -> Int64[Tensor, "n"]:
    """Return the index of the largest entry of each row."""
    block = 256
    if rows.device.type != "cpu" or rows.shape[1] % block:
        return rows.argmax(dim=1)
    # On a CPU the largest number is found eight times as fast as its index: first in which block it is.
    blocks = rows.unflatten(1, (-1, block))
    best = blocks.amax(dim=2).argmax(dim=1)
    return best * block + blocks[torch.arange(len(rows)), best].argmax(dim=1)


def cross_entropy(
    predictions: Float[Tensor, "B S D"],
    prototypes: PrototypeWeights | None,
    targets: TargetRows,
    own: int,
    weights: Float[Tensor, "B"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the sum over b and s of weights[b] * -sum_k target_k log softmax(logits[b, s] / temperature)_k,
    in float32.

    Args:
        predictions: features, or the logits themselves where there are no `prototypes`.
        targets: those of the T = n / B teacher views of each b stand together. The target of s is their sum,
            without teacher view s for s < `own`.
    """
    v, g = (None, None) if prototypes is None else prototypes
    trained = torch.is_grad_enabled()
    loss = _CrossEntropy.apply(predictions, v, g, targets, own, weights, temperature, trained)
    assert isinstance(loss, Tensor)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """A row costs mass * logsumexp(l) - <target, l>, with l = logits / temperature.

    Its gradient is (mass * softmax(l) - target) / temperature. With 65,536 prototypes this is bound by
    memory. Products with prototypes take as many rows at a time as keep matrix units busy, the elementwise
    rest as many as fit the caches of a CPU; both write where the rows before them were, as fresh memory
    costs a CPU more than the arithmetic on it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        predictions: Tensor,
        v: Tensor | None,
        g: Tensor | None,
        targets: TargetRows,
        own: int,
        weights: Tensor,
        temperature: float,
        trained: bool,
    ) -> Tensor:
        images, students, width = predictions.shape
        count, device = width if v is None else len(v), predictions.device
        teachers = len(targets) // max(images, 1)
        few = many = rows_in_cache(device, count)
        if v is not None and device.type == "cpu":
            many *= 128  # products want more rows than fit the caches
        many = max(many // students, 1)
        # Gradients before the scaling of losses are too small for half precision; bfloat16 has the range.
        half = precision(predictions)
        exact = torch.float32 if half == torch.float16 else half
        rounded, factor = v, torch.full((), 1 / temperature, device=device)
        if v is not None and g is not None:
            rounded, factor = v.to(half), scales_of((v, g)) / temperature
        needs = [trained and needed for needed in ctx.needs_input_grad[:3]]
        own_type = torch.float32 if predictions.dtype == torch.float16 else predictions.dtype
        kept = own_type if v is None else torch.float32
        of_predictions = torch.empty_like(predictions, dtype=kept) if needs[0] else None
        of_v: Tensor | None = None
        loss = predictions.new_zeros((), dtype=torch.float32)
        room = room_for("logits", min(many, images) * students, count, device).unflatten(0, (-1, students))
        scratch = loss.new_empty(2, min(few, len(room)), count)
        for rows in _slices(images, many):
            seen = predictions[rows].flatten(0, 1)
            logits = room[: rows.stop - rows.start]
            if rounded is None:
                logits.copy_(predictions[rows])
            else:
                multiply(seen, rounded, logits.flatten(0, 1))
            goals = targets[rows.start * teachers : rows.stop * teachers].unflatten(0, (-1, teachers))
            for part in _slices(len(logits), few):
                goal, weight = goals[part], weights[rows][part]
                everyone = goal[:, 0] if teachers == 1 else goal.sum(dim=1)
                for view in range(students):
                    mass, target = teachers, everyone
                    if view < own:
                        mass, target = teachers - 1, everyone - goal[:, view]
                    loss += _to_slopes(logits[part, view], target, mass, weight, factor, scratch)
            if v is None or rounded is None:
                if of_predictions is not None:
                    of_predictions[rows] = logits
                continue
            with torch.autocast(device.type, enabled=False):
                slopes, directions = logits.flatten(0, 1).to(exact), rounded if half == exact else v
                if of_predictions is not None:
                    of_predictions[rows] = (slopes @ directions).unflatten(0, (-1, students))
                if needs[1] or needs[2]:
                    of_v = _add_product(of_v, slopes.T, seen.to(exact))
        of_g = None
        if v is not None and g is not None and (needs[1] or needs[2]):
            of_v = torch.zeros_like(v, dtype=torch.float32) if of_v is None else of_v  # no rows
            of_g = _norm_backward(of_v, v, g)
        # Kept this way they are freed by the backward pass, so that they become the gradients, not copies.
        ctx.save_for_backward(of_predictions, of_v, of_g)
        ctx.dtype = predictions.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.saved_tensors
        # Most often nothing scales the loss; on a GPU to ask would mean to wait.
        if slope.device.type != "cpu" or slope.item() != 1:
            gradients = [None if gradient is None else gradient * slope for gradient in gradients]
        of_predictions, of_v, of_g = gradients
        if of_predictions is not None:
            of_predictions = of_predictions.to(ctx.dtype)
        return of_predictions, of_v, of_g, None, None, None, None, None


def _to_slopes(
    logits: Float32[Tensor, "b K"],
    target: Float[Tensor, "b K"],
    mass: int,
    weight: Float[Tensor, "b"],
    factor: Float32[Tensor, "*K"],
    scratch: Float32[Tensor, "2 few K"],
) -> Float32[Tensor, ""]:
    """Weighted loss of some rows whose targets sum to `mass`, l = logits * factor.

    Its gradient with respect to the logits takes their place.
    """
    scaled, fraction = scratch[:, : len(logits)]
    torch.mul(logits, factor, out=scaled)
    torch.softmax(scaled, dim=-1, out=fraction)
    # The largest probability is at least 1 / K, so that its logarithm is exact enough.
    normaliser = scaled.amax(dim=-1) - fraction.amax(dim=-1).log()
    loss = ((normaliser * mass - scaled.mul_(target).sum(dim=-1)) * weight).sum()
    slope = torch.sub(fraction if mass == 1 else fraction.mul_(mass), target, out=fraction)
    torch.mul(slope.mul_(weight[:, None]), factor, out=logits)
    return loss


def _norm_backward(
    gradient: Float32[Tensor, "K D"], v: Float[Tensor, "K D"], g: Float[Tensor, "K 1"]
) -> Float32[Tensor, "K 1"]:
    """Turn d loss / d (v_k in products) * g_k / |v_k| into the gradient of v, in place; return that of g.

    With u = v / |v|: dv = d - u <u, d>, as only what is across v turns it; dg = <v, d> / g. At g = 0, where d
    no longer tells, that of g is given as 0.
    """
    of_g = torch.empty_like(g, dtype=torch.float32)
    size = 1024 if v.device.type == "cpu" else len(v)  # for its caches
    for rows in _slices(len(v), size):
        along = (v[rows] * gradient[rows]).sum(dim=1, keepdim=True)
        of_g[rows] = torch.where(g[rows] == 0, 0.0, along / g[rows])
        squares = torch.linalg.vector_norm(v[rows], dim=1, keepdim=True) ** 2
        gradient[rows].addcmul_(v[rows], along / squares, value=-1)
    return of_g


def _add_product(
    total: Float32[Tensor, "n m"] | None, a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]
) -> Float32[Tensor, "n m"]:
    """total + a b, in place."""
    if total is None:
        return (a @ b).float()
    return torch.addmm(total, a, b, out=total) if a.dtype == torch.float32 else total.add_(a @ b)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
