"""Attentive probes, one learned query that reads the patches, in a grid (CAPI): protocol `attentive`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.init import trunc_normal_

from foveola.config import key
from foveola.evaluation.classification.abmilp import SMALL, check_heads
from foveola.evaluation.classification.cae import CaeGrid
from foveola.evaluation.classification.task import PUBLISHED_STEPS, Task, plan_training
from foveola.evaluation.classification.trained import TrainedConfig, TrainedProbe, probe_metrics, with_spread
from foveola.evaluation.classification.training import (
    AdamW,
    ProbeGrid,
    ProbePlan,
    add_gradients,
    closed_warm_cosine,
    warm_cosine,
)
from foveola.evaluation.features.need import Need, need, shape_of
from foveola.models.encoder import Encoder

SCORES_AT_ONCE = (
    2**26
)  # attention scores of all probes in memory at a time: 256 MiB, and as much for gradients

# -- core ----------------------------------------------------------------------------------------------------


class AttentiveGrid:
    """G attentive probes that differ in learning rate and weight decay (CAPI, Section 4; its Table 2).

    A probe: keys and values of the patches x by one linear map each, a learned query q cut into `heads`,
    softmax of q_h . k / sqrt(size of a head) over the patches, the weighted values side by side, a linear
    classifier. No norm, no residual, no output map. 2 d^2 + (3 + C) d parameters, and C of the classifier's
    bias.

    Computed folded: q_h . (W_k^h x) = (W_k^h^T q_h) . x, and the values' map after the average, so that
    patches meet G H vectors instead of 2 G d x d maps. The bias of the keys adds the same to all scores of a
    head: it changes nothing, gets no gradient and stays 0.
    """

    kind = "attentive"

    def __init__(
        self,
        rates: Float[Tensor, "G"],
        weight_decay: Float[Tensor, "G"],
        width: int,
        classes: int,
        *,
        heads: int,
        group: str = "attentive",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_heads(heads, width)
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            first = trunc_normal_(torch.empty(*shape), std=0.02, generator=generator).to(device)
            return first.repeat(len(rates), *[1] * len(shape))

        count = len(rates)
        self.heads, self.group = heads, group
        self.query, self.keys, self.values = drawn(width), drawn(width, width), drawn(width, width)
        self.head = drawn(classes, width)
        self.keys_bias, self.values_bias = (torch.zeros(count, width, device=device) for _ in range(2))
        self.bias = torch.zeros(count, classes, device=device)
        self.trained = [self.query, self.keys, self.values, self.head, self.values_bias, self.bias]
        # The query is decayed, biases are not.
        decayed = [True, True, True, True, False, False]
        self.optimizer = AdamW(self.trained, rates.to(device), weight_decay.to(device), decayed)
        self.settings: list[dict[str, Any]] = [
            {"lr": lr, "weight_decay": decay, "heads": heads}
            for lr, decay in zip(rates.tolist(), weight_decay.tolist(), strict=True)
        ]
        everything = [*self.trained, self.keys_bias]
        self.parameters_each = sum(p[0].numel() for p in everything)
        self.shape: dict[str, Any] = {"heads": heads}

    def step(self, x: Mapping[str, Tensor], y: Int64[Tensor, "b"], factor: float) -> None:
        """Take one step on each probe's mean cross-entropy, with gradients summed over parts of the batch."""
        total = [torch.zeros_like(p) for p in self.trained]
        with torch.enable_grad():
            for part, labels in zip(self._split(x["patches"]), self._split(y, x["patches"]), strict=True):
                leaves = [p.detach().requires_grad_() for p in self.trained]
                logits = self._scores(part, *leaves)
                add_gradients(total, logits, labels, len(y), leaves)
        self.optimizer.step(total, factor)

    @torch.no_grad()
    def logits(self, x: Mapping[str, Tensor]) -> Float[Tensor, "G b C"]:
        """Return the scores of each probe."""
        return torch.cat([self._scores(part, *self.trained) for part in self._split(x["patches"])], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and biases; that of the keys is 0."""
        names = ("query", "keys", "values", "head", "values_bias", "bias")
        return dict(zip(names, self.trained, strict=True))

    def _split(self, rows: Tensor, patches: Tensor | None = None) -> tuple[Tensor, ...]:
        count = (rows if patches is None else patches).shape[1]
        return rows.split(max(1, SCORES_AT_ONCE // (len(self.query) * self.heads * count)))

    def _scores(
        self,
        x: Float[Tensor, "b N D"],
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        head: Tensor,
        values_bias: Tensor,
        bias: Tensor,
    ) -> Float[Tensor, "G b C"]:
        g, width = query.shape
        h, size = self.heads, width // self.heads
        folded = torch.einsum("ghc,ghcd->ghd", query.view(g, h, size), keys.view(g, h, size, width))
        scores = (folded.flatten(0, 1) / size**0.5) @ x.transpose(1, 2)  # [b, g h, N]
        read = scores.softmax(dim=2) @ x  # [b, g h, D]
        maps = values.view(g * h, size, width)
        heads = torch.bmm(read.transpose(0, 1), maps.transpose(1, 2))  # [g h, b, size]
        pooled = heads.view(g, h, len(x), size).transpose(1, 2).flatten(2) + values_bias[:, None]
        return torch.baddbmm(bias[:, None], pooled, head.transpose(1, 2))


# -- protocol ------------------------------------------------------------------------------------------------


ATTENTIVE_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
STYLES: dict[str, dict[str, Any]] = {
    "capi": {
        "lr": ATTENTIVE_RATES,
        "weight_decay": (5e-4, 1e-3, 5e-2),
        "batch": 1024,
        "warmup": 0.1,
    },
    "cae": {"lr": (0.4,), "weight_decay": (0.0,), "batch": 8192, "epochs": 90, "warmup": 1 / 9},
}


@dataclass(frozen=True)
class AttentiveConfig(TrainedConfig):
    """Settings of `attentive`. What is null is as the style has it."""

    style: Literal["capi", "cae"] = key(
        "capi", "kind of probe: CAPI's, or CAE's (LayerNorms, an output map, SGD); sets what is null below"
    )
    heads: tuple[int | None, ...] = key(
        (None,), "attention heads to try, each reported; null = the width of the patches / 64"
    )
    lr: tuple[float, ...] | None = key(None, "learning rates to try, of a batch of 256", above=0)
    weight_decay: tuple[float, ...] | None = key(
        None, "style=capi: weight decays to try; CAE has none", at_least=0
    )
    batch: int | None = key(None, "images of a step, at most those there are", at_least=1)
    iterations: int | None = key(
        None, "steps of training, instead of epochs; capi: null = 12,500, at most 100 passes", at_least=1
    )
    epochs: int | None = key(None, "passes over the training images", at_least=1)
    warmup: float | None = key(
        None, "fraction of the training over which learning rates rise", at_least=0, at_most=1
    )
    norm_batch: int = key(2048, "style=cae: images whose statistics normalise them", at_least=2)

    def __post_init__(self) -> None:
        for name in ("heads", "lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and (not value or len(set(value)) < len(value)):
                raise ValueError(f"{name}: needs different values, got {list(value)}")
        if self.epochs is not None and self.iterations is not None:
            raise ValueError("epochs and iterations: give one of them")
        if self.style == "cae" and any(self.weight_decay or ()):
            raise ValueError("weight_decay: style=cae has none")

    def resolved(self, images: int) -> "AttentiveConfig":
        """Return the settings with the style's own in place of null, for so many images that train."""
        defaults = dict(STYLES[self.style])
        if self.style == "cae" and images < SMALL:
            defaults["batch"] = 1024  # as Selective Aggregation has it on its small sets
        if self.epochs is not None or self.iterations is not None:
            defaults = {name: v for name, v in defaults.items() if name not in ("epochs", "iterations")}
        return replace(self, **{name: v for name, v in defaults.items() if getattr(self, name) is None})


class Attentive(TrainedProbe):
    """Classifies what one learned query reads from the patches.

    Numbers in percent, of group `attentive` (`attentive_12` for heads=12), style=cae: `cae`: as of `linear`.
    The chosen probe is scored as it was trained, on the rows that were not held out.
    """

    name = "attentive"
    title = "attentive probe"
    help = "classification of what one learned query reads from the patches (CAPI, CAE)"
    Config = AttentiveConfig
    grids = (AttentiveGrid, CaeGrid)
    metrics = with_spread(probe_metrics(title))

    def wanted(self, config: AttentiveConfig, encoder: Encoder) -> Need:
        """Return all patches of each image; CAE's probe reads the class token, too."""
        token = config.style == "cae" and encoder.config.model.class_token
        return need("patches", *(["token"] if token else []))

    def candidates(self, config: AttentiveConfig, encoder: Encoder) -> int:
        """Return the number of pairs of a learning rate and a weight decay."""
        config = config.resolved(1)
        return len(config.lr or ()) * len(config.weight_decay or ())

    def plan(self, config: AttentiveConfig, encoder: Encoder, task: Task) -> ProbePlan:
        """Return a grid of each number of heads."""
        config = config.resolved(len(task.fit))
        batch, _, steps = plan_training(task, config, PUBLISHED_STEPS if config.style == "capi" else None)
        if config.style == "cae" and batch < STYLES["cae"]["batch"]:
            task.notes.append(f"cae: batches of {batch} images")
        width = shape_of(encoder, "patches", need("patches"))[-1]
        grids = [_grid(config, heads, width, batch, task) for heads in _distinct(config.heads, width, task)]
        schedule = warm_cosine if config.style == "cae" else closed_warm_cosine
        return ProbePlan(grids, schedule(steps, round((config.warmup or 0) * steps)), batch, steps)


def _distinct(heads: tuple[int | None, ...], width: int, task: Task) -> list[int | None]:
    """Each number of heads once: null may be one that is listed, too."""
    found: dict[int, int | None] = {}
    for each in heads:
        count = max(1, width // 64) if each is None else each
        if count in found:
            task.notes.append(f"heads: null is {count} here, measured once")
        else:
            found[count] = each
    return list(found.values())


def _grid(config: AttentiveConfig, heads: int | None, width: int, batch: int, task: Task) -> ProbeGrid:
    """The probes of one number of heads, with learning rates for a batch of this size."""
    rates, decays = config.lr or (), config.weight_decay or ()
    count = max(1, width // 64) if heads is None else heads
    check_heads(count, width)
    name = "attentive" if config.style == "capi" else "cae"
    group = name if heads is None else f"{name}_{heads}"
    if config.style == "cae":
        grid = CaeGrid(
            torch.tensor(rates) * (batch / 256), width, task.classes, heads=count,
            norm_batch=config.norm_batch, group=group, seed=config.seed, device=task.device,
        )  # fmt: skip
        grid.settings = [{"lr": lr, "heads": count} for lr in rates]
        return grid
    pairs = [(lr, decay) for decay in decays for lr in rates]
    grid = AttentiveGrid(
        torch.tensor([lr for lr, _ in pairs]) * (batch / 256),  # undocumented in the paper, in its code
        torch.tensor([decay for _, decay in pairs]),
        width, task.classes, heads=count, group=group, seed=config.seed, device=task.device,
    )  # fmt: skip
    grid.settings = [{"lr": lr, "weight_decay": decay, "heads": count} for lr, decay in pairs]
    return grid
