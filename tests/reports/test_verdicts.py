"""What is said of two numbers and their intervals."""

import dataclasses

import pytest
import torch

from foveola.evaluation.compare import Comparison
from foveola.evaluation.metrics import tango
from foveola.evaluation.paired import Difference, packed
from foveola.evaluation.protocol import Metric
from foveola.evaluation.result import Result
from foveola.reports.progress import MeasuredRun, MeasuredStep
from foveola.reports.verdicts import (
    Number,
    chance,
    changes,
    compared,
    in_short,
    label,
    main_metrics,
    measure_charts,
    number_text,
    over_seeds,
)


def result(protocol: str, **metrics: float) -> Result:
    return Result(protocol, {}, metrics, {}, "", {}, "", 0.0)


def with_interval(name: str, value: float, half: float = 1.0) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def progress(before: dict[str, float], after: dict[str, float], protocol: str = "knn") -> MeasuredRun:
    return MeasuredRun(
        (
            MeasuredStep("untrained", 0, {protocol: result(protocol, **before)}),
            MeasuredStep("step 5", 5, {protocol: result(protocol, **after)}),
            MeasuredStep("end", 10, {protocol: result(protocol, **after)}),
            MeasuredStep("timm:other", None, {protocol: result(protocol, **before)}),
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


def scored(right: int, of: int, wrong_first: bool = False) -> dict:
    """top1_plain of so many hits among rows, the first or the last of them, with the score of each row."""
    hits = torch.zeros(of, dtype=torch.bool)
    hits[of - right :] = True
    hits = hits if wrong_first else hits.flip(0)
    metrics = with_interval("top1_plain", 100 * right / of, 6.0)
    data = {"test": {"fingerprint": "t", "rows": of}}
    return {"metrics": metrics, "data": data, "scores": {"top1_plain": packed(hits, torch.arange(of))}}


def of_scores(before: dict, after: dict, classes: int | None = 10, **settings: object) -> MeasuredRun:
    empty = result("knn", x=0.0)
    points = tuple(
        MeasuredStep(label, step, {"knn": dataclasses.replace(empty, settings=settings, **parts)})
        for label, step, parts in (("untrained", 0, before), ("end", 10, after))
    )
    return MeasuredRun(points, settings={"knn": settings}, classes=classes)


def test_the_change_on_the_same_images_decides_and_not_two_intervals() -> None:
    """55 -> 42 of 200, and no hit gained: two intervals of +- 6 points overlap, and yet it is clear."""
    (change,) = changes(of_scores(scored(55, 200), scored(42, 200)))
    assert compared(change.before, change.after) == "open"
    low, high = (100 * end for end in tango(0, 13, 200))
    assert change.outcome == "worse"
    assert change.sentence() == (
        "k-NN top-1 went from 27.5 % untrained to 21.0 % after training (chance 10.0 %); the change on the "
        f"same 200 test images is -6.5 points, 95 % interval {low:+.1f} to {high:+.1f}: training made it "
        "worse."
    )
    # As many hits gained as another 42 lost: the same numbers, and nothing that could be told.
    (change,) = changes(of_scores(scored(55, 200), scored(42, 200, wrong_first=True)))
    low, high = (100 * end for end in tango(42, 55, 200))
    assert low < 0 < high
    assert change.outcome == "open"
    assert change.certainty().endswith(f"too few to tell changes below about {(high - low) / 2:.1f} points")
    state, text = in_short([change])
    assert (state, text.partition(":")[0]) == ("OPEN", "Too few images to tell whether training helped")


def test_a_number_that_is_no_share_has_digits_of_its_own() -> None:
    """0.30 to 0.27 nats, of which lower is better: -0.0 would say nothing, and nothing sure."""
    of = torch.linspace(0.2, 0.4, 400)
    described = (Metric("entropy", "entropy", "lower", unit="nats", main=True, digits=4),)
    points = tuple(
        MeasuredStep(
            name,
            step,
            {
                "own": dataclasses.replace(
                    result("own", **with_interval("entropy", float(of.mean()) - less, 0.01)),
                    described=described,
                    data={"test": {"fingerprint": "t", "rows": 400}},
                    scores={"entropy": packed(of - less, torch.arange(400))},
                )
            },
        )
        for name, step, less in (("untrained", 0, 0.0), ("end", 10, 0.03))
    )
    (change,) = changes(MeasuredRun(points))
    assert change.sentence() == (
        "entropy went from 0.30 nats untrained to 0.27 nats after training; the change on the same 400 test "
        "images is -0.030 nats, 95 % interval -0.030 to -0.030: training helped."
    )
    (over,) = over_seeds([[change], [change]])
    assert "from 0.30 ± 0.00 nats to 0.27 ± 0.00 nats, a change of -0.030 ± 0.000 nats" in over.sentence()
    first, second = (point.results["own"] for point in points)
    table = Comparison("own", ("a", "b"), (first, second)).table()
    assert "0.3000" in table
    assert "0.2700*" in table
    assert "-0.0300 [-0.0300, -0.0300]" in table


def test_training_that_moves_no_score_is_not_a_lack_of_images() -> None:
    (change,) = changes(of_scores(scored(55, 200), scored(55, 200)))
    same = dataclasses.replace(change, difference=Difference(0.0, 0.0, 0.0))
    state, text = in_short([same])
    assert state == "OPEN"
    assert text.startswith("Training changed nothing here: k-NN top-1 went from 27.5 % untrained to 27.5 %")
    assert text.endswith("; not one of the same 200 test images is scored differently.")


def test_results_without_scores_are_judged_by_their_intervals() -> None:
    (change,) = changes(progress(with_interval("top1_plain", 5), with_interval("top1_plain", 12.34)))
    assert change.sentence() == (
        "k-NN top-1 went from 5.00 % untrained to 12.3 % after training; the intervals do not overlap: "
        "training helped."
    )


def test_chance_is_noted_or_follows_from_the_classes() -> None:
    noted = result("retrieval", rank1_masks=9.0, chance_rank1=0.1, chance_recall5=0.5)
    assert chance(noted, "rank1_masks", 10) == 0.1
    assert chance(noted, "recall5_plain", 10) == 0.5
    assert chance(result("label_free", rank1_views=9.0, chance_rank1_views=2.0), "rank1_views", None) == 2.0
    assert chance(result("knn", top1_plain=9.0), "top1_plain", 8) == 12.5
    assert chance(result("knn", top5_plain=9.0), "top5_plain", 4) == 100.0
    assert chance(result("knn", top1_plain=9.0), "top1_plain", None) is None
    assert chance(result("knn_segmentation", miou=9.0), "miou", 8) is None


def test_the_main_measure_is_the_first_of_the_order_and_not_the_favourable_one() -> None:
    def both(knn: float, retrieval: float, rows: str) -> dict[str, Result]:
        settings = {"rows": rows}
        metrics = with_interval("top1_plain", knn) | with_interval("top1_masks", knn + 1)
        return {
            "label_free": result("label_free", **with_interval("rank1_views", retrieval)),
            "retrieval": result("retrieval", **with_interval("rank1_masks", retrieval)),
            "knn": dataclasses.replace(result("knn", **metrics), settings=settings),
        }

    for rows, first in (("images", "top1_plain"), ("objects", "top1_masks")):
        points = MeasuredStep("untrained", 0, both(50, 10, rows)), MeasuredStep("end", 9, both(40, 90, rows))
        found = changes(MeasuredRun(points, settings={"knn": {"rows": rows}}))
        assert found[0].metric == first
        assert [change.protocol for change in found] == ["knn", "knn", "retrieval", "label_free"]
        state, text = in_short(found)
        assert state == "WORSE"
        assert text.endswith("Of 3 other measurements: 2 better, 1 worse.")


def test_seeds_are_summed_up() -> None:
    runs = [
        changes(of_scores(scored(before, 200), scored(after, 200)))
        for before, after in ((40, 60), (50, 80), (60, 100))
    ]
    (row,) = over_seeds(runs)
    # Untrained 20, 25, 30 %; trained 30, 40, 50 %; changes 10, 15, 20 points.
    assert (row.before, row.after, row.change) == ((25.0, 5.0), (40.0, 10.0), (15.0, 5.0))
    assert row.state == "HELPED"
    assert "Over 3 seeds k-NN top-1 went from 25.0 ± 5.0 % to 40.0 ± 10.0 % (chance 10.0 %)" in row.sentence()
    worse = changes(of_scores(scored(60, 200), scored(40, 200)))
    assert over_seeds([*runs, worse])[0].state == "OPEN", "one of them says otherwise"
    assert over_seeds(runs[:1]) == []


def test_only_what_is_better_when_higher_and_has_an_interval_is_an_answer() -> None:
    metrics = {
        "best_k_plain": 10.0,
        "top5_plain": 20.0,
        **with_interval("top1_plain", 5),
        **with_interval("alignment", 1),
    }
    assert main_metrics(progress(metrics, metrics)) == [("knn", "top1_plain")]
    assert changes(MeasuredRun()) == []


def test_the_summary_counts() -> None:
    def say(*pairs: tuple[float, float]) -> tuple[str, str]:
        before, after = {}, {}
        for number, (a, b) in enumerate(pairs):
            before |= with_interval(f"top1_{number}", a)
            after |= with_interval(f"top1_{number}", b)
        return in_short(changes(progress(before, after)))

    assert say((5, 9)) == (
        "HELPED",
        "Training helped: k-NN top-1 (0) went from 5.00 % untrained to 9.00 % after training; the intervals "
        "do not overlap.",
    )
    state, text = say((5, 9), (5, 5))
    assert (state, text.endswith("Of 1 other measurement: 1 not clearly different.")) == ("HELPED", True)
    assert say((9, 5))[0] == "WORSE"
    assert say((9, 5), (5, 9))[0] == "WORSE"
    state, text = say((5, 5), (5, 9))
    assert state == "OPEN", "the second is clear, but it is not the main one"
    assert text.startswith("It cannot be told whether training helped")
    assert say()[0] == "OPEN"


def test_charts_run_over_steps_and_have_other_encoders_as_levels() -> None:
    one = progress(with_interval("top1_plain", 5), with_interval("top1_plain", 9))
    (chart,) = measure_charts(["a", "b"], [one, one])
    assert [(line.name, line.x, line.y) for line in chart.lines] == [
        ("a", [0, 5, 10], [5, 9, 9]),
        ("b", [0, 5, 10], [5, 9, 9]),
    ]
    assert chart.lines[0].low == [4, 8, 8]
    assert chart.levels == {"timm:other": 5}


def test_words() -> None:
    assert label(result("knn"), "top1_masks") == "k-NN top-1 (object masks)"
    assert label(result("knn"), "top1_plain_k20") == "k-NN top-1 (whole image k20)"
    assert label(result("knn"), "top1_plain", masks=False) == "k-NN top-1"
    assert label(result("knn"), "best_k_plain", masks=False) == "k-NN: best k"
    assert label(result("retrieval"), "recall5_plain") == "same-object retrieval recall@5 (whole image)"
    assert label(result("label_free"), "rank1_views").startswith("image found again")
    assert label(result("label_free"), "chance_rank1_views") == "label-free: chance rank-1 views"
    assert [number_text(v) for v in (12.345, 1.234, 0.0123, 0.0, -20.0)] == [
        "12.3",
        "1.23",
        "0.012",
        "0.00",
        "-20.0",
    ]
