"""Linear segmentation: a linear layer on frozen patches, trained by gradient on the enlarged logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from foveola import distributed
from foveola.config import UserError, key
from foveola.data.segmentation import IGNORE
from foveola.evaluation.paired import packed_areas
from foveola.evaluation.protocol import At, Outcome
from foveola.evaluation.segmentation.choice import choose_setting, hold_out
from foveola.evaluation.segmentation.iou import (
    mean_iou,
    named_iou,
    region_areas,
    rounded,
    summary,
    summary_metrics,
)
from foveola.evaluation.segmentation.patches import Scaler
from foveola.evaluation.segmentation.reading import ComparedConfig, DensePass, DenseProtocol
from foveola.evaluation.segmentation.retrieval import label_pixels
from foveola.progress import show

POWER = 0.9  # of the polynomial schedule (Segmenter)


@dataclass(frozen=True)
class LinearSegmentationConfig(ComparedConfig):
    """Settings of `linear_segmentation`."""

    rates: tuple[float, ...] = key(
        (1e-4, 1e-3, 1e-2), "learning rates to try, all trained on the same batches", above=0
    )
    steps: int = key(1000, "steps of AdamW; the rate falls to 0 as (1 - step / steps)^0.9", at_least=1)
    train_batch: int = key(16, "images in a step", at_least=1)
    weight_decay: float = key(0.01, "weight decay of the weights, not of the bias", at_least=0)
    standardise: bool = key(True, "divide by the training patches' standard deviation, after their mean")
    holdout: float = key(0.1, "fraction of the training images that choose the rate", above=0, below=1)

    def __post_init__(self) -> None:
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates: needs different values, got {list(self.rates)}")


# -- training ---------------------------------------------------------------------------------------------


def label_loss(
    logits: Float32[Tensor, "b N C"], maps: UInt8[Tensor, "b S S"], grid: int
) -> Float32[Tensor, ""]:
    """Return the mean cross-entropy of the pixels that have a class, of logits enlarged bilinearly; 0 where
    none has.
    """
    field = logits.transpose(1, 2).unflatten(2, (grid, grid))
    large = interpolate(field, maps.shape[-2:], mode="bilinear", align_corners=False)
    total = cross_entropy(large, maps.long(), ignore_index=IGNORE, reduction="sum")
    return total / (maps != IGNORE).sum().clamp(min=1)


def train_heads(
    features: Float[Tensor, "n N D"],
    maps: UInt8[Tensor, "n S S"],
    classes: int,
    rates: Sequence[float],
    *,
    steps: int,
    batch: int,
    weight_decay: float,
    seed: int,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> list[nn.Linear]:
    """Train a head for each rate. All see the same batches and start alike, so each is as if trained alone.

    Weights start from a truncated normal of 0.02, the bias from 0 (Segmenter). Images are drawn epoch by
    epoch, none twice before all were drawn once; what does not fill a batch begins the next epoch's.
    """
    heads = []
    for _ in rates:
        # Without its own start, which would draw from the global generator.
        head = nn.Linear(features.shape[2], classes, device="meta").to_empty(device=device)
        nn.init.trunc_normal_(head.weight, std=0.02, generator=torch.Generator(device).manual_seed(seed))
        nn.init.zeros_(head.bias)
        heads.append(head)
    groups = []
    for head, rate in zip(heads, rates, strict=True):
        groups.append({"params": [head.weight], "lr": rate, "weight_decay": weight_decay})
        groups.append({"params": [head.bias], "lr": rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** POWER)
    order = _order(len(features), steps * min(batch, len(features)), seed)
    grid = int(features.shape[1] ** 0.5)
    for rows in show(order.split(min(batch, len(features))), steps, "training heads", progress):
        x, labels = features[rows].to(device).float(), maps[rows].to(device)
        optimizer.zero_grad()
        for head in heads:  # one after the other: enlarged logits of one head are in memory at a time
            label_loss(head(x), labels, grid).backward()
        optimizer.step()
        schedule.step()
    return heads


def _order(count: int, draws: int, seed: int) -> Int64[Tensor, "draws"]:
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(count) for _ in range(-(-draws // count))]
    return torch.from_numpy(np.concatenate(epochs)[:draws])


# -- protocol ---------------------------------------------------------------------------------------------


class LinearSegmentation(DenseProtocol):
    """Trains a linear layer on patches by gradient, with the learning rate that held-out images choose."""

    name = "linear_segmentation"
    help = "segmentation by a linear layer on patches, trained by gradient"
    Config = LinearSegmentationConfig
    metrics = summary_metrics("linear segmentation")

    def segment(self, at: At, classes: tuple[str, ...], config: LinearSegmentationConfig) -> Outcome:
        """Choose the learning rate on held-out images, train again on all, measure on test."""
        c = len(classes)
        began = perf_counter()
        passing = DensePass(at.encoder, at.train, config, progress=at.progress, feed=at.feed)
        features, maps, image_indices = _kept(passing)
        facts = passing.facts()
        held = hold_out(image_indices, maps.flatten(1), c, config.holdout, config.seed)
        if not (maps[~held] != IGNORE).any():
            raise UserError(f"{at.train.name}: no pixel has a class")
        scaler = Scaler.fit(features[~held].flatten(0, 1)) if config.standardise else None
        if scaler is not None:
            for into in features:  # in place: there is no second copy
                into.copy_(scaler(into))
        seconds = {"extract_seconds": round(perf_counter() - began, 2)}
        began = perf_counter()

        def fit(x: Tensor, labels: Tensor, rates: Sequence[float]) -> list[nn.Linear]:
            return train_heads(
                x, labels, c, rates, steps=config.steps, batch=config.train_batch,
                weight_decay=config.weight_decay, seed=config.seed, device=at.encoder.device,
                progress=at.progress,
            )  # fmt: skip

        rate, tried = config.rates[0], []
        if len(config.rates) > 1:
            heads = fit(features[~held], maps[~held], config.rates)
            scores = [_held_out(head, features[held], maps[held], passing.grid, c) for head in heads]
            if np.isnan(scores).all():
                raise UserError("no pixel of the held-out images has a class: hold out more of them")
            losses = partial(_losses, heads, features[held], maps[held], passing.grid)
            rate = config.rates[choose_setting(scores, losses)]
            tried = [{"rate": r, "miou": rounded(s)} for r, s in zip(config.rates, scores, strict=True)]
        (head,) = fit(features, maps, [rate])
        seconds["fit_seconds"] = round(perf_counter() - began, 2)
        began = perf_counter()
        areas, images = [torch.zeros(0, 3, c + 1, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        passing = DensePass.compared(at, config)
        for batch in passing:
            x = (
                batch.features
                if scaler is None
                else scaler(batch.features.flatten(0, 1)).view_as(batch.features)
            )
            areas.append(_areas(head, x, batch.truth, passing.grid, c))
            images.append(batch.image_indices)
        total, shown = (distributed.gather_rows(torch.cat(parts)) for parts in (areas, images))
        data = {
            "train": facts,
            "test": passing.facts(),
            "class_iou": named_iou(total, classes),
            **seconds,
            "test_seconds": round(perf_counter() - began, 2),
        }
        metrics, scores = summary(total, config.seed), {"miou": packed_areas([total], shown)}
        return Outcome(metrics, data, (), {self.name: {"rate": rate}}, {self.name: tried}, scores)


def _kept(passing: DensePass) -> tuple[Float[Tensor, "n N D"], UInt8[Tensor, "n S S"], Int64[Tensor, "n"]]:
    """All patches of all images, their maps, their indices. Every rank gets all."""
    room, width = len(passing.mine), passing.encoder.config.model.shape[0]
    features = torch.empty(room, passing.grid**2, width, dtype=getattr(torch, passing.config.store))
    maps = torch.empty(room, passing.side, passing.side, dtype=torch.uint8)
    image_indices, count = torch.empty(room, dtype=torch.int64), 0
    for batch in passing:
        into = slice(count, count + len(batch.image_indices))
        features[into], maps[into], image_indices[into] = batch.features, batch.maps, batch.image_indices
        count = into.stop
    return tuple(distributed.gather_rows(part[:count]) for part in (features, maps, image_indices))  # type: ignore


def _held_out(
    head: nn.Linear, features: Float[Tensor, "n N D"], maps: UInt8[Tensor, "n S S"], grid: int, classes: int
) -> float:
    """Mean IoU of a head on the given images."""
    total = torch.zeros(3, classes + 1, dtype=torch.int64)
    for x, labels in zip(features, maps, strict=True):
        total += _areas(head, x, [labels], grid, classes)[0]
    return float(mean_iou(total.numpy()))


@torch.no_grad()
def _losses(
    heads: Sequence[nn.Linear], features: Float[Tensor, "n N D"], maps: UInt8[Tensor, "n S S"], grid: int
) -> list[float]:
    """Mean cross-entropy of each head over the pixels with a class of the given images."""
    pixels, totals = int((maps != IGNORE).sum()), [0.0] * len(heads)
    for x, labels in zip(features.split(1), maps.split(1), strict=True):
        for i, head in enumerate(heads):
            own = (labels != IGNORE).sum()
            at = head.weight.device
            totals[i] += float(label_loss(head(x.to(at).float()), labels.to(at), grid) * own)
    return [total / max(pixels, 1) for total in totals]


@torch.no_grad()
def _areas(
    head: nn.Linear,
    features: Float[Tensor, "*b N D"],
    truth: Sequence[UInt8[Tensor, "H W"]],
    grid: int,
    classes: int,
) -> Int64[Tensor, "b 3 C1"]:
    """Areas of each image."""
    logits = head(features.to(head.weight.device).float()).cpu()
    logits = logits.reshape(len(truth), -1, classes)
    return torch.stack(
        [
            region_areas(label_pixels(one, grid, (labels.shape[0], labels.shape[1])), labels, classes)
            for one, labels in zip(logits, truth, strict=True)
        ]
    )
