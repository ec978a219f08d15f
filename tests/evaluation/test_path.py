"""ARCHITECTURE.md says which files an image passes on its way to a number: those that run."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveola import evaluation
from foveola.evaluation.evaluate import evaluate

ROOM = Path(evaluation.__file__).parent
PAGE = Path(__file__).resolve().parents[2] / "ARCHITECTURE.md"


def named(text: str) -> list[str]:
    return re.findall(r"`([\w/]+\.py)`", text)


def section() -> tuple[dict[str, list[str]], set[str]]:
    """The files on the way of each protocol, and those beside it."""
    text = PAGE.read_text(encoding="utf-8").split("## From the command to a number\n")[1].split("\n## ")[0]
    ways, beside = text.split("No number depends on")
    found = re.findall(r"^- `(\w+)`: (.*?)\n(?=\n|- )", ways, re.MULTILINE | re.DOTALL)
    return {name: named(files) for name, files in found}, set(named(beside))


def files_that_run(call: Callable[[], Any]) -> set[str]:
    """The files of `evaluation` of which a function runs."""
    seen = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            seen.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    paths = [Path(file) for file in seen]
    return {path.relative_to(ROOM).as_posix() for path in paths if path.is_relative_to(ROOM)}


@pytest.mark.parametrize(
    ("name", "settings", "most"), [("knn", {"k": (3,)}, 6), ("linear", {"iterations": 2, "lr": (0.1,)}, 9)]
)
def test_the_way_to_a_number_is_the_one_on_the_page(name, settings, most, encoder, shades, tmp_path):
    ways, beside = section()

    data = {"train": shades(0, 12), "test": shades(100, 6), "out": tmp_path}

    def measure() -> None:
        evaluate(encoder, name, **data, workers=0, progress=False, **settings)

    measure()  # what is imported or cached at first is no part of it
    run = files_that_run(measure)
    assert set(ways[name]) <= run
    assert run - set(ways[name]) <= beside
    assert len(ways[name]) <= most
