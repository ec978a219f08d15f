"""Results side by side: only those that were measured alike."""

import dataclasses
from pathlib import Path

import pytest
import torch

from foveola.cli import main
from foveola.config import UserError
from foveola.evaluation.compare import compare
from foveola.evaluation.metrics import tango
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import Metric, find_protocol
from foveola.evaluation.result import Result

PLAIN = Result(
    protocol="linear",
    settings={"style": "dinov2", "lr": [0.1], "batch_size": 64, "workers": 2},
    metrics={"top1_linear": 71.25, "top1_linear_low": 69.0, "top1_linear_high": 73.0, "entropy_x": 3.0},
    data={
        "train": {"name": "a:", "fingerprint": "1", "images": 90, "rows": 90, "unreadable": 0},
        "test": {"name": "b:", "fingerprint": "2", "images": 30, "rows": 30, "unreadable": 0},
    },
    encoder="abc",
    versions={"torch": "2.9"},
    date="2026-01-01",
    seconds=3.25,
    chosen={"linear": {"lr": 0.1, "parameters": 1234}},
)


def save(folder: Path, **changes) -> Path:
    dataclasses.replace(PLAIN, **changes).save(folder)
    return folder


def hits(right: int, count: int = 200) -> dict:
    """A score of each of `count` images, the first of which are right."""
    return {"top1_linear": packed(torch.arange(count) < right, torch.arange(count))}


def test_a_line_for_each_metric_and_the_best_marked(tmp_path: Path, capsys) -> None:
    """27.5 and 21 % of 200 images: 13 more are right and none fewer, though the intervals overlap."""
    metrics = {"top1_linear": 21.0, "top1_linear_low": 15.9, "top1_linear_high": 27.2, "entropy_x": 3.0}
    a = save(tmp_path / "a", metrics=metrics, scores=hits(42))
    b = save(
        tmp_path / "b",
        metrics={"top1_linear": 27.5, "entropy_x": 9.0, "best_k": 20.0},
        versions={"torch": "2.15"},
        encoder="def",
        scores=hits(55),
        described=(*find_protocol("linear").metrics, Metric("best_k", unit="", digits=0)),
    )
    (only,) = compare([a, b])
    lines = [line.split() for line in only.table().splitlines()]
    assert lines[0] == ["linear", "a", "b", "second", "-", "first"]
    assert lines[1][:5] == ["top1_linear", "21.00", "[15.9,", "27.2]", "27.50*"]
    low, high = tango(13, 0, 200)
    assert lines[1][5:] == ["+6.50", f"[{100 * low:+.2f},", f"{100 * high:+.2f}]"]
    assert lines[2] == ["entropy_x", "3.00", "9.00"]
    assert lines[3] == ["best_k", "-", "20"]
    assert lines[4] == ["seconds", "3.2", "3.2"]
    assert "* is above each other one by the paired 95 % interval" in " ".join(lines[5])
    assert " ".join(lines[6]) == "note: measured with different versions of torch"
    assert main(["compare", str(a), str(b / "results" / "linear.json")]) == 0
    assert "27.50*" in capsys.readouterr().out


def test_the_best_is_marked_only_where_it_is_above_each_other_one(tmp_path: Path) -> None:
    a, b, c = (
        save(tmp_path / name, metrics={"top1_linear": share}, scores=scores)
        for name, share, scores in (("a", 21.0, hits(42)), ("b", 27.5, hits(55)), ("c", 28.0, hits(56)))
    )
    (three,) = compare([a, b, c])
    assert "*" not in three.table()
    head, row, *_ = (line.split() for line in three.table().splitlines())
    assert row[:4] == ["top1_linear", "21.00", "27.50", "28.00"]
    assert head[4:] == [*"b-a".replace("-", " - ").split(), *"c-a".replace("-", " - ").split()]
    ends = [f"{100 * end:+.2f}" for gained in (13, 14) for end in tango(gained, 0, 200)]
    assert row[4:] == ["+6.50", f"[{ends[0]},", f"{ends[1]}]", "+7.00", f"[{ends[2]},", f"{ends[3]}]"]
    old = save(tmp_path / "old", metrics={"top1_linear": 1.0})
    table = compare([old, b])[0].table()
    assert "27.50" in table
    assert "27.50*" not in table
    assert "note: none is marked as the best: a result of an earlier version has no score" in table


def test_speed_may_differ_and_settings_and_data_may_not(tmp_path: Path, capsys) -> None:
    a = save(tmp_path / "a")
    other = {name: dict(facts) for name, facts in PLAIN.data.items()}
    other["test"]["fingerprint"] = "3"
    newer = {name: facts | {"fingerprint": "content:5"} for name, facts in PLAIN.data.items()}
    fewer = {name: dict(facts) for name, facts in PLAIN.data.items()}
    fewer["train"]["rows"] = 89
    assert compare([a, save(tmp_path / "fast", settings={**PLAIN.settings, "workers": 9, "batch_size": 1})])
    for i, (changes, message) in enumerate(
        [
            ({"settings": {**PLAIN.settings, "style": "mae"}}, "style = dinov2 and mae"),
            ({"settings": {k: v for k, v in PLAIN.settings.items() if k != "lr"}}, "and absent"),
            ({"data": other}, "test fingerprint: b: and b:, 2 and 3"),
            ({"data": fewer}, "train rows: 90 and 89"),
            ({"data": newer}, "train: one is of a version that knew data by names; measure it again"),
            ({"data": {"test": PLAIN.data["test"]}}, "only one has train data"),
        ]
    ):
        b = save(tmp_path / f"b{i}", **changes)
        with pytest.raises(UserError, match=f"linear: a and b{i} were not measured alike: .*{message}"):
            compare([a, b])
        assert main(["compare", str(a), str(b)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_which_protocols(tmp_path: Path) -> None:
    a, b = save(tmp_path / "x" / "run"), save(tmp_path / "y" / "run")
    save(a, protocol="knn")
    assert [c.protocol for c in compare([a, b])] == ["linear"]
    assert compare([a, b])[0].names == ("x/run", "y/run")
    save(b, protocol="knn")
    assert [c.protocol for c in compare([a, b], "knn")] == ["knn"]
    for places, protocol, message in (
        ([a], None, "two or more"),
        ([a, a], None, "is given twice"),
        ([a, tmp_path], None, "holds no results"),
        ([a, b], "lineer", "no results of 'lineer'; did you mean 'linear'"),
        (
            [save(tmp_path / "p"), save(tmp_path / "q", protocol="knn")],
            None,
            "no protocol was measured for all",
        ),
    ):
        with pytest.raises(UserError, match=message):
            compare(places, protocol)


def test_tables_of_probes() -> None:
    lines = [line.split() for line in PLAIN.table().splitlines()]
    assert lines[1][:3] == ["probe", "top1", "95"]
    assert lines[2] == ["linear", "71.25", "[69.00,", "73.00]", "-", "-", "-", "1,234", "lr=0.1"]
    assert lines[3] == ["entropy_x", "3.00"]


def test_the_command_line_of_several_protocols(encoder, tmp_path: Path, capsys) -> None:
    encoder.save(tmp_path / "run" / "encoder")
    words = ["model=" + str(tmp_path / "run"), "train=scenes:?count=30", "test=scenes:?count=12", "workers=0"]
    assert main(["evaluate", "knn,linear", *words[:1]]) == 2
    assert "knn: test is needed" in capsys.readouterr().err
    assert main(["evaluate", "knn,linear", *words, "temprature=1"]) == 2
    assert "did you mean 'temperature'" in capsys.readouterr().err
    assert main(["evaluate", "linear", "--help"]) == 0
    assert "cache" in capsys.readouterr().out
    for word in ("compare --help", "compare a b c=1", "compare"):
        assert main(word.split()) == (0 if "help" in word else 2)


def test_a_damaged_result_is_named_where_nothing_is_left_to_compare(tmp_path):
    """Otherwise it would read as if it had never been measured."""
    both = [save(tmp_path / name, protocol="knn") for name in ("a", "b")]
    save(tmp_path / "b", protocol="linear")
    (tmp_path / "b" / "results" / "knn.json").write_text("{")
    with pytest.raises(UserError, match=r"no protocol was measured for all .*; left out: .*knn\.json"):
        compare(both)


def test_rows_that_are_all_alike_have_no_interval_and_the_table_says_why(tmp_path: Path) -> None:
    """Tango's interval of 24 alike pairs is +-13.8, a bootstrap's has no width: neither helps."""
    shares = packed(torch.rand(24, generator=torch.Generator().manual_seed(0)), torch.arange(24))
    scores = hits(18, 24) | {"corloc_x": shares}
    described = (Metric("top1_linear", better="higher"), Metric("corloc_x", better="higher"))
    metrics = {"top1_linear": 75.0, "corloc_x": 50.0}
    same = {"metrics": metrics, "scores": scores, "described": described}
    places = [save(tmp_path / "a", **same), save(tmp_path / "b", **same)]
    (only,) = compare(places)
    head, first, second, _, *notes = only.table().splitlines()
    assert head.split()[-3:] == ["second", "-", "first"]
    assert first.split() == ["top1_linear", "75.00", "75.00", "0", "[alike]"]
    assert second.split() == ["corloc_x", "50.00", "50.00", "0", "[alike]"]
    assert notes[-2] == "note: b and a are the same encoder (abc)"
    assert notes[-1].startswith("note: 0 [alike]: both have the same score in every row of the test data")
    other = save(tmp_path / "c", **{**same, "scores": hits(17, 24) | {"corloc_x": shares}, "encoder": "def"})
    (only,) = compare([places[0], other])
    low, high = (f"{100 * end:+.2f}" for end in tango(0, 1, 24))
    assert only.table().splitlines()[1].split()[3:] == ["-4.17", f"[{low},", f"{high}]"]
