"""A protocol from outside, as docs/extend.md shows it: by importable name, by entry point, as an object."""

import importlib
import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import foveola
from foveola import Outcome, outside
from foveola.cli import main
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.evaluation.classification.knn import KnnConfig
from foveola.evaluation.compare import compare
from foveola.evaluation.evaluate import evaluate, evaluate_all
from foveola.evaluation.features.table import ExtractConfig, extract
from foveola.evaluation.paired import difference, packed
from foveola.evaluation.protocol import Metric, declared, find_protocol
from foveola.evaluation.result import Result
from foveola.evaluation.stored import differences
from foveola.reports.progress import MeasuredRun, MeasuredStep
from foveola.reports.verdicts import changes

DATA = {"train": "scenes:?count=40", "test": "scenes:?count=15"}
QUIET = {"workers": 0, "progress": False}


@pytest.fixture
def module(example_of_docs) -> ModuleType:
    """The code of docs/extend.md as a module that Python finds."""
    folder = example_of_docs("Centroids", "centroids_of_docs")
    (folder / "broken_of_docs.py").write_text("1 / 0\n")
    return importlib.import_module("centroids_of_docs")


def test_the_example_of_the_page_is_right_and_shares_a_pass(module, encoder, tmp_path: Path) -> None:
    pool = encoder.pooled("average")
    config = ExtractConfig(workers=0)
    train, test = (
        extract(pool, open_source(DATA[split], split), masks=False, config=config, progress=False)
        for split in ("train", "test")
    )
    means = {
        c: train.features[train.labels == c].double().mean(dim=0) for c in train.labels.unique().tolist()
    }
    right, own = [], []
    for x, label in zip(test.features.double(), test.labels.tolist(), strict=True):
        distances = {c: float((x - mean).square().sum().sqrt()) for c, mean in means.items()}
        right.append(min(distances, key=distances.__getitem__) == label)
        own.append(distances[label])
    alone = evaluate(encoder, module.Centroids(), **DATA, **QUIET)
    assert alone.metrics["top1"] == pytest.approx(100 * sum(right) / len(right))
    assert alone.metrics["distance"] == pytest.approx(sum(own) / len(own), rel=1e-4)
    names = ("logistic", "centroids_of_docs:Centroids")
    both = evaluate_all(encoder, names, **DATA, **QUIET, values=2, logistic={"features": "average"})
    assert both["centroids"].metrics == pytest.approx(alone.metrics)
    assert "pass_seconds" in both["centroids"].data["test"]
    alone.save(tmp_path)
    read = Result.read(tmp_path / "results" / "centroids.json")
    assert read == alone
    assert read.metric("distance") == module.Centroids.metrics[1]


def test_the_command_line_knows_it(module, encoder, tmp_path: Path, capsys, monkeypatch) -> None:
    encoder.save(tmp_path / "run" / "encoder")
    name, words = "centroids_of_docs:Centroids", [f"{key}={value}" for key, value in DATA.items()]
    words += [f"model={tmp_path / 'run'}", "workers=0"]
    assert main(["evaluate", name, "--help"]) == 0
    assert "the vector of an image: average, token" in capsys.readouterr().out
    assert main(["evaluate", name, *words, "centroids.features=token", "limit=39"]) == 0
    assert Result.read(tmp_path / "run" / "results" / "centroids.json").settings["features"] == "token"
    capsys.readouterr()
    for mistake, message in (
        ([name, *words, "featurs=token"], "did you mean 'features'?"),
        (["centroids", *words], "unknown protocol 'centroids'"),
        (["centroids_of_docs:Centroid", *words], "has no 'Centroid'; did you mean 'Centroids'?"),
        (["no_such_module:Centroids", *words], "there is no module 'no_such_module'; PYTHONPATH=."),
        (["broken_of_docs:Centroids", *words], "fails when imported: ZeroDivisionError"),
        (["centroids_of_docs:CentroidsConfig", *words], "is no protocol"),
        ([f"{name},{name}", *words], "expected different protocols"),
        ([name, *words, "limit=3"], "every class needs a training image"),
    ):
        assert main(["evaluate", *mistake]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    entry = EntryPoint("centroids", "centroids_of_docs:Centroids", "foveola.protocols")
    monkeypatch.setattr(outside, "entry_points", lambda group: [entry] * (group == entry.group))
    assert main(["evaluate", "--help"]) == 0
    assert f"centroids  {module.Centroids.help}" in re.sub("  +", "  ", capsys.readouterr().out)
    assert type(find_protocol("centroids")) is module.Centroids


def test_a_contract_that_is_not_kept_is_refused(module, encoder) -> None:
    for changes_of, message in (
        ({"name": "knn"}, "'knn' is a protocol of foveola"),
        ({"name": "../up"}, "letters, digits"),
        ({"Config": dict}, "a dataclass as Config"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(encoder, type("Other", (module.Centroids,), changes_of), **DATA, **QUIET)


def test_a_number_that_is_none_is_refused_before_it_is_written(module, encoder, tmp_path: Path) -> None:
    class Broken(module.Centroids):
        name = "broken"

        def measure(self, at, config):
            return foveola.Outcome({"top1": 1.0, "distance": float("nan")}, {})

    with pytest.raises(UserError, match="broken: distance is nan, not a finite number"):
        evaluate(encoder, Broken, out=tmp_path, **DATA, **QUIET)
    assert not (tmp_path / "results" / "broken.json").exists()


def test_the_lower_one_is_better_where_a_metric_says_so(module, tmp_path: Path) -> None:
    """Distances 2.5 and 2 of the same 50 images, each 0.5 less: a difference in the metric's own unit."""
    points = []
    for name, size in (("a", 2.5), ("b", 2.0)):
        each = size + torch.linspace(-0.1, 0.1, 50)
        metrics = {"distance": size, "distance_low": size - 0.03, "distance_high": size + 0.03}
        scores = {"distance": packed(each, torch.arange(50))}
        result = Result(
            "centroids", {}, metrics, {"test": {"fingerprint": "t"}}, "", {}, "", 0.0,
            scores=scores, described=module.Centroids.metrics,
        )  # fmt: skip
        result.save(tmp_path / name)
        points.append(result)
    table = compare([tmp_path / "a", tmp_path / "b"])[0].table()
    assert "2.00*" in table
    assert "2.50*" not in table
    assert "-0.50 [-0.50, -0.50]" in table
    assert "* is better than each other one" in table
    ends = (
        MeasuredStep("untrained", 0, {"centroids": points[0]}),
        MeasuredStep("end", 9, {"centroids": points[1]}),
    )
    (change,) = changes(MeasuredRun(ends))
    assert change.outcome == "better"
    assert change.sentence().startswith(
        "distance to the mean of the own class went from 2.50 untrained to 2.00 after training; the change"
    )
    assert "is -0.50, 95 % interval" in change.certainty()


def test_patterns() -> None:
    metrics = (
        Metric("top1_*", "A ({})", "higher", main=True),
        Metric("top1_*_best_on_test", "B ({})"),
        Metric("recall*_*", "recall@{} ({})"),
    )
    assert declared(metrics, "x", "top1_token_best_on_test").label == "B ({})", "most letters of its own"
    assert declared(metrics, "x", "top1_token").main
    assert metrics[2].title("recall5_objects_plain") == "recall@5 (objects whole image)"
    assert metrics[0].title("top1_plain", masks=False) == "A"
    assert declared(metrics, "my_own", "odd_{}").title("odd_{}") == "my own: odd {}"


def test_what_a_protocol_leaves_out_is_made_up_for(encoder) -> None:
    """Data get a name, numbers of other libraries are numbers, declarations are checked."""

    class Mean(foveola.Protocol):
        name, help, Config = "meanp", "a number", KnnConfig
        train = "unused"
        metrics = (Metric("v", "value", "lower", unit=""),)

        def measure(self, at, config):
            scores = {"v": packed(torch.arange(float(len(at.test))), torch.arange(len(at.test)))}
            outcome = Outcome({"v": 0.0}, {"test": {"rows": len(at.test)}}, scores=scores)
            outcome.metrics["v"] = np.float32(len(at.test))
            return outcome

    few, many = (evaluate(encoder, Mean(), test=f"scenes:?count={count}", progress=False) for count in (4, 6))
    assert few.metrics == {"v": 4.0}
    assert type(few.metrics["v"]) is float
    assert few.data["test"]["rows"] == 4
    assert few.data["test"]["fingerprint"] != many.data["test"]["fingerprint"]
    assert differences(few, many)
    assert difference(few, many, "v") is None  # other test sets
    assert difference(few, few, "v") is not None
    other = replace(few, described=(Metric("v", "value", "higher", unit=""),))
    assert difference(few, other, "v") is None  # of which direction?
    single, typo = Metric("v"), Metric("v", better="lower")
    object.__setattr__(typo, "better", "Lower")
    for metrics, message in ((single, "tuple of foveola.Metric"), ((typo,), "Lower")):
        odd = type("Odd", (Mean,), {"metrics": metrics})
        with pytest.raises(UserError, match=message):
            find_protocol(odd())


def test_right_and_wrong_are_in_percent_also_undeclared(encoder) -> None:
    right = torch.tensor([True] * 30 + [False] * 10)
    data = {"test": {"name": "some", "fingerprint": "abc"}}
    result = evaluate(encoder, "label_free", test="scenes:?count=8", workers=0, progress=False)
    one, other = (
        replace(result, protocol="own", described=(), data=data, scores={"t": packed(x, torch.arange(40))})
        for x in (right, ~right)
    )
    found = difference(one, other, "t")
    assert found is not None
    assert found.value == pytest.approx(-50)
