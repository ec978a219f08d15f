"""Charts hold what was logged, once, and long runs are thinned without hiding spikes."""

import math
from pathlib import Path

import pytest

from foveola.drawing.plots import Chart
from foveola.reports.curves import MOST_POINTS, curves
from foveola.reports.record import LoggedStep, Record

HEADS = {
    "method": {"heads": {"main": {"prototypes": 8}}, "token": {"head": "main"}, "patch": {"head": "main"}}
}


def record(name: str, lines: list[LoggedStep], **config: object) -> Record:
    return Record(Path(name), name, {"batch_size": 4, **HEADS, **config}, lines, [])


def lines(count: int = 3, **values: float) -> list[LoggedStep]:
    return [{"step": 10.0 * (i + 1), "epoch": 1.0, "seconds": 2.0, **values} for i in range(count)]


def charts(*records: Record) -> dict[str, Chart]:
    return {chart.title: chart for group in curves(records) for chart in group.charts}


def test_every_metric_is_in_one_chart() -> None:
    names = {
        "loss", "loss/token", "loss/patch", "lr", "weight_decay", "momentum", "token/target_entropy",
        "patch/target_entropy", "token/prototypes_used", "feature_spread", "effective_rank", "grad_norm",
        "images_per_second", "data_wait", "bad_images", "knn/top1", "targets/std", "something/new", "odd",
    }  # fmt: skip
    for many in (1, 2):
        runs = [
            record(f"run {i}", lines(**{name: float(k) for k, name in enumerate(sorted(names))}))
            for i in range(many)
        ]
        drawn = [line for group in curves(runs) for chart in group.charts for line in chart.lines]
        assert len(drawn) == many * len(names)
    groups = curves([record("a", lines(odd=1.0))])
    assert [(group.title, group.folded) for group in groups] == [("Everything else that was logged", True)]
    assert curves([record("a", [])]) == []


def test_terms_share_axes_in_one_run_and_runs_share_axes_otherwise() -> None:
    one = record("a", lines(**{"loss/token": 1.0, "loss/patch": 2.0}))
    assert [line.name for line in charts(one)["Terms of the loss"].lines] == ["patch", "token"]
    two = record("b", lines(**{"loss/token": 3.0}))
    both = charts(one, two)
    assert [line.name for line in both["loss/token"].lines] == ["a", "b"]
    assert [(line.name, len(line.x)) for line in both["loss/patch"].lines] == [("a", 3), ("b", 0)]


def test_entropy_is_a_share_of_log_k() -> None:
    found = charts(
        record("a", lines(**{"token/target_entropy": math.log(8) / 2, "patch/target_entropy": math.log(8)}))
    )
    patch, token = found["Target entropy"].lines
    assert list(token.y) == pytest.approx([0.5] * 3)
    assert list(patch.y) == pytest.approx([1.0] * 3)
    assert set(found["Target entropy"].levels.values()) == {0.9, 0.01}
    unknown = record("b", lines(**{"x/target_entropy": 1.5}))
    assert list(charts(unknown)["x/target_entropy"].lines[0].y) == [1.5] * 3


def test_runs_of_different_batches_are_drawn_over_images() -> None:
    a, b = record("a", lines(loss=1.0)), record("b", lines(loss=1.0), batch_size=8)
    chart = charts(a, b)["Loss (sum of its terms)"]
    assert chart.x == "images seen"
    assert list(chart.lines[0].x) == [40, 80, 120]
    assert list(chart.lines[1].x) == [80, 160, 240]
    assert charts(a)["Loss (sum of its terms)"].x == "step"


def test_long_runs_are_thinned_and_spikes_stay() -> None:
    values = [1.0] * 1000
    values[500] = 9.0
    run = record("a", [{"step": float(i), "loss": v} for i, v in enumerate(values)])
    line = charts(run)["Loss (sum of its terms)"].lines[0]
    assert len(line.x) <= MOST_POINTS
    assert line.low is not None
    assert line.high is not None
    assert max(line.high) == 9
    assert min(line.low) == 1
    assert sum(line.y) / len(line.y) == pytest.approx(1.008)


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    run = record("a", [{"step": 1.0, "loss": 1.0}, {"step": 2.0, "loss": None}, {"step": 3.0, "loss": 2.0}])
    y = charts(run)["Loss (sum of its terms)"].lines[0].y
    assert math.isnan(y[1])
    assert [y[0], y[2]] == [1, 2]
