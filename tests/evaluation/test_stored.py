"""Where results are kept: one that was measured otherwise is never lost, and the right pair is compared."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from foveola import cli
from foveola.config import UserError
from foveola.evaluation.compare import compare
from foveola.evaluation.result import Result
from foveola.evaluation.stored import results_of, store
from foveola.model_names import home_of

DATA = {
    which: {"name": f"{which}:", "fingerprint": which, "images": 9, "rows": 9, "unreadable": 0}
    for which in ("train", "test")
}
FULL = Result(
    "knn", {"k": [10, 20], "limit": None, "workers": 2}, {"top1": 50.0}, DATA, "e", {}, "2026-01-01", 1
)


def measured(top1: float, day: int, **changes: Any) -> Result:
    settings = FULL.settings | {k: v for k, v in changes.items() if k in FULL.settings}
    others = {k: v for k, v in changes.items() if k not in FULL.settings}
    return dataclasses.replace(
        FULL, settings=settings, metrics={"top1": top1}, date=f"2026-01-{day:02}", **others
    )


def shares(folder: Path) -> list[float]:
    return [stored.result.metrics["top1"] for stored in results_of(folder)[0]]


def test_other_settings_and_other_data_are_kept_and_the_same_are_replaced(tmp_path: Path) -> None:
    plain = tmp_path / "results" / "knn.json"
    assert store(measured(50, 1), tmp_path).written == f"written to {plain}"
    quick = store(measured(20, 2, k=[5]), tmp_path)
    (kept,) = plain.parent.glob("knn-*.json")
    assert quick.written == (
        f"written to {plain}; the one before was measured differently (k = [10, 20] and [5]) "
        f"and is kept in {kept.name}"
    )
    assert (Result.read(plain).metrics["top1"], Result.read(kept).metrics["top1"]) == (20, 50)
    assert "written" not in json.loads(plain.read_text())
    other = {**DATA, "test": DATA["test"] | {"fingerprint": "else"}}
    store(measured(30, 3, data=other), tmp_path)
    assert shares(tmp_path) == [30, 20, 50]
    store(measured(51, 4, workers=0), tmp_path)  # speed is no setting: this is the first one again
    assert shares(tmp_path) == [51, 30, 20]
    assert store(measured(52, 5), tmp_path).written == f"written to {plain}"
    assert shares(tmp_path) == [52, 30, 20]
    assert "in place of that of another encoder" in store(measured(9, 6, encoder="f"), tmp_path).written
    assert shares(tmp_path) == [9, 30, 20]


def test_what_is_kept_beside_a_result_goes_with_it(tmp_path: Path) -> None:
    """The detections of `detect`: they move with an earlier result, and are replaced with it."""
    results = tmp_path / "results"

    def kept(place: Path) -> Any:
        return json.loads((place / "found.json").read_text())

    store(measured(50, 1, beside={"found.json": [1]}), tmp_path)
    assert kept(results / "knn") == [1]
    assert "beside" not in json.loads((results / "knn.json").read_text())
    store(measured(20, 2, k=[5], beside={"found.json": [2]}), tmp_path)
    (earlier,) = (path for path in results.glob("knn-*") if path.is_dir())
    assert (kept(results / "knn"), kept(earlier)) == ([2], [1])
    assert earlier.with_suffix(".json").is_file()
    store(measured(51, 3, beside={"found.json": [3]}), tmp_path)
    assert kept(results / "knn") == [3]
    assert not earlier.exists()
    assert shares(tmp_path) == [51, 20]


def test_copies_under_names_of_ones_own_are_left_alone(tmp_path: Path) -> None:
    plain = tmp_path / "results" / "knn.json"
    store(measured(50, 1), tmp_path)
    (plain.parent / "knn-before.json").write_bytes(plain.read_bytes())
    store(measured(60, 2, encoder="f"), tmp_path)
    assert Result.read(plain.parent / "knn-before.json").metrics["top1"] == 50


def test_a_file_that_cannot_be_read_is_kept(tmp_path: Path) -> None:
    plain = tmp_path / "results" / "knn.json"
    plain.parent.mkdir()
    plain.write_text('{"protocol": "knn", "of": "the future"}')
    written = store(measured(50, 1), tmp_path).written
    (kept,) = plain.parent.glob("knn-*.json")
    assert written.endswith(f"cannot be read and is kept in {kept.name}")
    assert "of the future" not in plain.read_text()
    assert "the future" in kept.read_text()
    found, broken = results_of(tmp_path)
    assert [stored.path for stored in found] == [plain]
    assert len(broken) == 1
    assert str(kept) in broken[0]


def test_compare_takes_the_pair_that_was_measured_alike(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    store(measured(50, 1), a)
    store(measured(20, 2, k=[5]), a)  # a trial: the file of the full one has another name now
    store(measured(60, 3), b)
    (only,) = compare([a, b])
    assert [result.metrics["top1"] for result in only.results] == [50, 60]
    assert only.notes == (
        "note: a has a newer result that others lack (k = [10, 20] and [5]): "
        + str(a / "results" / "knn.json"),
    )
    store(measured(70, 4, k=[5]), b)
    (only,) = compare([a, b])
    assert [result.metrics["top1"] for result in only.results] == [20, 70], "the newest that both have"
    (kept,) = (a / "results").glob("knn-*.json")
    assert len(only.notes) == 1
    assert "k = [5] and [10, 20]" in only.notes[0]
    assert str(kept) in only.notes[0]
    assert only.notes[0] in only.table()
    (chosen,) = compare([kept, b])
    assert [result.metrics["top1"] for result in chosen.results] == [50, 60]
    store(measured(1, 5, k=[7]), tmp_path / "c")
    with pytest.raises(UserError, match=r"knn: a and c were not measured alike: k = \[5\] and \[7\]"):
        compare([a, tmp_path / "c"])


def test_untrained_networks_and_earlier_steps_have_folders_of_their_own(
    encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("runs/mine/encoder", "runs/mine/encoders/step-5"):
        encoder.save(tmp_path / place)
    words = ["train=scenes:?count=30", "test=scenes:?count=9", "rows=objects", "workers=0", "device=cpu"]
    homes = {
        "runs/mine": "runs/mine",
        "untrained:runs/mine": "runs/mine/untrained",
        "runs/mine/encoders/step-5": "runs/mine/encoders/step-5",
    }
    for model, home in homes.items():
        assert home_of(model) == Path(home)
        assert cli.main(["evaluate", "knn", f"model={model}", "k=5", *words]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"written to {home}/results/knn.json"
    assert cli.main(["compare", *homes]) == 0
    head = capsys.readouterr().out.splitlines()[0].split()
    assert head[:4] == ["knn", "mine", "untrained:mine", "step-5"]
    assert head[4:] == ["untrained:mine", "-", "mine", "step-5", "-", "mine"]
    values = [Result.read(Path(home) / "results" / "knn.json") for home in homes.values()]
    assert values[0].metrics == values[2].metrics
    assert values[0].encoder != values[1].encoder
    assert home_of("runs/mine/encoder") is None
    assert cli.main(["evaluate", "knn", "model=runs/mine/encoder", "k=5", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("not written to a file: out=FOLDER")
