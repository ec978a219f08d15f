"""How probes are trained, a whole grid at once: on which batches, by which optimizer and schedule.

Parameters are stacked: the first dimension counts the G probes of a grid, each with its own learning rate
(and weight decay). A step treats probe g exactly as a plain optimizer would treat it alone: nothing
is averaged over the grid.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveola.evaluation.features.need import Need
from foveola.evaluation.features.store import Store
from foveola.evaluation.metrics import Judged
from foveola.progress import show

FeatureBatch = tuple[Mapping[str, Tensor], Int64[Tensor, "b"]]
PRELOAD = 2**31  # bytes of features up to which they are kept on the device; beyond, read batch by batch

# -- batches of stored features ------------------------------------------------------------------------------


class Order:
    """Which of `rows` rows are in the batch of a step: a function of (seed, step) alone.

    Each epoch has a permutation of its own. Rows that fill no batch sit the epoch out.
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rows, self.batch, self.seed = rows, min(batch, rows), seed
        self.steps = per_epoch(rows, self.batch)
        self.epoch, self.permutation = -1, np.zeros(0, np.int64)

    def __call__(self, step: int) -> tuple[int, Int64[np.ndarray, "b"]]:
        """Return the epoch of a step, and its rows in ascending order, in which they are read faster."""
        epoch, number = divmod(step, self.steps)
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return epoch, np.sort(self.permutation[number * self.batch : (number + 1) * self.batch])


def per_epoch(rows: int, batch: int) -> int:
    """Return whole batches of an epoch, at least one."""
    return max(1, rows // batch)


class Columns:
    """Features of rows of a store: held on the device if they fit (`PRELOAD`), else read batch by batch."""

    def __init__(
        self, store: Store, rows: Int64[Tensor, "r"], wanted: Need, device: torch.device, views: int = 0
    ) -> None:
        self.store, self.rows, self.wanted, self.device = store, rows, wanted, device
        self.kept: dict[tuple[str, int], Tensor] = {}
        every = range(1, 1 + views) if views else (0,)
        size = sum(
            4 * len(rows) * store.take(feature, slice(1), layers=wanted.layers)[0].numel()
            for feature in wanted.features
        )
        if size * len(every) <= PRELOAD:
            for feature in wanted.features:
                for view in every:
                    self.kept[feature, view] = store.take(feature, rows, view, wanted.layers).to(device)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: Int64[Tensor, "b"], view: int = 0) -> dict[str, Float[Tensor, "b ..."]]:
        """Return features of the rows with the indices `at`."""
        if self.kept:
            there = at.to(self.device)
            return {feature: self.kept[feature, view][there] for feature in self.wanted.features}
        rows = self.rows[at]
        return {
            feature: self.store.take(feature, rows, view, self.wanted.layers).to(self.device)
            for feature in self.wanted.features
        }


def batches(
    columns: Columns, labels: Int64[Tensor, "r"], batch: int, steps: int, seed: int, views: int
) -> Iterator[FeatureBatch]:
    """Yield batches of stored features, in an `Order`; with crops, those of the epoch in turn."""
    labels, order = labels.to(columns.device), Order(len(columns), batch, seed)
    for step in range(steps):
        epoch, rows = order(step)
        at = torch.from_numpy(rows)
        yield columns.take(at, 1 + epoch % views if views else 0), labels[at.to(labels.device)]


# -- optimizers ----------------------------------------------------------------------------------------------


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

    Parameters with one dimension besides G (biases) get no weight decay from LARS and AdamW, and no trust
    ratio from LARS, where `decayed` does not say otherwise.

    Args:
        lr, weight_decay: of each probe, [G].
        decayed: of each parameter, whether it is treated as a matrix; None: by its dimensions.
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


# -- grids of probes -----------------------------------------------------------------------------------------


@runtime_checkable
class ProbeGrid(Protocol):
    """G probes of one shape, trained at once on the same batches."""

    group: str  # what the choice is made within; metrics are given for each group
    settings: list[dict[str, Any]]  # of each probe
    parameters_each: int  # trained numbers of one probe
    kind: str  # of grid, and what it is made anew with besides rates, width and classes
    shape: dict[str, Any]

    def step(self, x: Mapping[str, Tensor], y: Int64[Tensor, "b"], factor: float) -> None:
        """Take one step of training, with learning rates times `factor`."""
        ...

    def logits(self, x: Mapping[str, Tensor]) -> Float[Tensor, "G b C"]:
        """Return the scores of each probe, as at test time."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return all that `logits` computes with, by name: [G, ...], or [1, ...] where all share it."""
        ...


@dataclass
class ProbePlan:
    """How grids are trained: all on the same batches, each exactly as if it were alone."""

    grids: Sequence[ProbeGrid]
    factor: Factor  # what learning rates are multiplied with at each step
    batch: int
    steps: int
    seconds: float = 0.0  # that their steps took so far


def train_plans(plans: Sequence[ProbePlan], drawn: Iterator[FeatureBatch], progress: bool) -> None:
    """Train the grids of all plans, which have the same number of steps, on the same batches."""
    for step, (x, y) in enumerate(show(drawn, plans[0].steps, "training probes", progress)):
        for plan in plans:
            began = perf_counter()
            for grid in plan.grids:
                grid.step(x, y, plan.factor(step))
            plan.seconds += perf_counter() - began


ProbeIndex = tuple[int, int]  # a grid, and a probe of it


@dataclass(frozen=True)
class ChosenProbes:
    """The probe of each group that was chosen, and what the hold-out says of all of them."""

    probes: dict[str, ProbeIndex]
    held: list[Judged] | None = None  # of each grid


def probes_of(grids: Sequence[ProbeGrid], group: str) -> list[ProbeIndex]:
    """Return the indices of all probes of a group, in order."""
    return [(i, g) for i, grid in enumerate(grids) if grid.group == group for g in range(len(grid.settings))]
