import json
import math
import re

import numpy as np

from foveola import distributed
from foveola.training import log as log_module
from foveola.training.log import Log


def test_surroundings_name_versions_and_machine():
    import torch

    from foveola import __version__
    from foveola.training.log import surroundings

    text = surroundings(torch.device("cpu"))
    assert text.startswith(f"foveola {__version__}, torch {torch.__version__}, python 3.")
    assert re.search(r"; 1 process on cpu, \d+ CPU cores; ", text)
    assert "\n" not in text


def open_log(folder, start=0, terminal=False) -> Log:
    return Log(folder, total_steps=100, start_step=start, batch_size=8, terminal=terminal)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder, tag) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_each_step_is_a_line_and_a_scalar(tmp_path):
    with open_log(tmp_path) as log:
        log.step(1, {"loss": 2.5, "lr": 1e-3})
        log.step(2, {"loss": math.nan, "lr": math.inf})
        log.step(2, {"knn/top1": 50.0})
    one, two, three = lines(tmp_path)
    assert (one["step"], one["loss"], one["lr"]) == (1, 2.5, 1e-3)
    assert (two["step"], two["loss"], two["lr"]) == (2, None, None)
    assert (three["step"], three["knn/top1"]) == (2, 50.0)
    assert 0 <= one["seconds"] <= two["seconds"] <= three["seconds"]
    assert scalars(tmp_path, "knn/top1") == {2: 50.0}


def test_resuming_drops_what_came_after(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(10, 60, 10):
            log.step(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')  # killed while writing
    before = lines_up_to(tmp_path, 30)
    with open_log(tmp_path, start=30) as log:
        assert lines(tmp_path) == before
        log.step(40, {"loss": -1.0})
    assert [line["loss"] for line in lines(tmp_path)] == [10, 20, 30, -1]
    assert lines(tmp_path)[-1]["seconds"] >= before[-1]["seconds"]
    assert scalars(tmp_path, "loss") == {10: 10, 20: 20, 30: 30, 40: -1}
    with open_log(tmp_path, start=0):
        assert lines(tmp_path) == []
    assert not list(tmp_path.glob(".*"))


def lines_up_to(folder, step) -> list[dict]:
    whole = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
    return [line for line in map(json.loads, whole) if line["step"] <= step]


def test_odd_lines_in_the_middle_are_left_out_and_said(tmp_path, capfd):
    odd = b'{"step": 1}\noops\n[1]\n{"loss": 2}\n{"step": "x"}\n\xff\xfe\n{"step": 2, "loss": "x"}\n'
    odd += b'{"step": 3}\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_bytes(odd)
    open_log(tmp_path, start=3).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'
    said = f"{tmp_path}/metrics.jsonl: 6 lines that hold no metrics are left out, the first of them line 2"
    assert said in capfd.readouterr().err
    assert said in (tmp_path / "log.txt").read_text()


def test_plain_lines_where_there_is_no_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(log_module, "LINE_SECONDS", 1000.0)
    with open_log(tmp_path) as log:
        for step in (10, 20, 100):
            log.step(step, {"loss": 1.5, "images_per_second": 80.0, "data_wait": 0.25, "grad_norm": 3.0})
        log.note("two images were skipped")
    out, err = capfd.readouterr()
    assert out == ""
    first, last, note = err.splitlines()  # step 20 came too soon; the last step is always shown
    assert re.fullmatch(
        r"step 10/100  loss 1\.5  80 images/s  25% waiting for data  \d+:\d\d:\d\d left", first
    )
    assert last.startswith("step 100/100")
    assert last.endswith("0:00:00 left")
    assert note == "two images were skipped"
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  two images were skipped\n", (tmp_path / "log.txt").read_text()
    )


def test_progress_bar(tmp_path, capfd):
    with open_log(tmp_path, start=50, terminal=True) as log:
        log.step(60, {"loss": 1.25, "data_wait": 0.5})
        log.step(60, {"knn/top1": 1.0})
        log.note("[bold]as it is[/bold]")
    err = capfd.readouterr().err
    assert "60/100" in err
    assert "loss 1.25" in err
    assert "50% waiting for data" in err
    assert "[bold]as it is[/bold]" in err


def test_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    array = np.zeros((6, 9, 3), np.uint8)
    with open_log(tmp_path) as log:
        log.figure(5, "views", array)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("views")
    assert (image.step, image.width, image.height) == (5, 9, 6)


def test_images_are_pruned_as_checkpoints_are(tmp_path):
    """The newest two of each name, and every third step; another run's name that begins alike is another."""
    with open_log(tmp_path) as log:
        for step in range(1, 9):
            log.figure(step, "views", np.zeros((2, 2, 3), np.uint8), keep=2, keep_every=3)
        log.figure(1, "views-0", np.zeros((2, 2, 3), np.uint8))
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["views-0-00000001.png", *(f"views-{step:08d}.png" for step in (3, 6, 7, 8))]


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with open_log(tmp_path / "run") as log:
        log.step(1, {"loss": 1.0})
        log.note("hello")
        log.figure(1, "x", np.zeros((2, 2, 3), np.uint8))
    assert not (tmp_path / "run").exists()
