"""Optimizers for many probes at once, and the schedules that the papers train probes with.

Parameters are stacked: the first dimension counts the G probes of a grid, each with its own learning rate
(and weight decay). A step treats probe g exactly as a plain optimizer would treat it alone: nothing
is averaged over the grid.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

OptimizerName = Literal["sgd", "lars", "adamw"]
Factor = Callable[[int], float]


def add_gradients(
    total: Sequence[Tensor],
    logits: Float[Tensor, "G b C"],
    labels: Int64[Tensor, "b"],
    count: int,
    leaves: Sequence[Tensor],
) -> None:
    """Add what these of `count` images contribute to the gradient of each probe's mean cross-entropy.

    The loss is summed over probes: each has the gradient of its own.
    """
    every = labels.expand(len(logits), -1).flatten()
    loss = cross_entropy(logits.flatten(0, 1), every, reduction="sum") / count
    for sum_, gradient in zip(total, torch.autograd.grad(loss, leaves), strict=True):
        sum_ += gradient


class Stacked(ABC):
    """An optimizer of stacked parameters [G, ...], changed in place.

    Args:
        lr, weight_decay: of each probe, [G].
        Parameters with one dimension besides G (biases) get no weight decay from LARS and AdamW, and no trust
        ratio from LARS; `decayed` names others by flag (True: as a matrix).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: Float[Tensor, "G"],
        weight_decay: Float[Tensor, "G"] | None = None,
        decayed: Sequence[bool] | None = None,
        momentum: float = 0.9,
    ) -> None:
        self.parameters, self.momentum, self.steps = list(parameters), momentum, 0
        self.lr = lr
        self.decay = torch.zeros_like(lr) if weight_decay is None else weight_decay
        self.decayed = [p.ndim > 2 for p in parameters] if decayed is None else list(decayed)
        self.state = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Make one update with the learning rates times `factor`."""
        self.steps += 1
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            shape = (-1,) + (1,) * (p.ndim - 1)
            self._update(i, p, g, (self.lr * factor).view(shape), self.decay.view(shape))

    @abstractmethod
    def _update(self, i: int, p: Tensor, g: Tensor, lr: Tensor, decay: Tensor) -> None: ...


class Sgd(Stacked):
    """`torch.optim.SGD` with momentum: v = m v + g + wd p, p -= lr v."""

    def _update(self, i: int, p: Tensor, g: Tensor, lr: Tensor, decay: Tensor) -> None:
        if self.decay.any():
            g = g + decay * p
        self.state[i].mul_(self.momentum).add_(g)
        p.sub_(lr * self.state[i])


class Lars(Stacked):
    """LARS as MAE's linear probe has it: matrices' gradients times 0.001 |p| / |g|, then SGD with momentum.

    Norms are of each probe's own tensor. The ratio is 1 where a norm is 0.
    """

    trust = 0.001

    def _update(self, i: int, p: Tensor, g: Tensor, lr: Tensor, decay: Tensor) -> None:
        if self.decayed[i]:
            g = g + decay * p
            size, slope = (
                torch.linalg.vector_norm(x.flatten(1), dim=1).view(lr.shape[0], *lr.shape[1:]) for x in (p, g)
            )
            g = torch.where((size > 0) & (slope > 0), self.trust * size / slope, 1.0) * g
        self.state[i].mul_(self.momentum).add_(g)
        p.sub_(lr * self.state[i])


class AdamW(Stacked):
    """`torch.optim.AdamW` with betas (0.9, 0.95) (CAPI's probes)."""

    beta, eps = 0.95, 1e-8

    def __init__(self, parameters: Sequence[Tensor], lr: Tensor, *args: object, **kwargs: object) -> None:
        super().__init__(parameters, lr, *args, **kwargs)  # type: ignore[arg-type]
        self.squares = [torch.zeros_like(p) for p in parameters]

    def _update(self, i: int, p: Tensor, g: Tensor, lr: Tensor, decay: Tensor) -> None:
        if self.decayed[i]:
            p.mul_(1 - lr * decay)
        mean, square = self.state[i], self.squares[i]
        mean.lerp_(g, 1 - self.momentum)
        square.mul_(self.beta).addcmul_(g, g, value=1 - self.beta)
        scale = (square / (1 - self.beta**self.steps)).sqrt_().add_(self.eps)
        p.sub_(lr / (1 - self.momentum**self.steps) * (mean / scale))


OPTIMIZERS: dict[OptimizerName, type[Stacked]] = {"sgd": Sgd, "lars": Lars, "adamw": AdamW}


# -- schedules: what the learning rate is multiplied with at step i of `steps` -------------------------------


def cosine(steps: int) -> Factor:
    """Return a factor that goes from 1 at the first step to 0 one step after the last (DINOv2:
    CosineAnnealingLR with T_max = steps).
    """
    return lambda i: 0.5 * (1 + math.cos(math.pi * i / steps))


def cosine_by_epoch(steps: int, per_epoch: int) -> Factor:
    """Return the same in whole epochs: constant within each (DINO, iBOT)."""
    epochs = -(-steps // per_epoch)
    return lambda i: 0.5 * (1 + math.cos(math.pi * (i // per_epoch) / epochs))


def warm_cosine(steps: int, warmup: int) -> Factor:
    """Return a factor that goes from 0 in a line to 1 at step `warmup`, then a cosine to 0 one step after the
    last (MAE).
    """
    return lambda i: (
        i / warmup if i < warmup else 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(1, steps - warmup)))
    )


def closed_warm_cosine(steps: int, warmup: int) -> Factor:
    """Return a factor that is 0 at the first step, 1 at step `warmup` - 1 and at step `warmup`, 0 at
    the last step (CAPI).
    """

    def factor(i: int) -> float:
        if i < warmup:
            return i / max(1, warmup - 1)
        return 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(1, steps - warmup - 1)))

    return factor
