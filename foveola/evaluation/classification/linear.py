"""Linear probes on frozen features, a grid of them trained at once (`LinearGrid`): protocol `linear`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.init import trunc_normal_

from foveola.config import UserError, key
from foveola.evaluation.classification.task import PUBLISHED_STEPS, Task, plan_training
from foveola.evaluation.classification.trained import TrainedConfig, TrainedProbe, probe_metrics, with_spread
from foveola.evaluation.classification.training import (
    OPTIMIZERS,
    Factor,
    OptimizerName,
    ProbePlan,
    cosine,
    cosine_by_epoch,
    warm_cosine,
)
from foveola.evaluation.features.need import EXTERNAL, Need, need, shape_of
from foveola.models.encoder import Encoder

# -- core ----------------------------------------------------------------------------------------------------


class BatchNorm:
    """BatchNorm without affine parameters of G probes' features [G, b, D], or of shared ones [1, b, D].

    Training normalises by the batch, with the population's variance; `running` statistics, for test time,
    are exponential averages with the sample variance (torch's rule, momentum 0.1).
    """

    def __init__(self, probes: int, width: int, device: torch.device, eps: float = 1e-6) -> None:
        self.mean = torch.zeros(probes, 1, width, device=device)
        self.variance = torch.ones(probes, 1, width, device=device)
        self.eps = eps

    def train(self, x: Float[Tensor, "G b D"]) -> Float[Tensor, "G b D"]:
        """Normalise rows by their own statistics, which go into the running ones. A single row becomes 0."""
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        with torch.no_grad():
            rows = x.shape[1]
            self.mean.lerp_(mean.detach(), 0.1)
            self.variance.lerp_(variance.detach() * (rows / max(1, rows - 1)), 0.1)
        return (x - mean) * (variance + self.eps).rsqrt()

    def test(self, x: Float[Tensor, "G b D"]) -> Float[Tensor, "G b D"]:
        """Normalise rows by the running statistics."""
        return (x - self.mean) * (self.variance + self.eps).rsqrt()


def norm_tensors(norm: BatchNorm | None) -> dict[str, Tensor]:
    """Return the running statistics by name; none without BatchNorm."""
    return {} if norm is None else {"norm_mean": norm.mean, "norm_variance": norm.variance}


class LinearGrid:
    """G linear classifiers of one feature, which differ in their learning rate, trained at once.

    Each goes the way it would go alone: losses are not averaged over the grid, and all start from the same
    weights, drawn by `seed`.

    Args:
        features: `token`, `token4` (class tokens of the last 4 blocks side by side), `average`, another
            feature, or several joined by `+`.
        rates: learning rates as they are used (after any rule for the batch size).
        norm: put BatchNorm without parameters first, with statistics of `norm_batch` rows at a time.
    """

    kind = "linear"

    def __init__(
        self,
        features: str,
        rates: Float[Tensor, "G"],
        width: int,
        classes: int,
        *,
        group: str = "linear",
        optimizer: OptimizerName = "sgd",
        norm: bool = False,
        norm_batch: int = 2048,
        momentum: float = 0.9,
        truncated: bool = False,
        masks: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        first = torch.empty(classes, width)
        if truncated:
            trunc_normal_(first, std=0.01, generator=generator)
        else:
            first.normal_(std=0.01, generator=generator)
        self.features, self.group, self.masks = features, group, masks
        self.weight = first.to(device).repeat(len(rates), 1, 1)
        self.bias = torch.zeros(len(rates), classes, device=device)
        self.norm = BatchNorm(1, width, device) if norm else None
        self.norm_batch = norm_batch
        self.optimizer = OPTIMIZERS[optimizer]([self.weight, self.bias], rates.to(device), momentum=momentum)
        self.settings: list[dict[str, Any]] = [{"features": features, "lr": rate} for rate in rates.tolist()]
        self.parameters_each = classes * (width + 1)
        self.shape: dict[str, Any] = {"features": features, "norm": norm, "masks": masks}

    @torch.no_grad()
    def step(self, x: Mapping[str, Tensor], y: Int64[Tensor, "b"], factor: float) -> None:
        """Take one step on the mean cross-entropy of each probe."""
        rows, count = joined_features(x, self.features, self.masks), len(y)
        dw, db = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        size = self.norm_batch if self.norm is not None else count
        for part, labels in zip(rows.split(size), y.split(size), strict=True):
            inputs = part[None] if self.norm is None else self.norm.train(part[None])
            residual = self._scores(inputs).softmax(dim=2)
            residual[:, torch.arange(len(labels)), labels] -= 1
            dw.baddbmm_(residual.transpose(1, 2), inputs.expand(len(dw), -1, -1), alpha=1 / count)
            db.add_(residual.sum(dim=1), alpha=1 / count)
        self.optimizer.step([dw, db], factor)

    def logits(self, x: Mapping[str, Tensor]) -> Float[Tensor, "G b C"]:
        """Return the scores of each probe, as at test time."""
        rows = joined_features(x, self.features, self.masks)[None]
        return self._scores(rows if self.norm is None else self.norm.test(rows))

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, and the statistics of BatchNorm."""
        return {"weight": self.weight, "bias": self.bias} | norm_tensors(self.norm)

    def _scores(self, inputs: Float[Tensor, "1 b D"]) -> Float[Tensor, "G b C"]:
        g, classes, width = self.weight.shape  # one product: the rows are the same for all probes
        flat = inputs[0] @ self.weight.view(g * classes, width).T
        return flat.view(-1, g, classes).transpose(0, 1) + self.bias[:, None]


def split_features(features: str) -> list[tuple[str, int]]:
    """Parse `token4+average` -> [(token, 4), (average, 1)]. Raises UserError for a feature that does not
    exist.
    """
    if features.startswith(EXTERNAL):
        return [(features, 1)]
    parts = []
    for word in features.split("+"):
        match = re.fullmatch(r"token([1-9]\d*)", word)
        feature, layers = ("token", int(match[1])) if match else (word, 1)
        if feature in ("patches", "masked"):
            raise UserError(
                f"features {word!r}: a linear probe reads one vector; masks=true gives object tokens"
            )
        need(feature)
        parts.append((feature, layers))
    return parts


def need_of(features: tuple[str, ...], masks: bool) -> Need:
    """Return what of an image the features are made of."""
    parts = [part for each in features for part in split_features(each)]
    names = {"masked" if masks and feature == "token" else feature for feature, _ in parts}
    return need(*names, layers=max(layers for _, layers in parts))


def joined_width(encoder: Encoder, features: str) -> int:
    """Return the width of the vector that `joined_features` makes for an encoder."""
    return sum(
        layers * shape_of(encoder, feature, need(feature))[-1] for feature, layers in split_features(features)
    )


def joined_features(x: Mapping[str, Tensor], features: str, masks: bool = False) -> Float[Tensor, "b D"]:
    """Return one vector of each image from its features."""
    columns = []
    for feature, layers in split_features(features):
        part = x["masked" if masks and feature == "token" else feature]
        columns.append(part[:, -layers:].flatten(1) if feature == "token" else part)
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


# -- protocol ------------------------------------------------------------------------------------------------

LINEAR_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True)
class LinearConfig(TrainedConfig):
    """Settings of `linear`. What is null is as the style has it."""

    style: Literal["dino", "dinov2", "mae"] = key(
        "dinov2", "settings of a published linear probe: sets what is null below"
    )
    features: tuple[str, ...] | None = key(
        None, "features to try: token, token4 (last 4 blocks), average, token+average, attention, ..."
    )
    lr: tuple[float, ...] | None = key(None, "learning rates to try, of a batch of 256", above=0)
    batch: int | None = key(None, "images of a step, at most those there are", at_least=1)
    epochs: int | None = key(None, "passes over the training images", at_least=1)
    iterations: int | None = key(
        None,
        "steps of training, instead of epochs; dinov2: null = 12,500, at most 100 passes",
        at_least=1,
    )
    masks: bool = key(
        False,
        "object tokens, which read only their object, in place of class tokens; discover, detect or segment: "
        "of the object that this finds in each image (docs/evaluation/encoding.md)",
    )
    norm_batch: int = key(2048, "style=mae: images whose statistics normalise them", at_least=2)

    def __post_init__(self) -> None:
        if self.epochs is not None and self.iterations is not None:
            raise ValueError("epochs and iterations: give one of them")
        for name in ("features", "lr"):
            value = getattr(self, name)
            if value is not None and (not value or len(set(value)) < len(value)):
                raise ValueError(f"{name}: needs different values, got {list(value)}")

    def resolved(self, encoder: Encoder) -> "LinearConfig":
        """Return the settings with the style's own in place of null, for this encoder."""
        layers = min(4, encoder.config.model.shape[1])
        several = tuple(dict.fromkeys(("token", f"token{layers}", "token+average", f"token{layers}+average")))
        if not encoder.config.model.class_token:
            several = ("average",)
        styles: dict[str, dict[str, Any]] = {
            "dino": {"features": several, "lr": (*LINEAR_RATES, 0.2, 0.5), "batch": 1024, "epochs": 100},
            "dinov2": {"features": several, "lr": LINEAR_RATES, "batch": 1024},
            "mae": {"features": several[:1], "lr": (0.1,), "batch": 16384, "epochs": 90},
        }
        defaults = styles[self.style]
        if self.epochs is not None or self.iterations is not None:
            defaults = {name: v for name, v in defaults.items() if name not in ("epochs", "iterations")}
        return replace(self, **{name: v for name, v in defaults.items() if getattr(self, name) is None})


class Linear(TrainedProbe):
    """Trains a grid of linear probes on the features of `train`, and chooses one on the hold-out.

    Numbers in percent, of group `linear` (style=mae: of each feature): `top1_*` of the probe that the
    hold-out chose, `_low` and `_high` (95 % interval over images), `top5_*`, `holdout_*`, and
    `top1_*_best_on_test`, the best of the grid, which many papers report.
    """

    name = "linear"
    title = "linear probe"
    help = "linear classification: a grid of learning rates and features at once (DINO, DINOv2, MAE)"
    Config = LinearConfig
    grids = (LinearGrid,)
    metrics = with_spread(probe_metrics(title))

    def wanted(self, config: LinearConfig, encoder: Encoder) -> Need:
        """Return vectors of each image."""
        chosen = config.resolved(encoder)
        # DINO and iBOT evaluate bicubic images, but train on torchvision's default crops, which are bilinear.
        crops = "bilinear" if config.style == "dino" else None
        return replace(need_of(chosen.features or (), chosen.masks), crops=crops)

    def candidates(self, config: LinearConfig, encoder: Encoder) -> int:
        """Return the number of rates, and of features where there is one choice among all of them."""
        config = config.resolved(encoder)
        return len(config.lr or ()) * (1 if config.style == "mae" else len(config.features or ()))

    def plan(self, config: LinearConfig, encoder: Encoder, task: Task) -> ProbePlan:
        """Return a grid for each feature."""
        config = config.resolved(encoder)
        features, rates = config.features or (), config.lr or ()
        mae = config.style == "mae"  # which reports each feature by itself
        batch, each, steps = plan_training(
            task, config, PUBLISHED_STEPS if config.style == "dinov2" else None
        )
        if mae:
            task.notes.append(
                f"style=mae: BatchNorm over {min(batch, config.norm_batch)} images (MAE: 512), measured "
                "after the last epoch (MAE: the best)"
            )
        if batch < (config.batch or 1):
            task.notes.append(
                f"train: {batch} images are one batch, less than the {config.batch} of the setting"
            )
        grids = [
            LinearGrid(
                each_feature,
                torch.tensor(rates) * (batch / 256),
                joined_width(encoder, each_feature),
                task.classes,
                group=each_feature if mae else "linear",
                optimizer="lars" if mae else "sgd",
                norm=mae,
                norm_batch=config.norm_batch,
                truncated=mae,
                masks=config.masks,
                seed=config.seed,
                device=task.device,
            )
            for each_feature in features
        ]
        for grid in grids:
            grid.settings = [{"features": grid.features, "lr": rate} for rate in rates]
        factors: dict[str, Factor] = {
            "dino": cosine_by_epoch(steps, each),
            "dinov2": cosine(steps),
            "mae": warm_cosine(steps, min(10 * each, steps // 2)),
        }
        return ProbePlan(grids, factors[config.style], batch, steps)
