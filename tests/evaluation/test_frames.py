"""Results as tables of pandas."""

import sys

import pandas as pd
import pytest
import torch

from foveola.config import UserError
from foveola.evaluation.compare import Comparison
from foveola.evaluation.paired import difference, packed
from foveola.evaluation.protocol import Metric
from foveola.evaluation.result import Result


def result(hits: list[bool]) -> Result:
    share = 100 * sum(hits) / len(hits)
    return Result(
        protocol="mine",
        settings={},
        metrics={"top1": share, "top1_low": share - 5, "top1_high": share + 5, "rank": 3.5},
        data={"test": {"name": "noise:", "fingerprint": "content:1", "rows": len(hits)}},
        encoder="0" * 16,
        versions={},
        date="",
        seconds=1.0,
        scores={"top1": packed(torch.tensor(hits), torch.arange(len(hits)))},
        described=(Metric("top1", better="higher"), Metric("rank", unit="")),
    )


def test_a_result_has_a_line_for_each_number() -> None:
    frame = result([True, True, False, True]).frame()
    assert isinstance(frame, pd.DataFrame)
    assert frame.metric.tolist() == ["top1", "rank"]
    assert frame.set_index("metric").loc["top1", ["value", "low", "high", "unit", "better"]].tolist() == [
        75.0,
        70.0,
        80.0,
        "%",
        "higher",
    ]
    assert frame.low.isna().tolist() == [False, True]


def test_a_comparison_has_the_paired_differences_from_the_first() -> None:
    first, second = result([True, False, False, True] * 10), result([True, True, False, True] * 10)
    frame = Comparison("mine", ("a", "b"), (first, second)).frame()
    lines = frame[frame.metric == "top1"].set_index("encoder")
    assert lines.value.to_dict() == {"a": 50.0, "b": 75.0}
    change = difference(first, second, "top1")
    assert lines.loc["b", ["difference", "difference_low", "difference_high"]].tolist() == [
        25.0,
        change.low,
        change.high,
    ]
    assert lines.loc[["a"], "difference"].isna().all()


def test_without_pandas_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"Result.frame\(\) needs pandas .*pip install 'foveola\[frames\]'"):
        result([True, False]).frame()
