"""Run folders as they are found: damaged, unfinished, of other versions."""

import json
from pathlib import Path

import pytest

from foveola.config import UserError
from foveola.files import FIXED_TARGETS
from foveola.reports.record import read_runs, setting


def folder(path: Path, config: str = "duration: 20 steps\nbatch_size: 8\n", *lines: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    if lines:
        (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return path


def line(step: int, **values: float | str | None) -> str:
    return json.dumps({"step": step, **values})


def test_lines_of_one_step_are_one_and_a_torn_end_is_dropped(tmp_path: Path, capsys) -> None:
    run = folder(
        tmp_path / "run", "{}", line(10, loss=2.0), line(20, loss=None, lr=0.1), line(20, **{"knn/top1": 3.0})
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    (record,) = read_runs([run])
    assert record.lines == [{"step": 10, "loss": 2.0}, {"step": 20, "loss": None, "lr": 0.1, "knn/top1": 3.0}]
    assert record.step == 20
    assert not capsys.readouterr().err  # an interruption is nothing to warn of


def test_words_among_numbers_are_left_out(tmp_path: Path) -> None:
    (record,) = read_runs([folder(tmp_path / "run", "{}", line(1, loss=1.0, host="mine"))])
    assert record.lines == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("text", ["no json", "[1]", '{"loss": 1}', '{"step": "x"}'])
def test_a_damaged_line_is_left_out_and_named(tmp_path: Path, capsys, text: str) -> None:
    run = folder(tmp_path / "run", "{}", line(1), text, line(2))
    (record,) = read_runs([run])
    assert record.lines == [{"step": 1}, {"step": 2}]
    assert capsys.readouterr().err == f"report: {run}/metrics.jsonl, line 2: no metrics, left out\n"


def test_length_of_the_run(tmp_path: Path) -> None:
    def total(name: str, config: str, *lines: str) -> int | None:
        return read_runs([folder(tmp_path / name, config, *lines)])[0].total_steps

    assert total("a", "duration: 20 steps\nbatch_size: 8\n") == 20
    assert total("b", "duration: 3 epochs\nbatch_size: 8\n", line(5, epoch=0.5)) == 30
    assert total("c", "duration: 3 epochs\nbatch_size: 8\n") is None
    assert total("d", "duration: 1k samples\nbatch_size: 8\n") == 125
    assert total("e", "duration: soon\n") is None
    assert total("f", "{}") is None


def test_how_many_images_there_were(tmp_path: Path) -> None:
    """143 in batches of 32 make four steps an epoch, as 128 to 159 do. The log names the number."""
    run = folder(tmp_path / "run", "duration: 8 steps\nbatch_size: 32\n", line(8, epoch=2.0))
    assert read_runs([run])[0].images == (128, 159)
    (run / "log.txt").write_text(
        "2026-01-01 00:00:00  training in runs/x: 8 steps of 32 images, out of 140\n"
        "2026-01-01 00:00:00  going on after step 4 in runs/x: 4 steps of 32 images, out of 143\n"
        "2026-01-01 00:00:09  unreadable images, replaced by others: 8 steps of 9 images, out of 7.jpg\n"
    )
    assert read_runs([run])[0].images == (143, 143)
    assert read_runs([folder(tmp_path / "bare")])[0].images == (None, None)


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    runs = [
        folder(tmp_path / "a" / "seed-0"),
        folder(tmp_path / "b" / "seed-0"),
        folder(tmp_path / "b" / "seed-1"),
    ]
    assert [record.name for record in read_runs(runs[1:])] == ["seed-0", "seed-1"]
    assert [record.name for record in read_runs(runs)] == ["a/seed-0", "b/seed-0", "b/seed-1"]
    with pytest.raises(UserError, match="given twice"):
        read_runs([runs[0], runs[1], tmp_path / "b" / ".." / "a" / "seed-0"])


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a run folder"):
        read_runs([])
    with pytest.raises(UserError, match=r"no run folder: it lacks config\.yaml"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="no run folder: it does not exist"):
        read_runs([tmp_path / "nowhere"])


def test_prototypes_by_the_name_of_their_metrics(tmp_path: Path) -> None:
    config = """
method:
  heads: {main: {prototypes: 64}, patches: {prototypes: 32}}
  token: {head: main}
  patch: {head: patches}
  position: null
  image: {head: gone}
  clustering: {prototypes: 16}
"""
    (record,) = read_runs([folder(tmp_path / "run", config)])
    assert record.prototypes() == {"token": 64, "patch": 32, "clustering": 16}
    assert read_runs([folder(tmp_path / "old", "method: dino\n")])[0].prototypes() == {}
    log = tmp_path / "run" / "log.txt"
    log.write_text(
        "2026-01-01 10:00:00  prototypes of targets: mine 7\n"
        "2026-01-01 10:00:01  training\n"
        "2026-01-01 10:05:00  prototypes of targets: token 64, mine 12\n"
    )
    assert read_runs([tmp_path / "run"])[0].prototypes() == {"token": 64, "mine": 12}


def test_fixed_targets_by_the_log_and_of_mae_by_its_name(tmp_path: Path) -> None:
    for config, log, fixed in (
        ("method: {name: mae}\n", "", True),  # as earlier versions log it
        ("method: {name: capi}\n", "", False),
        ("method: {name: mine:Mine}\n", f"2026-01-01 10:00:00  {FIXED_TARGETS}\n", True),
    ):
        run = folder(tmp_path / f"run-{len(log)}-{fixed}", config)
        (run / "log.txt").write_text(log)
        assert read_runs([run])[0].fixed_targets == fixed


def test_encoders_and_images_on_the_way(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    for name in ("step-00000020", "step-00000003", "step-x", ".step-00000009"):
        (run / "encoders" / name).mkdir(parents=True)
        (run / "encoders" / name / "config.json").write_text("{}")
        (run / "encoders" / name / "model.safetensors").write_bytes(b"")
    (run / "encoders" / "step-00000030").mkdir()  # not whole
    (run / "encoders" / "step-00000030" / "config.json").write_text("{}")
    (run / "figures").mkdir()
    for name in ("a-00000010.png", "a-00000002.png", "two_words-00000001.png", "other.png", "my-own.png"):
        (run / "figures" / name).write_bytes(b"")
    (record,) = read_runs([run])
    assert [step for step, _ in record.checkpoints()] == [3, 20]
    assert {n: p.name for n, p in record.figures().items()} == {
        "a": "a-00000010.png",
        "two_words": "two_words-00000001.png",
    }
    assert not record.has_encoder
    assert record.encoder_step == record.step == 0
    for name in ("step-00000007", "step-00000020", ".writing-step-00000030", "step-x"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert read_runs([run])[0].encoder_step == 20


def test_settings_by_path() -> None:
    assert setting({"a": {"b": None}}, "a.b", 3) is None
    assert setting({"a": {"b": 1}}, "a.c", 3) == 3
    assert setting({"a": 1}, "a.b") is None
