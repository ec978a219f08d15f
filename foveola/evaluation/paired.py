"""What each test row scored, small enough for a result; and the paired difference of two results.

Two encoders are measured on the same images, and mostly err on the same ones. So the interval of their
difference is far narrower than two intervals side by side suggest, but it needs the score of every row.
"""

import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foveola.config import UserError
from foveola.evaluation.metrics import paired_interval
from foveola.evaluation.result import Result
from foveola.evaluation.segmentation.iou import Absent, paired_iou

PackedScores = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """How much higher a metric of the second result is, in its unit, with its paired 95 % interval."""

    value: float
    low: float
    high: float
    alike: bool = False  # whether every row has the same score in both

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0: the difference is significant."""
        return self.low > 0 or self.high < 0

    def __neg__(self) -> "Difference":
        return Difference(-self.value, -self.high, -self.low, self.alike)

    def text(self, digits: int = 2) -> str:
        """Return the difference as text, as in: +1.50 [+0.20, +2.80]; of rows that are all alike: 0 [alike].

        Such rows say nothing of how far the two may differ on others: what an interval of them has as its
        width follows from its formula, not from the data.
        """
        if self.alike:
            return "0 [alike]"
        value, low, high = (f"{x:+.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def packed(values: Tensor, images: Int64[Tensor, "n"]) -> PackedScores:
    """Return the score of each row and the image it is of, as JSON can hold it.

    A score is a hit, a fraction in [0, 1] of a metric in percent, or a number in the unit of its metric.

    A hit takes a bit before compression. Images are kept as a hash, which says whether two results have the
    same rows in the same order, and as numbers only where several rows are of one image.
    """
    kind = "bool" if values.dtype == torch.bool else "float32"
    alone = len(images.unique()) == len(images)
    groups = {} if alone else {"groups": _text(images.unique(return_inverse=True)[1].numpy().astype("<i4"))}
    return {"kind": kind, **_about(values.cpu().numpy(), images, "?" if kind == "bool" else "<f4"), **groups}


def packed_areas(runs: Sequence[Tensor], images: Int64[Tensor, "n"], absent: Absent = "skip") -> PackedScores:
    """Return the same of areas [P, 3, C + 1] of each image (see `iou.region_areas`), of one or several
    runs.
    """
    areas = torch.stack(list(runs)).numpy()
    return {"kind": "areas", "absent": absent, **_about(areas, images, "<i4")}


def _about(values: np.ndarray, images: Tensor, dtype: str) -> PackedScores:
    rows = hashlib.sha256(images.numpy().astype("<i8").tobytes()).hexdigest()[:16]
    bits = np.packbits(values) if dtype == "?" else values.astype(dtype)
    return {"rows": rows, "shape": list(values.shape), "data": _text(bits)}


def _text(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def _numbers(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def unpacked(entry: Mapping[str, Any]) -> tuple[Tensor, Int64[Tensor, "n"] | None]:
    """Return (values, groups) of what `packed` or `packed_areas` made. Raises UserError for anything else."""
    try:
        shape = tuple(entry["shape"])
        if entry["kind"] == "bool":
            found = np.unpackbits(_numbers(entry["data"], "u1"), count=int(np.prod(shape))).astype(bool)
        else:
            found = _numbers(entry["data"], {"areas": "<i4", "float32": "<f4"}[entry["kind"]])
        values = torch.from_numpy(found.reshape(shape).astype(found.dtype.newbyteorder("=")))
        groups = (
            torch.from_numpy(_numbers(entry["groups"], "<i4").astype(np.int64)) if "groups" in entry else None
        )
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise UserError(f"the scores of a result are damaged ({error}): evaluate again") from error
    return (values.long() if entry["kind"] == "areas" else values), groups


def difference(a: Result, b: Result, metric: str) -> Difference | None:
    """Return how much higher `metric` is in `b` than in `a`, which measured the same rows of the same test
    set.

    None where that cannot be said: one of them kept no score of each row (results of earlier versions, other
    metrics), or their test sets or rows differ, or are not known to be the same, or the two declare
    the metric in different units or directions.
    """
    first, second, test = a.scores.get(metric), b.scores.get(metric), _test_set(a)
    if first is None or second is None or test is None or test != _test_set(b):
        return None
    same = ("kind", "rows", "shape", "absent", "groups")
    if any(first.get(name) != second.get(name) for name in same):
        return None
    (x, groups), (y, _) = unpacked(first), unpacked(second)
    alike = torch.equal(x, y)
    if first["kind"] == "areas":
        return Difference(*paired_iou(list(x), list(y), first["absent"]), alike=alike)
    mine, theirs = a.metric(metric), b.metric(metric)
    if (mine.unit, mine.better) != (theirs.unit, theirs.better):
        return None
    size = 100 if first["kind"] == "bool" or mine.unit == "%" else 1  # what is right or wrong is in percent
    return Difference(*(size * part for part in paired_interval(x, y, groups)), alike=alike)


def _test_set(result: Result) -> Any:
    test = result.data.get("test")
    return test.get("fingerprint") if isinstance(test, dict) else None
