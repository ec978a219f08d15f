"""Running means over images: what the attention of an encoder says, and how several encoders differ."""

import dataclasses
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from foveola.config import UserError, again, key
from foveola.evaluation.attention.result import EncoderAttention, Estimate, RunningMoments, Vectors
from foveola.evaluation.attention.statistics import (
    BLOCK_STATISTICS,
    HEAD_STATISTICS,
    Layout,
    divergences,
    entropy_of,
    head_divergence,
    head_statistics,
    mean_head,
    missing,
    norm_statistics,
    over_patches,
    sharpest_head,
)
from foveola.evaluation.classification.abmilp import load_weights
from foveola.evaluation.classification.saved import SavedProbe
from foveola.evaluation.images import ChosenConfig
from foveola.models.encoder import Encoder, TransformConfig

TIMED = 3  # batches on which the cost is measured; the first of several is a warm-up
Geometry = tuple[int, int, str, bool]  # of a TransformConfig: resize, crop, interpolation, squash


@dataclass(frozen=True)
class AnalysisConfig(ChosenConfig):
    """Which images are read, and how. Defaults: as every encoder sees images in evaluation."""

    limit: int | None = again(ChosenConfig, "limit", 1000)
    size: int | None = key(
        None, "pixels a side of the encoders' input; null = the crop of each encoder", at_least=1
    )
    squash: bool | None = key(
        None, "true: the whole image squashed to a square (position-field paper, with size=480)"
    )
    batch_size: int = again(ChosenConfig, "batch_size", 32)
    precision: Literal["fp32", "bf16"] = key(
        "fp32", "arithmetic of the encoder; statistics are float32 or better"
    )
    probe: tuple[str, ...] = key(
        (), "AbMILP probes, RUN/results/abmilp/probe.safetensors, whose weights are one more vector"
    )
    outlier_deviations: float = key(
        5.0, "a patch of outlying norm is this many robust deviations above the median", above=0
    )
    outlier_factor: float = key(2.0, "and at least this many times the median", at_least=1)
    outlier_norm: float | None = key(
        None, "count patches above this norm, too (150 in the registers paper, for DINOv2's ViT-g)", above=0
    )


def analysis_transform(encoder: Encoder, name: str, config: AnalysisConfig) -> TransformConfig:
    """Return what is done to images for an encoder. Raises UserError for a size that is no whole patches."""
    own = encoder.config.transform
    size = config.size or own.crop
    encoder.check_side(size, "size", name)
    larger = size if config.squash else round(own.resize * size / own.crop)
    squash = own.squash if config.squash is None else config.squash
    return dataclasses.replace(own, crop=size, resize=larger, squash=squash)


# -- one encoder ---------------------------------------------------------------------------------------------


class AttentionReader:
    """Running means of one encoder, and the statistics of its last batch."""

    def __init__(self, name: str, encoder: Encoder, config: AnalysisConfig) -> None:
        self.name, self.encoder, self.config = name, encoder, config
        transform = analysis_transform(encoder, name, config)
        self.geometry = (transform.resize, transform.crop, transform.interpolation, transform.squash)
        shape, patch = encoder.config.model, encoder.patch_size
        _, self.depth, self.count = shape.shape
        side = transform.crop // patch
        self.layout = Layout(shape.class_token, shape.registers, (side, side), patch)
        self.distances = self.layout.distances.to(encoder.device)
        self.lacks = missing(self.layout, self.count)
        self.lacks |= {"outlier_share_fixed"} if config.outlier_norm is None else set()
        self.heads = RunningMoments(self.depth, self.count, len(HEAD_STATISTICS))
        self.blocks = RunningMoments(self.depth, len(HEAD_STATISTICS) + len(BLOCK_STATISTICS))
        self.whole = RunningMoments(len(HEAD_STATISTICS) + len(BLOCK_STATISTICS))
        self.between = RunningMoments(self.depth, self.count, self.count)
        self.vectors: dict[str, Tensor] = {}  # of the last batch: logarithms [B, N] by name
        prints = {path: SavedProbe.load(path).about["encoder"] for path in config.probe}
        self.probe = next((path for path, own in prints.items() if own == encoder.fingerprint()), None)
        self.weights = None if self.probe is None else load_weights(self.probe, encoder)
        self.kinds = (*(("class", "sharpest") if shape.class_token else ()), "centre")
        self.kinds += () if self.weights is None else ("abmilp",)
        self.seconds = {"plain": [0.0, 0.0], "analysis": [0.0, 0.0]}  # of the first batch, of those after it
        self.timed = [0, 0]

    def moments(self) -> tuple[RunningMoments, ...]:
        return self.heads, self.blocks, self.whole, self.between

    @torch.inference_mode()
    def read(self, images: Shaped[Tensor, "B ch S S"], number: int, where: str) -> None:
        """Read the images of a batch, counted from 0; raises UserError where attention is not finite."""
        encoder = self.encoder
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            if number < TIMED:
                began = self._now()
                encoder.backbone(encoder.normalise(images.to(encoder.device)))
                later = min(number, 1)
                self.seconds["plain"][later] += self._now() - began
                self.timed[later] += len(images)
            began = self._now() if number < TIMED else 0.0
            view = _View(self, len(images))
            seen = encoder.visit(encoder.normalise(images.to(encoder.device)), view.attention, view.output)
            if self.weights is not None:
                fractions = self.weights(seen.patches.float()).double()
                view.vectors["abmilp"] = fractions.clamp(min=torch.finfo(torch.float32).tiny).log()
            heads, blocks, between = view.heads.cpu(), view.blocks.cpu(), view.between.cpu()
            if number < TIMED:
                self.seconds["analysis"][min(number, 1)] += self._now() - began
        self.vectors = view.vectors
        known = [i for i, name in enumerate(HEAD_STATISTICS) if name not in self.lacks]
        if not heads[..., known].isfinite().all() or not between.nan_to_num(0.0).isfinite().all():
            raise UserError(
                f"{self.name}: its attention on images of {where} is not finite: is the encoder "
                "damaged, or its training diverged?"
            )
        means = torch.cat((heads.mean(dim=2), blocks), dim=2)
        self.heads.add(heads)
        self.blocks.add(means)
        self.whole.add(means.mean(dim=1))
        self.between.add(between)

    def _now(self) -> float:
        if self.encoder.device.type == "cuda":
            torch.cuda.synchronize(self.encoder.device)
        return perf_counter()

    def result(self) -> EncoderAttention:
        names = (*HEAD_STATISTICS, *BLOCK_STATISTICS)
        heads, blocks, whole = (m.estimate() for m in (self.heads, self.blocks, self.whole))
        config = self.encoder.config
        return EncoderAttention(
            name=self.name,
            about={
                "origin": config.origin,
                "fingerprint": self.encoder.fingerprint(),
                "size": self.geometry[1],
                "resize": self.geometry[0],
                "squash": self.geometry[3],
                "patch_size": self.layout.patch_size,
                "grid": list(self.layout.grid),
                "blocks": self.depth,
                "heads": self.count,
                "class_token": self.layout.class_token,
                "registers": self.layout.registers,
            },
            layout=self.layout,
            heads={name: _last(heads, i) for i, name in enumerate(HEAD_STATISTICS)},
            blocks={name: _last(blocks, i) for i, name in enumerate(names)},
            whole={name: _last(whole, i) for i, name in enumerate(names)},
            head_divergences=self.between.estimate(),
            cost=self._cost(),
        )

    def _cost(self) -> dict[str, float]:
        after = int(self.timed[1] > 0)
        images = max(self.timed[after], 1)
        plain, analysis = (self.seconds[name][after] / images for name in ("plain", "analysis"))
        ratio = analysis / plain if plain else 0.0  # nothing was timed: this process read no image
        return {"plain": plain, "analysis": analysis, "ratio": ratio, "images": self.timed[after]}


class _View:
    """What one batch says, block by block, on the device of the encoder."""

    def __init__(self, reader: AttentionReader, images: int) -> None:
        self.reader, self.at = reader, reader.layout
        depth, heads, tokens = reader.depth, reader.count, self.at.special + self.at.patches

        def empty(*shape: int) -> Tensor:
            where = reader.encoder.device
            return torch.full((images, *shape), torch.nan, dtype=torch.float64, device=where)

        self.heads = empty(depth, heads, len(HEAD_STATISTICS))
        self.blocks = empty(depth, len(BLOCK_STATISTICS))
        self.between = empty(depth, heads, heads)
        self.class_rows, self.centre_rows = empty(heads, tokens), empty(heads, tokens)
        self.vectors: dict[str, Tensor] = {}

    def attention(self, block: int, images: slice, heads: slice, logits: Tensor) -> None:
        parts = head_statistics(logits, self.at, self.reader.distances)
        self.heads[images, block, heads] = parts.statistics
        self.centre_rows[images, heads] = parts.centre_rows
        if parts.class_rows is not None:
            self.class_rows[images, heads] = parts.class_rows

    def output(self, block: int, x: Tensor) -> None:
        config, at = self.reader.config, self.at
        limits = config.outlier_deviations, config.outlier_factor, config.outlier_norm
        found = norm_statistics(x, at, *limits)
        uniform = x.new_full((len(x), at.patches), -np.log(at.patches), dtype=torch.float64)
        vectors = {"centre": mean_head(self.centre_rows, at)}
        if at.class_token:
            vectors |= {
                "class": mean_head(self.class_rows, at),
                "sharpest": sharpest_head(self.class_rows, at),
            }
            matrix = divergences(over_patches(self.class_rows, at))
            self.between[:, block] = matrix
            self.heads[:, block, :, list(HEAD_STATISTICS).index("head_divergence")] = head_divergence(matrix)
        found["aggregation_entropy"] = entropy_of(vectors.get("class", uniform))
        found["lowest_entropy"] = (
            entropy_of(vectors["sharpest"])
            if at.class_token
            else torch.full_like(found["outliers"], torch.nan)
        )
        self.blocks[:, block] = torch.stack([found[name] for name in BLOCK_STATISTICS], dim=1)
        self.vectors = vectors


# -- several encoders ----------------------------------------------------------------------------------------


class VectorGroup:
    """Encoders that see the same patches of an image: their aggregation vectors can be compared."""

    def __init__(self, readers: list[AttentionReader]) -> None:
        self.readers = readers
        self.names = [f"{reader.name}: {kind}" for reader in readers for kind in reader.kinds]
        count = len(self.names) + 1
        self.entropy, self.divergence = RunningMoments(count), RunningMoments(count, count)

    def moments(self) -> tuple[RunningMoments, ...]:
        return self.entropy, self.divergence

    @torch.inference_mode()
    def add(self) -> None:
        """Add the images that all readers have just read."""
        log = [reader.vectors[kind].cpu() for reader in self.readers for kind in reader.kinds]
        stacked = torch.stack([*log, torch.full_like(log[0], -np.log(log[0].shape[1]))], dim=1)
        self.entropy.add(entropy_of(stacked))
        self.divergence.add(divergences(stacked))

    def result(self) -> Vectors:
        grid = self.readers[0].layout.grid
        return Vectors((*self.names, "uniform"), grid, self.entropy.estimate(), self.divergence.estimate())


def group_readers(readers: list[AttentionReader]) -> list[VectorGroup]:
    """Group readers by the patches they see: the same grid over the same part of an image."""
    found: dict[Any, list[AttentionReader]] = {}
    for reader in readers:
        size, crop, _, squash = reader.geometry
        found.setdefault((reader.layout.grid, round(size / crop, 2), squash), []).append(reader)
    return [VectorGroup(group) for group in found.values()]


def _last(estimate: Estimate, index: int) -> Estimate:
    return Estimate(estimate.mean[..., index], estimate.error[..., index])
