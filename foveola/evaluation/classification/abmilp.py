"""Selective Aggregation: patches averaged with learned scores (AbMILP) or fixed ones; protocol `abmilp`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import gelu, relu
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint

from foveola.config import UserError, key
from foveola.evaluation.classification.linear import (
    BatchNorm,
    LinearGrid,
    joined_width,
    need_of,
    norm_tensors,
)
from foveola.evaluation.classification.saved import SavedProbe
from foveola.evaluation.classification.task import Exam, Task, plan_training
from foveola.evaluation.classification.trained import TrainedConfig, TrainedProbe, probe_metrics, with_spread
from foveola.evaluation.classification.training import (
    OPTIMIZERS,
    ChosenProbes,
    Columns,
    OptimizerName,
    ProbeGrid,
    ProbePlan,
    add_gradients,
    warm_cosine,
)
from foveola.evaluation.features.need import ATTENTION, EXTERNAL, Need, need, shape_of
from foveola.evaluation.protocol import Metric, Outcome
from foveola.models.encoder import Encoder, gives_attention

Activation = Literal["relu", "gelu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "tanh": torch.tanh}
SMALL = 50_000  # images: LARS, made for batches of 16384, hardly moves on fewer
HIDDEN_AT_ONCE = 2**27  # numbers of all probes' hidden layers in memory at a time: 512 MiB

# -- core ----------------------------------------------------------------------------------------------------


def check_heads(heads: int, width: int) -> None:
    """Raise UserError, with heads that would do, unless they divide the width."""
    if width % heads:
        right = [n for n in range(1, width + 1) if width % n == 0]
        below, above = max(n for n in right if n < heads), min([n for n in right if n > heads], default=width)
        raise UserError(
            f"heads={heads} do not divide the width of the patches, {width}; {below} or {above} do"
        )


class AbmilpGrid:
    """G AbMILP probes that differ in their learning rate (Selective Aggregation, Section 4 and appendix).

    A probe: a score of each patch by an MLP of `depth` linear maps (the last one to one number), softmax over
    the patches, their average with these weights, BatchNorm without parameters, a linear classifier.
    With `heads` H the last map gives H numbers, and so H score maps: the first d / H channels are averaged
    with the first, and so on, so that the classifier stays as it is.
    With `attention` a self-attention layer precedes all of it, x + gamma softmax(q k^T / sqrt(d)) v with
    gamma from 0 (Rymarczyk et al., 2021). (depth - 1) (d^2 + d) + H (d + 1) parameters before the classifier,
    and 3 (d^2 + d) + 1 more with `attention`.

    LARS scales the gradients of matrices, to which the scores' last map belongs as [H, d]. Raises UserError
    where H does not divide d.
    """

    kind = "abmilp"

    def __init__(
        self,
        rates: Float[Tensor, "G"],
        width: int,
        classes: int,
        *,
        depth: int = 1,
        heads: int = 1,
        activation: Activation = "relu",
        attention: bool = False,
        optimizer: OptimizerName = "lars",
        norm_batch: int = 2048,
        momentum: float = 0.9,
        group: str = "abmilp",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_heads(heads, width)
        generator = torch.Generator().manual_seed(seed)
        count, device = len(rates), torch.device(device)

        def linear(rows: int, spread: float | None = None) -> list[Tensor]:
            """A map and its bias; torch's uniform start, or a truncated normal and 0."""
            weight, bias = torch.empty(rows, width), torch.zeros(rows)
            if spread is None:
                limit = width**-0.5
                weight.uniform_(-limit, limit, generator=generator)
                bias.uniform_(-limit, limit, generator=generator)
            else:
                trunc_normal_(weight, std=spread, generator=generator)
            return [p.to(device).repeat(count, *[1] * p.ndim) for p in (weight, bias)]

        self.group, self.norm_batch, self.activation = group, norm_batch, ACTIVATIONS[activation]
        self.depth, self.heads, self.attention = depth, heads, attention
        self.trained = [p for layer in range(depth) for p in linear(width if layer < depth - 1 else heads)]
        self.trained += linear(classes, 0.01)
        if attention:
            self.trained += [p for _ in range(3) for p in linear(width)] + [
                torch.zeros(count, 1, device=device)
            ]
        self.norm = BatchNorm(count, width, device)
        self.optimizer = OPTIMIZERS[optimizer](self.trained, rates.to(device), momentum=momentum)
        about: dict[str, Any] = {"depth": depth, "activation": activation, "attention": attention}
        about |= {"heads": heads} if heads > 1 else {}
        self.shape = dict(about)
        self.settings: list[dict[str, Any]] = [{"lr": rate, **about} for rate in rates.tolist()]
        self.parameters_each = sum(p[0].numel() for p in self.trained)

    def weights(self, x: Float[Tensor, "b N D"]) -> Float[Tensor, "G b N"]:
        """Return how much of each patch goes into the average, a mean over heads; rows sum to one."""
        return self.maps(x).mean(dim=2)

    def maps(self, x: Float[Tensor, "b N D"]) -> Float[Tensor, "G b H N"]:
        """Return how much of each patch goes into the average of each head's channels."""
        return self._pool(x, self.trained)[0]

    def step(self, x: Mapping[str, Tensor], y: Int64[Tensor, "b"], factor: float) -> None:
        """Take one step on each probe's mean cross-entropy, in parts of `norm_batch` images."""
        total = [torch.zeros_like(p) for p in self.trained]
        parts = zip(x["patches"].split(self.norm_batch), y.split(self.norm_batch), strict=True)
        with torch.enable_grad():
            for patches, labels in parts:
                leaves = [p.detach().requires_grad_() for p in self.trained]
                # Hidden layers of all parts at once would be large: they are computed again for the gradient.
                pooled = torch.cat(
                    [
                        checkpoint(self._pool, block, leaves, use_reentrant=False)[1]
                        for block in self._split(patches)
                    ],
                    dim=1,
                )
                logits = self._classify(self.norm.train(pooled), leaves)
                add_gradients(total, logits, labels, len(y), leaves)
        self.optimizer.step(total, factor)

    @torch.no_grad()
    def logits(self, x: Mapping[str, Tensor]) -> Float[Tensor, "G b C"]:
        """Return the scores of each probe, as at test time."""
        pooled = torch.cat([self._pool(block, self.trained)[1] for block in self._split(x["patches"])], dim=1)
        return self._classify(self.norm.test(pooled), self.trained)

    def tensors(self) -> dict[str, Tensor]:
        """Return all trained numbers in their order, and the statistics of BatchNorm."""
        return {f"trained_{i}": p for i, p in enumerate(self.trained)} | norm_tensors(self.norm)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        patches, width = x.shape[1:]
        each = len(self.trained[0]) * patches * (max(patches, width) if self.attention else width)
        return x.split(max(1, HIDDEN_AT_ONCE // each))

    def _pool(self, x: Float[Tensor, "b N D"], p: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Weights [G, b, H, N] and averages [G, b, D]."""
        probes = len(p[0])
        tokens = x.flatten(0, 1).expand(probes, -1, -1)  # [G, b N, D]
        if self.attention:
            tokens = self._attend(x, p)
        hidden = tokens
        for layer in range(self.depth):
            weight, bias = p[2 * layer], p[2 * layer + 1]
            if layer:
                hidden = self.activation(hidden)
            hidden = torch.baddbmm(bias[:, None], hidden, weight.transpose(1, 2))
        weights = hidden.view(probes, *x.shape[:2], self.heads).transpose(2, 3).softmax(dim=3)
        if not self.attention:  # the patches are the same for all probes: no copy of them for each
            values = x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [b, H, N, D / H]
            return weights, (weights.permute(1, 2, 0, 3) @ values).permute(2, 0, 1, 3).flatten(2)
        values = tokens.view(probes, *x.shape[:2], self.heads, -1)
        return weights, torch.einsum("gbhn,gbnhc->gbhc", weights, values).flatten(2)

    def _attend(self, x: Float[Tensor, "b N D"], p: list[Tensor]) -> Float[Tensor, "G bN D"]:
        at = 2 * self.depth + 2
        flat = x.flatten(0, 1).expand(len(p[0]), -1, -1)
        q, k, v = (
            torch.baddbmm(p[i + 1][:, None], flat, p[i].transpose(1, 2)).view(-1, *x.shape)
            for i in range(at, at + 6, 2)
        )
        read = (q @ k.transpose(2, 3) / x.shape[2] ** 0.5).softmax(dim=3) @ v
        return flat + p[-1][:, None] * read.flatten(1, 2)

    def _classify(self, pooled: Float[Tensor, "G b D"], p: list[Tensor]) -> Float[Tensor, "G b C"]:
        weight, bias = p[2 * self.depth], p[2 * self.depth + 1]
        return torch.baddbmm(bias[:, None], pooled, weight.transpose(1, 2))


# -- protocol ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AbmilpConfig(TrainedConfig):
    """Settings of `abmilp`. Defaults: Selective Aggregation's on large sets."""

    depth: tuple[int, ...] = key(
        (1,), "linear maps of the scores to try, each reported", at_least=1, at_most=8
    )
    heads: tuple[int, ...] = key(
        (1,),
        "numbers of score maps to try, each map on an equal part of the channels; each is reported",
        at_least=1,
    )
    activation: tuple[Activation, ...] = key(
        ("relu",), "activations between the layers: relu, gelu, tanh; each is reported"
    )
    attention: bool = key(False, "a trained self-attention layer first; with sgd, lars diverges in the paper")
    fixed: tuple[str, ...] = key(
        ("token", "average", "attention", "lowest_entropy", "centre"),
        "other vectors of an image beside it, with the same classifier; also predictor, external:MODEL",
    )
    attention_of: str | None = key(
        None, "another encoder, whose class token's attention averages the patches"
    )
    optimizer: Literal["lars", "sgd"] | None = key(
        None, "null = sgd with attention=true or fewer than 50,000 images that train, else lars"
    )
    lr: tuple[float, ...] = key((0.1,), "learning rates to try, of a batch of 256", above=0)
    batch: int | None = key(
        None, "images of a step; null = 16384, and 1024 of fewer than 50,000 images", at_least=1
    )
    epochs: int = key(90, "passes over the training images; the paper has 50 for ViT-L and H", at_least=1)
    warmup: int = key(10, "epochs over which learning rates rise", at_least=0)
    norm_batch: int = key(2048, "images whose statistics normalise them", at_least=2)

    def __post_init__(self) -> None:
        for name in ("depth", "heads", "activation", "lr"):
            value = getattr(self, name)
            if not value or len(set(value)) < len(value):
                raise ValueError(f"{name}: needs different values, got {list(value)}")

    def sized(self, images: int) -> "AbmilpConfig":
        """Return the settings with what depends on the number of images that train: the paper has SGD on its
        small sets.
        """
        small = images < SMALL
        optimizer = self.optimizer or ("sgd" if small or self.attention else "lars")
        return replace(self, optimizer=optimizer, batch=self.batch or (1024 if small else 16384))

    def vectors(self, encoder: Encoder) -> tuple[str, ...]:
        """Return the fixed aggregations that this encoder has, and that of `attention_of`."""
        without = () if encoder.config.model.class_token else ("token", *ATTENTION[:2])
        if not gives_attention(encoder.backbone):
            without = (*without, *ATTENTION)
        mine = [name for name in self.fixed if name not in without]
        return (*mine, *([EXTERNAL + self.attention_of] if self.attention_of else []))


class Abmilp(TrainedProbe):
    """Classifies the patches' average by learned scores and, on the same batches, by fixed ones.

    Numbers in percent, of a group for each: `abmilp` (`abmilp_2_gelu` of other depths, `abmilp_heads4` of
    other heads), `token`, `average`, ...: as of `linear`. `entropy_abmilp` is the mean entropy of its weights
    over the test images and heads, in nats: exp of it is the number of patches that an image's vector is made
    of.
    """

    name = "abmilp"
    help = "linear classification of patches averaged by learned or fixed scores (Selective Aggregation)"
    Config = AbmilpConfig
    grids = (AbmilpGrid, LinearGrid)
    metrics = with_spread((*probe_metrics("abmilp"), Metric("entropy_*", "abmilp: entropy {}", unit="nats")))

    def wanted(self, config: AbmilpConfig, encoder: Encoder) -> Need:
        """Return all patches of each image, and the fixed averages."""
        vectors = config.vectors(encoder)
        return need("patches") | need_of(vectors, masks=False) if vectors else need("patches")

    def candidates(self, config: AbmilpConfig, encoder: Encoder) -> int:
        """Return the number of learning rates."""
        return len(config.lr)

    def plan(self, config: AbmilpConfig, encoder: Encoder, task: Task) -> ProbePlan:
        """Return AbMILP's grids, and one of the same classifier on each fixed average of the patches."""
        config = config.sized(len(task.fit))
        batch, each, steps = plan_training(task, config)
        if config.attention:
            task.notes.append(
                "attention=true: a layer with residual and biases, without output map (Rymarczyk et al.); "
                "the code of Selective Aggregation has it the other way round"
            )
        task.notes.append(f"{config.optimizer} with batches of {batch} images")
        grids = _grids(encoder, config, batch, task)
        return ProbePlan(grids, warm_cosine(steps, min(config.warmup * each, steps // 2)), batch, steps)

    def score(
        self, grids: Sequence[ProbeGrid], choice: ChosenProbes, exam: Exam, wanted: Need, seed: int
    ) -> Outcome:
        """Return the numbers of the grid, and the entropies of the chosen probes' weights."""
        outcome, entropies = super().score(grids, choice, exam, wanted, seed), {}
        columns = exam.columns(need("patches"))
        for group, (i, g) in choice.probes.items():
            if isinstance(grid := grids[i], AbmilpGrid):
                entropies[f"entropy_{group}"] = _entropy(grid, g, columns)
        return replace(outcome, metrics=outcome.metrics | entropies)


def _grids(encoder: Encoder, config: AbmilpConfig, batch: int, task: Task) -> list[ProbeGrid]:
    rates = torch.tensor(config.lr) * (batch / 256)
    mlps: list[tuple[int, Activation]] = [
        (d, a) for d in config.depth for a in (config.activation if d > 1 else config.activation[:1])
    ]
    grids: list[ProbeGrid] = []
    for (depth, activation), heads in product(mlps, config.heads):
        group = "abmilp" if len(mlps) == 1 else f"abmilp_{depth}" + (f"_{activation}" if depth > 1 else "")
        grid = AbmilpGrid(
            rates,
            shape_of(encoder, "patches", need("patches"))[-1],
            task.classes,
            depth=depth,
            heads=heads,
            activation=activation,
            attention=config.attention,
            optimizer=config.optimizer or "lars",
            norm_batch=config.norm_batch,
            group=group if len(config.heads) == 1 else f"{group}_heads{heads}",
            seed=config.seed,
            device=task.device,
        )
        grid.settings = [{**about, "lr": lr} for about, lr in zip(grid.settings, config.lr, strict=True)]
        grids.append(grid)
    for vector in config.vectors(encoder):
        grid = LinearGrid(
            vector,
            rates,
            joined_width(encoder, vector),
            task.classes,
            group="external" if vector.startswith(EXTERNAL) else vector,
            optimizer=config.optimizer or "lars",
            norm=True,
            norm_batch=config.norm_batch,
            truncated=True,
            seed=config.seed,
            device=task.device,
        )
        grid.settings = [{"features": vector, "lr": lr} for lr in config.lr]
        grids.append(grid)
    return grids


def load_weights(path: str, encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """Return how much an AbMILP probe that was trained on `encoder` takes of each patch: [b, N, D] -> [b, N].

    `path` is the file that an evaluation by `abmilp` wrote; of several depths the first counts. Raises
    UserError where it does not fit, and for a probe of an earlier block.
    """
    saved = SavedProbe.load(path)
    saved.fits(encoder, Abmilp.name, path)
    if encoder.block_index(saved.about["settings"].get("block", -1)) != len(encoder.backbone.blocks) - 1:
        raise UserError(f"probe={path} reads an earlier block; train one on the last")
    grids, _ = saved.grids(Abmilp.grids, encoder.device)
    grid = next(grid for grid in grids if isinstance(grid, AbmilpGrid))
    return lambda patches: grid.weights(patches.to(encoder.device))[0]


@torch.no_grad()
def _entropy(grid: AbmilpGrid, probe: int, columns: Columns) -> float:
    """Mean over images and heads of the entropy of the weights, in nats."""
    total = 0.0
    for at in torch.arange(len(columns)).split(256):
        weights = grid.maps(columns.take(at)["patches"])[probe]
        total += torch.special.entr(weights.double()).sum().item() / grid.heads
    return total / len(columns)
