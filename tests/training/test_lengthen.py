"""A run that is given a longer duration goes on, by the schedules of the longer run, and says so."""

import shutil
from pathlib import Path

import pytest

from foveola.config import ConfigError, read_yaml
from foveola.training.run import pretrain


def text_of(run: Path) -> str:
    return (run / "log.txt").read_text()


def test_a_finished_run_goes_on_by_the_schedules_of_the_longer_one(
    tiny, tmp_path, lines, same, newest, interrupt_after
):
    """Lengthened twice, and interrupted: to the bit as without the interruption."""
    fresh = pretrain(tiny(out=str(tmp_path / "fresh"), duration="3 epochs")).folder
    once = pretrain(tiny(out=str(tmp_path / "once"))).folder  # 2 epochs of 4 steps
    before = lines(once)
    longer = pretrain(tiny(out=str(once), duration="3 epochs"))
    assert (longer.step, longer.total_steps, longer.finished) == (12, 12, True)
    assert read_yaml(once / "config.yaml") == read_yaml(fresh / "config.yaml")
    assert lines(once)[:8] == before
    wanted = {line["step"]: (line["lr"], line["momentum"]) for line in lines(fresh)}
    assert all(wanted[line["step"]] == (line["lr"], line["momentum"]) for line in lines(once)[8:])
    assert [line["step"] for line in lines(once)] == list(range(1, 13))

    twice = Path(shutil.copytree(once, tmp_path / "twice"))
    config = tiny(out=str(twice), duration="20 steps")
    interrupt_after(3)
    assert pretrain(config).step == 15
    interrupt_after(0)
    assert pretrain(config).finished
    whole = pretrain(tiny(out=str(once), duration="20 steps"))
    same(newest(whole.folder), newest(twice))
    assert lines(once) == lines(twice)
    assert text_of(twice).count("duration 2 epochs -> 3 epochs") == 1
    assert text_of(twice).count("duration 3 epochs -> 20 steps") == 1


def test_what_becomes_of_schedules_is_said_in_numbers(tiny, tmp_path, lines, interrupt_after):
    changes = {"optimizer.lr.warmup": "50 %", "checkpoint_every": "25 %", "evaluate_every": None}
    interrupt_after(3)
    run = pretrain(tiny(out=str(tmp_path / "run"), **changes)).folder
    interrupt_after(0)
    pretrain(tiny(out=str(run), duration="4 epochs", **changes))
    (said,) = (line[21:] for line in text_of(run).splitlines() if "duration 2 epochs" in line)
    # The warm-up from 0 to 0.001 took 4 steps, the last with the full rate; now it takes 8: 3/7 of it.
    assert said.startswith(
        "duration 2 epochs -> 4 epochs, 8 -> 16 steps: schedules are those of the longer run from step 3 on: "
    )
    parts = said.rpartition(": ")[2].split(", ")
    assert "optimizer.lr 0.001 -> 0.000429" in parts
    assert "optimizer.lr.warmup 4 -> 8 steps" in parts
    assert "checkpoint_every 2 -> 4 steps" in parts
    assert not [
        part for part in parts if part.startswith(("optimizer.weight_decay.warmup", "method.token.target"))
    ]
    assert lines(run)[3]["lr"] == pytest.approx(0.001 * 3 / 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"duration": "1 epochs"},
            r"run has duration='2 epochs', 8 steps: a run can become longer, not '1 epochs', 4 steps: repeat",
        ),
        ({"duration": "8 steps"}, r"a run can become longer, not '8 steps', 8 steps"),
        ({"duration": "3 epochs", "seed": 1}, r"holds another run \(its seed is 0, not 1\)"),
        ({"duration": "3 epoch s"}, r"duration: not a duration"),
    ],
)
def test_only_a_longer_duration_may_differ(tiny, tmp_path, snapshot, changes, message):
    pretrain(tiny(out=str(tmp_path / "run")))
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=message):
        pretrain(tiny(out=str(tmp_path / "run"), **changes))
    assert snapshot(tmp_path) == before
