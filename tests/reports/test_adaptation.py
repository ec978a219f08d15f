"""What is said of a run with starting weights, and which images are shown of it."""

from typing import Any

import numpy as np
import pytest
import torch

from foveola.evaluation.features.table import ExtractConfig, FeatureTable
from foveola.evaluation.result import Result
from foveola.reports import changed
from foveola.reports.adaptation import advise, capital, model_of
from foveola.reports.progress import MeasuredRun, MeasuredStep
from foveola.reports.verdicts import changes


def point(label: str, step: int | None, value: float, metric: str = "top1_plain") -> MeasuredStep:
    """k-NN with an interval of 1 point to either side."""
    numbers = {metric: value, f"{metric}_low": value - 1, f"{metric}_high": value + 1}
    return MeasuredStep(label, step, {"knn": Result("knn", {}, numbers, {}, "", {}, "", 0.0)})


def run(start: float, best: float | None, end: float, metric: str = "top1_plain") -> MeasuredRun:
    points = [point("untrained", None, 9.0, metric), point("start", 0, start, metric)]
    points += [] if best is None else [point("best", 400, best, metric)]
    return MeasuredRun((*points, point("end", 1000, end, metric)), test="mine")


@pytest.mark.parametrize(
    ("yours", "control", "state", "use", "sentence"),
    [
        (
            (61.2, 68.0, 64.0),
            (80.1, 75.0, 70.0),
            "HELPED",
            "best",
            "Use encoders/best (step 400): k-NN top-1 on your images rose from 61.2 to 68.0 %; on the "
            "control set it fell from 80.1 to 75.0 %.",
        ),
        (
            (61.2, None, 68.0),
            (80.1, None, 79.0),
            "HELPED",
            "end",
            "Use the last encoder (step 1,000): k-NN top-1 on your images rose from 61.2 to 68.0 %; on the "
            "control set it did not clearly change (80.1 to 79.0 %).",
        ),
        (
            (61.2, 68.0, 50.0),
            None,
            "HELPED",
            "best",
            "Use encoders/best (step 400): k-NN top-1 on your images rose from 61.2 to 68.0 %; what was "
            "forgotten was not measured. The last encoder is worse than the starting weights: k-NN top-1 "
            "on your images fell from 61.2 to 50.0 %.",
        ),
        (
            (61.2, 61.5, 50.0),
            (80.1, 80.0, 85.0),
            "WORSE",
            "start",
            "Training hurt: keep the starting weights. k-NN top-1 on your images fell from 61.2 to 50.0 %; "
            "on the control set it rose from 80.1 to 85.0 %.",
        ),
        (
            (61.2, None, 61.5),
            None,
            "OPEN",
            "start",
            "Keep the starting weights: no gain is clear. k-NN top-1 on your images did not clearly change "
            "(61.2 to 61.5 %); what was forgotten was not measured.",
        ),
        ((61.2, 66.0, 70.0), (80.0, 80.0, 90.0), "HELPED", "end", None),  # the last is better than the best
    ],
)
def test_one_sentence_says_which_encoder_to_use(yours, control, state, use, sentence):
    found = advise(run(*yours), None if control is None else run(*control))
    assert (found.state, found.use) == (state, use)
    assert sentence in (None, found.sentence)


def test_another_measurement_of_the_control_set_has_its_name():
    sentence = advise(run(1, None, 9), run(80, None, 60, "top1_masks")).sentence
    assert sentence.endswith("; k-NN top-1 (object masks) on the control set fell from 80.0 to 60.0 %.")


def test_the_starting_weights_are_what_changes_begin_with():
    (change,) = changes(run(61.2, 66.0, 68.0))
    assert change.numbers() == "from 61.2 % at the start to 68.0 % after training"
    (change,) = changes(run(61.2, 66.0, 68.0), "best")
    assert change.numbers() == "from 61.2 % at the start to 66.0 % at the best step"
    scratch = MeasuredRun((point("untrained", 0, 9.0), point("end", 10, 68.0)))
    assert scratch.baseline == "untrained"
    assert changes(scratch)[0].numbers() == "from 9.00 % untrained to 68.0 % after training"


def test_nothing_measured_keeps_the_start():
    nothing = MeasuredRun((MeasuredStep("start", 0, {}), MeasuredStep("end", 10, {})))
    assert advise(nothing, None).use == "start"


def test_names_of_the_network_to_use():
    names = [model_of("runs/a", use) for use in ("start", "best", "end")]
    assert names == ["runs/a?step=0", "runs/a?step=best", "runs/a"]
    assert [capital("the change"), capital("k-NN top-1")] == ["The change", "k-NN top-1"]


def test_the_images_whose_neighbours_changed_most_are_those_of_a_loop(monkeypatch):
    rng, count = np.random.default_rng(0), 30
    vectors = {
        (net, source): rng.normal(size=(count if source == "reference" else 8, 4)).astype(np.float32)
        for net in ("start", "end")
        for source in ("reference", "queries")
    }
    vectors["end", "reference"] = vectors["start", "reference"] + 0.7 * vectors["end", "reference"]
    vectors["end", "queries"] = vectors["start", "queries"]
    labels = {"reference": np.arange(count) % 3, "queries": np.arange(8) % 3}
    images = {"reference": np.arange(count), "queries": np.array([5, 5, 6, 7, 8, 8, 8, 9])}

    def extract(net: str, source: str, *, masks: bool, **_: Any) -> FeatureTable:
        assert masks
        n = len(labels[source])
        return FeatureTable(
            torch.from_numpy(vectors[net, source]),
            torch.from_numpy(labels[source]),
            torch.from_numpy(images[source]),
            torch.arange(n),
            torch.ones(n, dtype=torch.bool),
            torch.ones(n),
        )

    def nearest(net: str, row: int) -> list[int]:
        query = vectors[net, "queries"][row]
        cosines = [x @ query / np.linalg.norm(x) for x in vectors[net, "reference"]]
        return sorted(range(count), key=lambda i: -cosines[i])[:10]

    def key(image: int) -> tuple[float, float, int]:
        rows = [r for r in range(8) if images["queries"][r] == image]
        near = [(nearest("start", r), nearest("end", r)) for r in rows]
        stayed = sum(len(set(a) & set(b)) for a, b in near) / len(rows)
        known, asked = labels["reference"], labels["queries"]
        hits = [[known[x[0]] == asked[r] for x in pair] for r, pair in zip(rows, near, strict=True)]
        right = [before == after for before, after in hits]
        return stayed, sum(right) / len(rows), image

    monkeypatch.setattr(changed, "extract", extract)
    most = getattr(
        changed.largest_changes, "__wrapped__", changed.largest_changes
    )  # takes names for networks here
    config = ExtractConfig(rows="objects")
    assert most("start", "end", "reference", "queries", 4, config) == sorted(range(5, 10), key=key)[:4]
