"""Data that are an object of Python: the page's example runs, resumes, is measured; others are refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foveola
from foveola.config import UserError, read_yaml
from foveola.data.sources import as_source

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
TINY: dict[str, Any] = {
    "device": "cpu",
    "duration": "4 steps",
    "batch_size": 16,
    "model": {"width": 32, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 32},
    "views": {"global_size": 32, "local_size": 16, "local_count": 1},
    "loader": {"canvas": 32, "workers": 0},
    "transform": {"resize": 32, "crop": 32},
    "log_every": 1,
    "checkpoint_every": "2 steps",
    "optimizer.lr.warmup": "1 steps",
    "optimizer.freeze_last_layer": "0 steps",
    "method.token.target.temperature.warmup": "0 steps",
    "evaluate_every": "4 steps",
    "evaluate": {"workers": 0, "k": 5},
}


@pytest.fixture(scope="module")
def squares() -> type:
    """The class of docs/data.md, as it stands there."""
    (code,) = re.findall(
        r"```python\n(import numpy.*?class Squares.*?)\n\n\nrun = ", DOCS.read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec"), names)
    return names["Squares"]


def test_the_example_of_the_page_trains_resumes_and_is_measured(squares: type, tmp_path: Path) -> None:
    own = {"data": squares(64, 0), "evaluate_test": squares(20, 1)}
    out = tmp_path / "run"
    run = foveola.pretrain("dino-tiny-tinyimagenet", out=str(out), **own, **TINY)
    assert run.finished
    assert read_yaml(out / "config.yaml")["data"] == "python:squares-64-0"
    # Every line of the log, not the last alone; training and evaluation of one step are one line.
    history = run.history()
    assert run.frame()["step"].tolist() == [line["step"] for line in history]
    assert [line["step"] for line in history] == [1, 2, 3, 4]
    assert all("loss" in line for line in history)
    assert "knn/top1_plain" in history[-1]
    assert "knn/top1_plain" not in history[-2]

    again = foveola.pretrain("dino-tiny-tinyimagenet", out=str(out), **own, **TINY)
    assert again.step == 4
    with pytest.raises(UserError, match="data is 'python:squares-64-0', not 'python:squares-63-0'"):
        foveola.pretrain("dino-tiny-tinyimagenet", out=str(out), **{**own, "data": squares(63, 0)}, **TINY)
    with pytest.raises(UserError, match="python:squares-64-0 was an object of Python"):
        foveola.pretrain(out / "config.yaml", out=str(out))

    result = foveola.evaluate(
        out, "knn", train=squares(64, 0), test=squares(20, 1), k=5, workers=0, progress=False
    )
    assert result.metrics["top1_plain"] == pytest.approx(history[-1]["knn/top1_plain"])
    assert result.data["test"]["name"] == "squares-20-1"


def test_what_is_no_source_is_refused_in_a_line(squares: type) -> None:
    data = squares(8, 0)
    bare = type("Bare", (), {"__len__": lambda self: 3, "__getitem__": lambda self, index: (0, 1)})()
    pairs = type("Pairs", (squares,), {"__getitem__": lambda self, index: (np.zeros((9, 9, 3)), 1)})(3, 0)
    for train, message in (
        (
            bare,
            "train: expected a data string or a source, got a Bare, which has no name, classes, has_objects",
        ),
        (pairs, r"train: squares-3-0\[0\] is a tuple, expected a foveola.Sample"),
        (squares(0, 0), "train: squares-0-0 is empty"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            as_source(train, "train", "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="data: expected a data string or a source, got a Bare"):
        foveola.pretrain("dino-tiny-tinyimagenet", data=bare)
    with pytest.raises(UserError, match="test: squares-0-0 is empty"):
        foveola.evaluate("nowhere", "knn", train=data, test=squares(0, 0))


def test_the_names_of_the_package_are_there_and_configurations_can_be_read() -> None:
    for name in foveola.__all__:
        assert getattr(foveola, name) is not None
    assert "odis-vits16-in1k" in foveola.recipes()
    from foveola.training.recipe import resolve

    lines = repr(resolve("demo")).splitlines()
    assert lines[0] == "RunConfig:"
    assert "batch_size: 64" in lines
