"""The section of a report on heads: numbers on the way, mistakes, curves, classes, and answers."""

from dataclasses import replace
from pathlib import Path

import pytest

from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.stored import store
from foveola.reports.answers import answers_section, is_task
from foveola.reports.findings import Findings
from foveola.reports.progress import MeasuredRun
from foveola.reports.record import read_runs
from foveola.reports.request import Data, ReportConfig
from foveola.training.finetune import finetune
from tests.tasks.conftest import SMALL, colored


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has not learned, and makes mistakes, measured on the way."""
    folder = tmp_path_factory.mktemp("report")
    train = f"folder:{colored(folder / 'train', 3, ('<b>', 'green', 'red'))}"
    test = f"folder:{colored(folder / 'test', 3, ('<b>', 'green', 'red'), seed=1)}"
    still = {"lr": {"value": 1e-9, "end": 0.0}}  # it learns three colours in a step
    settings = SMALL | {
        "duration": "2 steps",
        "optimizer": still,
        "evaluations": {"test": {"every": "1 steps"}},
    }
    finetune("classify-small", data=train, test=test, out=str(folder / "run"), **settings)
    return folder / "run"


def section(run: Path, **settings: object) -> str:
    record = read_runs([run])[0]
    found = Findings(record, Data(), MeasuredRun(), [])
    assert is_task(record)
    return answers_section([found], ReportConfig(**settings))


def test_numbers_mistakes_and_answers(run: Path):
    result = evaluate(
        str(run), "classify", test=str(read_runs([run])[0].get("evaluations.test.test")), workers=0
    )
    text = section(run, images=2)
    assert f"{result.metrics['top1']:.2f} (step 2)" in text
    assert "Most frequent mistakes" in text
    right, said, count = result.data["test"]["confusions"][0]
    escaped = [name.replace("<b>", "&lt;b&gt;") for name in (right, said)]
    assert f">{escaped[0]}</th><td>{escaped[1]}</td><td>{count}</td>" in text
    assert "<b>," not in text
    assert text.count("data:image/") == 4  # two of the worst, two of the best


def test_curves_of_detectors_and_classes_of_segmenters(run: Path):
    result = evaluate(
        str(run), "classify", test=str(read_runs([run])[0].get("evaluations.test.test")), workers=0
    )
    curves = {"boxes": {"IoU 0.5": [1.0, 0.5, 0.0], "all": [0.5, 0.2, 0.0]}}
    store(replace(result, protocol="detect", grid={"precision": curves}), run)
    store(
        replace(result, protocol="segment", data={"class_iou": {"road": 80.5, "pole": 3.25, "car": None}}),
        run,
    )
    text = section(run, images=0)
    assert "Precision of boxes" in text
    assert "<svg" in text
    assert text.index("pole") < text.index("road")
    assert "3.25" in text
    assert "car" not in text.replace("card", "")


def test_a_run_without_a_head_has_no_such_section(run: Path, tmp_path: Path):
    record = read_runs([run])[0]
    for file in (run / "encoder").glob("head.*"):
        file.rename(tmp_path / file.name)
    try:
        assert not is_task(record)
        assert answers_section([Findings(record, Data(), MeasuredRun(), [])], ReportConfig()) == ""
    finally:
        for file in tmp_path.glob("head.*"):
            file.rename(run / "encoder" / file.name)
