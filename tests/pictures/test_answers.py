"""What is said of two numbers and their intervals."""

import pytest

from foveola.evaluation.result import Result
from foveola.pictures.answers import Number, changes, charts, compared, label, main_metrics, shown, summary
from foveola.pictures.progress import Point, Progress


def result(protocol: str, **metrics: float) -> Result:
    return Result(protocol, {}, metrics, {}, "", {}, "", 0.0)


def with_interval(name: str, value: float, half: float = 1.0) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def progress(before: dict[str, float], after: dict[str, float], protocol: str = "knn") -> Progress:
    return Progress(
        (
            Point("untrained", 0, {protocol: result(protocol, **before)}),
            Point("step 5", 5, {protocol: result(protocol, **after)}),
            Point("end", 10, {protocol: result(protocol, **after)}),
            Point("timm:other", None, {protocol: result(protocol, **before)}),
        )
    )


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        ((5, 4, 6), (9, 8, 10), "better"),
        ((5, 4, 6), (7, 6, 8), "open"),  # they touch
        ((5, 4, 6), (3, 2, 3.9), "worse"),
        ((5, 4, 6), (5.5, 0, 9), "open"),
        ((5, None, None), (50, 49, 51), "open"),
    ],
)
def test_intervals_decide(before: tuple, after: tuple, outcome: str) -> None:
    assert compared(Number(*map(_float, before)), Number(*map(_float, after))) == outcome


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def test_a_sentence_has_both_numbers_their_intervals_and_what_follows() -> None:
    (change,) = changes(progress(with_interval("top1_plain", 5), with_interval("top1_plain", 12.34)))
    assert change.sentence() == (
        "k-NN top-1 (whole picture): 5.00 [4.00, 6.00] % untrained, 12.3 [11.3, 13.3] % after training. "
        "The intervals do not overlap: training helped."
    )


def test_only_what_is_better_when_higher_and_has_an_interval_is_an_answer() -> None:
    metrics = {
        "best_k_plain": 10.0,
        "top5_plain": 20.0,
        **with_interval("top1_plain", 5),
        **with_interval("alignment", 1),
    }
    assert main_metrics(progress(metrics, metrics)) == [("knn", "top1_plain")]
    assert changes(Progress()) == []


def test_the_summary_counts() -> None:
    def say(*pairs: tuple[float, float]) -> tuple[str, str]:
        before, after = {}, {}
        for number, (a, b) in enumerate(pairs):
            before |= with_interval(f"top1_{number}", a)
            after |= with_interval(f"top1_{number}", b)
        return summary(changes(progress(before, after)))

    assert say((5, 9)) == ("HELPED", "Training helped: k-NN top-1 (0) rose from 5.00 % to 9.00 %.")
    state, text = say((5, 9), (5, 5))
    assert (state, text.startswith("Training helped in 1 of 2 measurements")) == ("HELPED", True)
    assert say((9, 5))[0] == "WORSE"
    assert say((9, 5), (5, 9))[0] == "MIXED"
    state, text = say((5, 5), (5, 6))
    assert state == "OPEN"
    assert "overlap, as in all 2" in text
    assert say()[0] == "OPEN"


def test_charts_run_over_steps_and_have_other_encoders_as_levels() -> None:
    one = progress(with_interval("top1_plain", 5), with_interval("top1_plain", 9))
    (chart,) = charts(["a", "b"], [one, one])
    assert [(line.name, line.x, line.y) for line in chart.lines] == [
        ("a", [0, 5, 10], [5, 9, 9]),
        ("b", [0, 5, 10], [5, 9, 9]),
    ]
    assert chart.lines[0].low == [4, 8, 8]
    assert chart.levels == {"timm:other": 5}


def test_words() -> None:
    assert label("knn", "top1_masks") == "k-NN top-1 (object masks)"
    assert label("retrieval", "recall5_plain") == "same-object retrieval recall@5 (whole picture)"
    assert label("label_free", "rank1_views").startswith("picture found again")
    assert label("label_free", "chance_rank1_views") == "label-free: chance rank-1 views"
    assert [shown(v) for v in (12.345, 1.234, 0.0123, 0.0, -20.0)] == [
        "12.3",
        "1.23",
        "0.012",
        "0.00",
        "-20.0",
    ]
