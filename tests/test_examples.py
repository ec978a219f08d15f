"""The notebooks run from the first cell to the last, on built-in data, and are kept without outputs."""

import ast
import json
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert {path.stem for path in EXAMPLES} == {"own_images", "embed_and_search", "read_results"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    book = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for number, cell in enumerate(book["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        tree = ast.parse("".join(cell["source"]), f"{path.name}, cell {number}")
        exec(compile(tree, f"{path.name}, cell {number}", "exec"), names)
