"""Run folders that an earlier version wrote: their encoders load, and their runs go on as they would have.

Each `earlier/NAME.tar.xz` is the folder of a run of 4 steps after its second one. `expected.json` holds what
that version logged of the steps after, and what its encoder made of two images.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import foveola
from foveola.config import read_yaml

HERE = Path(__file__).parent / "earlier"
NAMES = sorted(path.name.removesuffix(".tar.xz") for path in HERE.glob("*.tar.xz"))


@pytest.fixture(params=NAMES)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run folder, and what is expected of it."""
    with tarfile.open(HERE / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / request.param
    return folder, json.loads((folder / "expected.json").read_text())


def test_there_is_one_of_every_method():
    assert NAMES == ["capi", "distillation", "ijepa", "mae"]


def test_its_encoder_loads(earlier: tuple[Path, dict[str, Any]]):
    folder, expected = earlier
    images = torch.linspace(0, 40, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)
    features = foveola.load(folder)(images)
    assert features.objects.flatten().tolist() == pytest.approx(expected["objects"], rel=1e-4, abs=1e-5)
    assert features.patches[:, 0].flatten().tolist() == pytest.approx(expected["patches"], rel=1e-4, abs=1e-5)


def test_its_run_goes_on(earlier: tuple[Path, dict[str, Any]], lines: Callable[[Path], list[dict[str, Any]]]):
    """With every parameter, buffer, average of the optimizer and random draw where it was."""
    folder, expected = earlier
    (folder / "expected.json").unlink()
    config = str(folder / "config.yaml")
    assert read_yaml(folder / "config.yaml")["duration"] == "4 steps"
    assert foveola.pretrain(config, out=str(folder)).finished
    logged = lines(folder)
    assert [line["step"] for line in logged] == [3, 4]
    # Steps amplify what another processor rounds otherwise.
    for line, earlier_line, relative in zip(logged, expected["lines"], (1e-4, 1e-2), strict=True):
        assert earlier_line.keys() <= line.keys()
        losses = {name: value for name, value in earlier_line.items() if name.startswith("loss")}
        assert {name: line[name] for name in losses} == pytest.approx(losses, rel=relative)
        assert line["lr"] == earlier_line["lr"]
        assert line.get("momentum") == earlier_line.get("momentum")
