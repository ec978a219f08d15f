"""Multinomial logistic regression by L-BFGS (`fit`), a path over C: protocol `logistic`.

The objective is scikit-learn's and cuML's, C sum_i CE_i + |W|^2 / 2 with a free intercept, divided by C n:
its size then depends neither on C nor on the number of rows, and one tolerance serves every C.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foveola.config import key
from foveola.evaluation.classification.linear import joined_features, need_of
from foveola.evaluation.classification.task import ProbeConfig, Task, open_task
from foveola.evaluation.classification.trained import notes_of_choice, probe_metrics, probe_needs, scored
from foveola.evaluation.features.need import Need
from foveola.evaluation.metrics import GroundTruth, Judged, judged, percent
from foveola.evaluation.protocol import At, Needs, Outcome, Protocol
from foveola.models.encoder import Encoder
from foveola.progress import show

LOGITS_AT_ONCE = 2**24  # logits in memory at a time: 128 MiB in float64
STALLED = 20  # iterations that must together lower the loss, by more than this fraction of it:
FLAT_SLOPE = 1e-10
SCALE = (
    1e4  # of the objective inside L-BFGS: torch forgets curvatures below an absolute 1e-10, near the end all
)

# -- core ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LogisticModel:
    """A fitted classifier. A class that has no row of training gets the bias -inf and is never predicted."""

    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, "C"]
    loss: float  # the objective at the end
    gradient: float  # the largest entry of its gradient there, in absolute value
    iterations: int

    def logits(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n C"]:
        """Return scores in the precision and on the device of the model."""
        parts = [part.to(self.weight) @ self.weight.T + self.bias for part in x.split(_rows(self.weight))]
        return torch.cat(parts) if parts else self.bias.new_zeros(0, len(self.bias))

    def predict(self, x: Float[Tensor, "n D"]) -> Int64[Tensor, "n"]:
        """Return the class of highest score of each row, on the CPU."""
        parts = [self.logits(part).argmax(dim=1).cpu() for part in x.split(_rows(self.weight))]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def fit(
    x: Float[Tensor, "n D"],
    y: Int64[Tensor, "n"],
    classes: int,
    c: float,
    *,
    start: LogisticModel | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-12,
    history: int = 20,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> LogisticModel:
    """Minimise mean_i CE(W x_i + b, y_i) + |W|^2 / (2 C n) over W and b by L-BFGS with strong Wolfe steps.

    Equal to scikit-learn's `LogisticRegression(C=c)` in its minimum. Logits exist for a chunk of rows only.

    Args:
        y: labels in [0, classes). c: inverse strength of the penalty, > 0.
        start: a model to go on from, such as that of the next smaller c.
        tolerance: stop when no entry of the gradient is larger in absolute value.
    Raises ValueError for no row, labels out of range, features that are not finite, and c of 0 or less.
    """
    if not len(x) or c <= 0:
        raise ValueError(f"logistic regression of {len(x)} rows with C={c}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"labels from {int(y.min())} to {int(y.max())} for {classes} classes")
    if not all(bool(part.isfinite().all()) for part in x.split(65536)):
        raise ValueError("features that are not finite")
    x, present = x.to(device), torch.unique(y)
    number = torch.full((classes,), -1, dtype=torch.int64)
    number[present] = torch.arange(len(present))
    y = number[y].to(device)
    weight, bias = _begin(start, present, x.shape[1], x.device, dtype)
    iterations = _minimise(
        lambda: _objective(x, y, weight, bias, c), (weight, bias), max_iterations, tolerance, history
    )
    loss, dw, db = _objective(x, y, weight, bias, c)
    whole, offsets = weight.new_zeros(classes, x.shape[1]), weight.new_full((classes,), -torch.inf)
    whole[present], offsets[present] = weight, bias
    largest = max(dw.abs().amax().item(), db.abs().amax().item())
    return LogisticModel(whole, offsets, loss.item(), largest, iterations)


def _minimise(
    objective: Callable[[], tuple[Tensor, Tensor, Tensor]],
    leaves: tuple[Tensor, Tensor],
    max_iterations: int,
    tolerance: float,
    history: int,
) -> int:
    """L-BFGS on `leaves` in place until no entry of the gradient is above `tolerance`; returns iterations.

    A small change of the loss is no sign of a minimum: in a flat valley it is small for long. So torch's rule
    for it is off. The only other end is that `STALLED` iterations together lower the loss by no more than
    rounding does.
    """
    optimizer = torch.optim.LBFGS(
        leaves,
        max_iter=STALLED,
        max_eval=20 * STALLED,
        tolerance_grad=SCALE * tolerance,
        tolerance_change=0.0,
        history_size=history,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, *gradients = objective()
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = SCALE * gradient
        return SCALE * loss

    done, before = 0, torch.inf
    while done < max_iterations:
        optimizer.param_groups[0]["max_iter"] = min(STALLED, max_iterations - done)
        loss = float(optimizer.step(closure))  # type: ignore[arg-type]  # where this round began
        reached = int(optimizer.state[leaves[0]].get("n_iter", 0))
        if reached == done or before - loss <= FLAT_SLOPE * abs(loss):
            return reached
        done, before = reached, loss
    return done


def _begin(
    start: LogisticModel | None, present: Tensor, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if start is None:
        return torch.zeros(len(present), width, device=device, dtype=dtype), torch.zeros(
            len(present), device=device, dtype=dtype
        )
    here = present.to(start.bias.device)
    weight, bias = start.weight[here].to(device, dtype), start.bias[here].to(device, dtype)
    return weight.clone(), torch.where(bias.isfinite(), bias, 0.0).clone()


@torch.no_grad()
def _objective(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """The objective and its gradients, from one reading of the rows."""
    n = len(x)
    loss = 0.5 / (c * n) * weight.square().sum(dtype=torch.float64)
    dw, db = weight / (c * n), torch.zeros_like(bias)
    rows = _rows(weight)
    for part, labels in zip(x.split(rows), y.split(rows), strict=True):
        part = part.to(weight.dtype)
        log = torch.log_softmax(torch.addmm(bias, part, weight.T), dim=1)
        loss = loss - log.gather(1, labels[:, None]).sum(dtype=torch.float64) / n
        residual = log.exp_()
        residual[torch.arange(len(labels), device=labels.device), labels] -= 1
        residual /= n
        dw.addmm_(residual.T, part)
        db += residual.sum(dim=0)
    return loss, dw, db


def _rows(weight: Tensor) -> int:
    return max(1, LOGITS_AT_ONCE // max(weight.shape))


def path(
    x: Float[Tensor, "n D"],
    y: Int64[Tensor, "n"],
    classes: int,
    values: Sequence[float],
    *,
    start: LogisticModel | None = None,
    progress: bool = False,
    **settings: Any,
) -> list[LogisticModel]:
    """Return `fit` for each of `values`, from the smallest C to the largest, each from where the last one
    ended.

    The models are in the order of `values`. `settings` are those of `fit`; each of `values` counts once.
    """
    models: dict[float, LogisticModel] = {}
    ordered = sorted(set(values))
    for c in show(ordered, len(ordered), "logistic regression", progress):
        start = models[c] = fit(x, y, classes, c, start=start, **settings)
    return [models[c] for c in values]


def standardiser(x: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"]]:
    """Return (mean, scale) of each column: the population's standard deviation, 1 where a column is
    constant.
    """
    mean = torch.stack([part.double().sum(dim=0) for part in x.split(65536)]).sum(dim=0) / len(x)
    square = torch.stack([(part.double() - mean).square().sum(dim=0) for part in x.split(65536)]).sum(dim=0)
    scale = (square / len(x)).sqrt()
    # What rounding leaves of a constant column is no spread.
    scale = torch.where(scale > 1e-6 * mean.abs() + torch.finfo(torch.float64).tiny, scale, 1.0)
    return mean.float(), scale.float()


# -- protocol ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogisticConfig(ProbeConfig):
    """Settings of `logistic`. Defaults: DINOv2."""

    features: str | None = key(
        None,
        "feature to classify: token, token4, average, token+average, ...; null = token, or average "
        "for an encoder without one",
    )
    values: int = key(45, "how many values of C to try, 10^-6 to 10^5 in equal ratios", at_least=2)
    c: tuple[float, ...] | None = key(None, "the values of C to try, instead", above=0)
    iterations: int = key(1000, "L-BFGS iterations of each C at most", at_least=1)
    tolerance: float = key(1e-6, "L-BFGS stops when no entry of the gradient is larger", above=0)
    standardise: bool = key(False, "columns to mean 0 and deviation 1, by the rows that train")
    masks: bool = key(
        False,
        "object tokens, which read only their object, in place of class tokens; discover, detect or segment: "
        "of the object that this finds in each image (docs/evaluation/encoding.md)",
    )
    arithmetic: Literal["float64", "float32"] = key("float64", "numbers of the fit")

    def __post_init__(self) -> None:
        if self.c is not None and (not self.c or len(set(self.c)) < len(self.c)):
            raise ValueError(f"c: needs different values, got {list(self.c)}")
        if self.views:
            raise ValueError(f"views={self.views}: logistic regression learns from the evaluation view")

    @property
    def grid(self) -> list[float]:
        """All values of C, ascending."""
        return sorted(self.c) if self.c else (10 ** torch.linspace(-6, 5, self.values).double()).tolist()


def features_of(config: LogisticConfig, encoder: Encoder) -> str:
    """Return what is classified."""
    return config.features or ("token" if encoder.config.model.class_token else "average")


def wanted_of(config: LogisticConfig, encoder: Encoder) -> Need:
    """Return what of an image the protocol reads."""
    return need_of((features_of(config, encoder),), config.masks).at(encoder, config.image_size)


class Logistic(Protocol):
    """Fits a path of logistic regressions over C, and chooses C on the hold-out.

    Numbers in percent of group `logistic`: as of `linear`; the grid's `test` is of models before the refit.
    """

    name = "logistic"
    title = "logistic regression"
    help = "linear classification by L-BFGS logistic regression, over a path of C"
    Config = LogisticConfig
    train = "needed"
    metrics = probe_metrics(title)

    def needs(self, config: LogisticConfig, encoder: Encoder) -> Needs:
        """Return vectors of each image."""
        return probe_needs(wanted_of(config, encoder), config)

    def measure(self, at: At, config: LogisticConfig) -> Outcome:
        """Fit a path over C, choose on the hold-out, refit on all rows that train, score on `test`."""
        wanted = wanted_of(config, at.encoder)
        values = config.grid
        task = open_task(at, config, wanted, len(values))
        settings = {
            "max_iterations": config.iterations,
            "tolerance": config.tolerance,
            "dtype": getattr(torch, config.arithmetic),
            "device": task.device,
        }

        def rows(part: str) -> Float[Tensor, "n D"]:
            store, index = {
                "fit": (task.holding, task.fit),
                "hold": (task.holding, task.hold),
                "score": (task.exam.test, task.exam.score),
                "both": (task.holding, torch.cat((task.fit, task.hold)).sort().values),
            }[part]
            x = {feature: store.take(feature, index, 0, wanted.layers) for feature in wanted.features}
            return joined_features(x, features_of(config, at.encoder), config.masks)

        x, test_x = rows("fit"), rows("score")
        mean, scale = standardiser(x) if config.standardise else (torch.zeros(()), torch.ones(()))
        test_x = (test_x - mean) / scale
        models = path(
            (x - mean) / scale, task.labels[task.fit], task.classes, values, progress=at.progress, **settings
        )
        on_test = [_judged(model, test_x, task.exam.truth).right[0] for model in models]
        grid: list[dict[str, Any]] = [
            {"c": c, "test": percent(right), "iterations": model.iterations, "gradient": model.gradient}
            for c, right, model in zip(values, on_test, models, strict=True)
        ]
        order = [(row["test"], 0.0) for row in grid]
        if len(task.hold):
            held = (rows("hold") - mean) / scale
            order = [_judged(model, held, task.held).order()[0] for model in models]
            for row, (fraction, _) in zip(grid, order, strict=True):
                row["holdout"] = fraction
        best = max(range(len(values)), key=order.__getitem__)
        model, right = models[best], on_test[best]
        if len(task.hold):
            both = torch.cat((task.fit, task.hold)).sort().values
            x = (rows("both") - mean) / scale
            model = fit(x, task.labels[both], task.classes, values[best], start=model, **settings)
            right = _judged(model, test_x, task.exam.truth).right[0]
        found = scored(
            "logistic",
            right,
            task.exam.truth,
            config.seed,
            task.exam.truth.top5(model.logits(test_x).cpu()),
        )
        metrics = found.metrics
        if len(values) > 1:
            metrics["top1_logistic_best_on_test"] = max(row["test"] for row in grid)
        if len(task.hold):
            metrics["holdout_logistic"] = grid[best]["holdout"]
        task.notes.extend(notes_of_choice(task, len(values)))
        _note_ends(grid, config, task)
        chosen = {"c": values[best], "parameters": model.weight.numel() + model.bias.numel()}
        return Outcome(
            metrics,
            task.facts(task.exam),
            (*task.notes, *task.exam.notes),
            {"logistic": chosen},
            {"logistic": grid},
            found.scores,
        )


def _judged(model: LogisticModel, x: Float[Tensor, "n D"], truth: GroundTruth) -> Judged:
    return judged(lambda rows: model.logits(x[rows])[None], len(x), truth, at_once=4096)


def _note_ends(grid: Sequence[dict[str, Any]], config: LogisticConfig, task: Task) -> None:
    """Say which values of C did not reach their minimum."""
    if early := [row["c"] for row in grid if row["gradient"] > config.tolerance]:
        task.notes.append(
            f"{len(early)} of {len(grid)} values of C, from {min(early):.2g} on, ended with a gradient above "
            f"tolerance={config.tolerance:g} (see grid); iterations= takes them further"
        )
