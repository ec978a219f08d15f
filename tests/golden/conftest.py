"""Kept numbers: what this version computes, to be seen to change only for a reason.

`FOVEOLA_GOLDEN=write python -m pytest tests/golden -k NAME` writes the file of a test anew. A number changes
only in a commit that says which one and why; a refactoring changes none.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WRITE = os.environ.get("FOVEOLA_GOLDEN") == "write"
FOLDER = Path(__file__).parent
RELATIVE = 1e-5  # of float32 on another processor, where sums are taken in another order


def compare(found: Any, kept: Any, where: str, relative: float) -> None:
    """Assert that two trees of numbers and texts are the same, floats but for rounding."""
    if isinstance(kept, dict):
        assert isinstance(found, dict), where
        assert found.keys() == kept.keys(), where
        for name, value in kept.items():
            compare(found[name], value, f"{where}.{name}", relative)
    elif isinstance(kept, list):
        assert isinstance(found, list), where
        assert len(found) == len(kept), where
        for index, value in enumerate(kept):
            compare(found[index], value, f"{where}[{index}]", relative)
    elif isinstance(kept, float):
        assert found == pytest.approx(kept, rel=relative, abs=1e-7), where
    else:
        assert found == kept, where


@pytest.fixture
def golden() -> Callable[..., None]:
    """golden(name, values, relative=1e-5): values are those kept in `name`.json beside the tests."""

    def check(name: str, values: Any, relative: float = RELATIVE) -> None:
        path = FOLDER / f"{name}.json"
        values = json.loads(json.dumps(values))
        if WRITE:
            path.write_text(json.dumps(values, indent=1) + "\n")
        assert path.is_file(), f"no kept numbers at {path}"
        compare(values, json.loads(path.read_text()), name, relative)

    return check
