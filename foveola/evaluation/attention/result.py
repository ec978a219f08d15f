"""`AttentionAnalysis`: what the analysis of attention found, as it is printed and written to JSON and CSV."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from foveola import files
from foveola.evaluation.attention.statistics import BLOCK_STATISTICS, HEAD_STATISTICS, Layout
from foveola.outside import library

CSV_COLUMNS: tuple[str, ...] = (
    "encoder",
    "block",
    "head",
    "statistic",
    "mean",
    "standard_error",
    "images",
    "unit",
    "uniform",
    "low",
    "high",
)
TABLE_COLUMNS = {  # of the printed table: statistic and its heading
    "class_to_class": "cls-cls",
    "class_entropy": "cls entropy",
    "patch_self": "patch self",
    "patch_entropy": "patch entropy",
    "nmi": "NMI",
    "distance": "distance px",
    "head_divergence": "head KL",
    "patch_to_registers": "to registers",
    "outlier_share": "outliers",
}


class Estimate(NamedTuple):
    """A mean over images and its standard error, of the same shape; NaN: the encoder has no such thing."""

    mean: np.ndarray
    error: np.ndarray


class RunningMoments:
    """Running mean and squared deviations over images, in float64; as large as one image's values."""

    def __init__(self, *shape: int) -> None:
        self.count = 0
        self.mean, self.squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def add(self, values: Float64[Tensor, "B ..."]) -> None:
        """Add images, by the update of Chan, Golub and LeVeque."""
        part = RunningMoments()
        part.count, part.mean = len(values), values.mean(dim=0)
        part.squares = (values - part.mean).square().sum(dim=0)
        self.merge(part)

    def merge(self, other: "RunningMoments") -> None:
        """Take over the images of another."""
        if not other.count:
            return
        total, apart = self.count + other.count, other.mean - self.mean
        self.mean = self.mean + apart * (other.count / total)
        self.squares = self.squares + other.squares + apart.square() * (self.count * other.count / total)
        self.count = total

    def estimate(self) -> Estimate:
        """Return the estimate over images. The standard error of one image is NaN: it says nothing about
        others.
        """
        n = self.count
        error = (self.squares / (n * (n - 1))).sqrt() if n > 1 else torch.full_like(self.mean, torch.nan)
        return Estimate(self.mean.numpy(), error.numpy())


@dataclass(frozen=True, eq=False)
class EncoderAttention:
    """Statistics of one encoder. Blocks and heads count from 0 here, and from 1 in files and images."""

    name: str
    about: dict[str, Any]  # origin, fingerprint, size in pixels, patch size, grid, blocks, heads, registers
    layout: Layout
    heads: dict[str, Estimate]  # statistics of heads, [blocks, heads]
    blocks: dict[str, Estimate]  # the same averaged over the heads, and statistics of blocks, [blocks]
    whole: dict[str, Estimate]  # all of these averaged over the blocks, []
    head_divergences: Estimate  # KL of the class token's heads, [blocks, heads, heads]; row p, column q
    cost: dict[str, float]  # seconds an image of a plain pass and of the analysis, measured on some images


@dataclass(frozen=True, eq=False)
class Vectors:
    """Weights with which patches may be averaged, and how much they differ on the same image."""

    names: tuple[str, ...]  # encoder: vector; and `uniform`
    grid: tuple[int, int]
    entropy: Estimate  # [V]
    divergence: Estimate  # KL(p || q) in nats, [V, V]; row p, column q


@dataclass(frozen=True, eq=False)
class AttentionAnalysis:
    """What `analyze_attention` found: means over images with standard errors, and how to repeat it."""

    encoders: tuple[EncoderAttention, ...]
    vectors: tuple[Vectors, ...]  # one for each group of encoders that see the same patches
    data: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    date: str
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> EncoderAttention:
        """The encoder of this name. Raises KeyError."""
        return {encoder.name: encoder for encoder in self.encoders}[name]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a dict of `COLUMNS` for each encoder, block, head and statistic; head and block are also
        'mean'.
        """
        for encoder in self.encoders:
            for name, statistic in (HEAD_STATISTICS | BLOCK_STATISTICS).items():
                reference = statistic.reference(encoder.layout)
                about = {"unit": statistic.unit, **reference._asdict()}
                for block, head, mean, error in _cells(encoder, name):
                    where = {"encoder": encoder.name, "block": block, "head": head, "statistic": name}
                    found = {"mean": _plain(mean), "standard_error": _plain(error)}
                    yield {**where, **found, "images": self.data["analysed"], **about}

    def frame(self) -> Any:
        """Return `rows` as a pandas DataFrame. Raises UserError without pandas."""
        return library("pandas", "frames", "AttentionAnalysis.frame()").DataFrame(self.rows())

    def to_json(self) -> dict[str, Any]:
        """Return plain values, null for what an encoder has not."""
        encoders = []
        for encoder in self.encoders:
            statistics = {}
            for name, statistic in (HEAD_STATISTICS | BLOCK_STATISTICS).items():
                levels = {"heads": encoder.heads, "blocks": encoder.blocks, "whole": encoder.whole}
                statistics[name] = {
                    "title": statistic.title,
                    "unit": statistic.unit,
                    **statistic.reference(encoder.layout)._asdict(),
                    **{level: _tree(found[name]) for level, found in levels.items() if name in found},
                }
            encoders.append(
                {
                    "name": encoder.name,
                    **encoder.about,
                    "cost": encoder.cost,
                    "statistics": statistics,
                    "head_divergences": _tree(encoder.head_divergences),
                }
            )
        vectors = [
            {
                "names": list(group.names),
                "grid": list(group.grid),
                "entropy": _tree(group.entropy),
                "divergence": _tree(group.divergence),
            }
            for group in self.vectors
        ]
        return {
            "encoders": encoders,
            "vectors": vectors,
            "data": self.data,
            "settings": self.settings,
            "versions": self.versions,
            "date": self.date,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `folder/attention.json` and `folder/attention.csv`, each replaced whole."""
        folder = Path(folder)
        text = io.StringIO()
        writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        tree = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        return (
            files.write_text(folder / "attention.json", tree),
            files.write_text(folder / "attention.csv", text.getvalue()),
        )

    def table(self) -> str:
        """Return aligned plain text: statistics averaged over blocks and heads, then what the analysis
        cost.
        """
        shown = {
            name: title
            for name, title in TABLE_COLUMNS.items()
            if not all(np.isnan(encoder.whole[name].mean) for encoder in self.encoders)
        }
        rows = [("encoder", "entropy <=", *shown.values())]
        for encoder in self.encoders:
            bound = f"{HEAD_STATISTICS['patch_entropy'].reference(encoder.layout).high:.3f}"
            cells = (_cell(encoder.whole[name]) for name in shown)
            rows.append((encoder.name, bound, *cells))
        head = f"attention: {self.data['name']} ({self.data['analysed']} images), {self.seconds:.1f} s"
        under = "means over images, heads and blocks, with the standard error over images"
        costs = [
            f"{encoder.name}: {1e3 * encoder.cost['plain']:.1f} ms an image alone, "
            f"{1e3 * encoder.cost['analysis']:.1f} ms with statistics ({encoder.cost['ratio']:.2f} times)"
            for encoder in self.encoders
        ]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([head, under, *_aligned(rows), *costs, *notes])


def _cells(encoder: EncoderAttention, name: str) -> Iterator[tuple[int | str, int | str, Any, Any]]:
    """(block, head, mean, error) of a statistic; the head of a statistic of whole blocks is 'all'."""
    if name in encoder.heads:
        for (block, head), mean in np.ndenumerate(encoder.heads[name].mean):
            yield block + 1, head + 1, mean, encoder.heads[name].error[block, head]
    head = "mean" if name in encoder.heads else "all"
    for block, (mean, error) in enumerate(zip(*encoder.blocks[name], strict=True)):
        yield block + 1, head, mean, error
    yield "mean", head, encoder.whole[name].mean, encoder.whole[name].error


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _tree(estimate: Estimate) -> dict[str, Any]:
    def plain(values: Any) -> Any:
        return [plain(value) for value in values] if isinstance(values, list) else _plain(values)

    return {"mean": plain(estimate.mean.tolist()), "standard_error": plain(estimate.error.tolist())}


def _cell(estimate: Estimate) -> str:
    mean, error = float(estimate.mean), float(estimate.error)
    if np.isnan(mean):
        return "-"
    digits = 1 if abs(mean) >= 10 else 3 if abs(mean) >= 0.1 else 4
    return f"{mean:.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
