"""The demo, cut short: it trains, compares on held-out objects, and draws; a second call trains nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from foveola import demo as module
from foveola.config import UserError
from foveola.demo import MEASURES, DemoTable, demo

SHORT = [
    "duration=2 steps",
    "batch_size=8",
    "data='scenes:?size=32&count=48&objects=3-4'",
    "evaluate.limit=24",
    "loader.workers=0",
    "model.width=32",
    "model.heads=2",
    "model.depth=1",
    "optimizer.lr.warmup=0 steps",
]


def test_a_short_demo_compares_and_draws(
    tmp_path, capsys: pytest.CaptureFixture, monkeypatch, no_charts: None
) -> None:
    monkeypatch.setattr(module, "DEMO_OBJECTS", 16)
    monkeypatch.setattr(module, "REPORTED", 8)
    monkeypatch.setattr(module, "DRAWN", 24)
    comparison = demo(tmp_path, seeds=2, overrides=SHORT)
    assert comparison is not None
    assert set(comparison.before) == set(comparison.after) == set(MEASURES)
    assert all(
        len(values) == 2 and all(0 <= v <= 100 for v in values) for values in comparison.after.values()
    )
    image = np.asarray(Image.open(tmp_path / "demo.png"))
    assert image.ndim == 3
    assert image.std() > 20
    printed = capsys.readouterr().out
    assert comparison.table() in printed
    assert str(tmp_path / "demo.png") in printed
    assert f"report:  {tmp_path / 'report.html'}\n" in printed
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "seed-0, seed-1" in page
    assert "k-NN top-1 (object masks)" in page
    lines = (tmp_path / "seed-0" / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "seed-1" / "results" / "knn.json").read_text())["protocol"] == "knn"
    monkeypatch.setattr(module, "_report", lambda *_: tmp_path)  # which is drawn anew each time
    again = demo(tmp_path, seeds=1, overrides=SHORT)
    assert again is not None
    for name, values in comparison.after.items():
        assert (again.before[name], again.after[name]) == (comparison.before[name][:1], values[:1])
    assert (tmp_path / "seed-0" / "metrics.jsonl").read_text() == lines


def test_what_was_stopped_goes_on_later_and_what_died_is_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "pretrain", lambda *_, **__: pytest.fail("it did not end"))
    for code in (75, 128 + 2, 128 + 15):  # signals of which a run makes a checkpoint
        monkeypatch.setattr(module, "start_processes", lambda *_, code=code: code)
        assert demo(tmp_path, overrides=SHORT, processes=2) is None
    for code in (1, 2, 128 + 9, 128 + 11):
        monkeypatch.setattr(module, "start_processes", lambda *_, code=code: code)
        with pytest.raises(UserError, match=f"in 2 processes ended with exit code {code}; the same command"):
            demo(tmp_path, overrides=SHORT, processes=2)


def test_the_table_gives_mean_spread_and_factor() -> None:
    names = list(MEASURES)
    before = {name: [2.0, 3.0, 4.0] for name in names}
    after = {name: [10.0, 12.0, 14.0] for name in names}
    line = DemoTable(before, after).table().splitlines()[1]
    assert line.startswith(names[0])
    assert line.split()[-8:] == ["3.0", "±", "1.0", "12.0", "±", "2.0", "+9.0", "x", "4.0"][-8:]
