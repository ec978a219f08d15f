"""What a run measures while it trains: any protocols, the best step, and whether later ones are worse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import foveola
from foveola import cli
from foveola.config import ConfigError, UserError, dump_yaml
from foveola.evaluation.metrics import tango
from foveola.evaluation.result import Result
from foveola.files import RunFolder
from foveola.training.run import pretrain

# A protocol whose numbers are those of a table: how many of 100 rows are right after each step.
FADING = """
import json, os
from dataclasses import dataclass
import torch
from foveola import Metric, Outcome, Protocol
from foveola.config import key
from foveola.evaluation.paired import packed

@dataclass(frozen=True)
class FadingConfig:
    right: str = key("{}", "how many rows are right, by step, as JSON")

class Fading(Protocol):
    name, help, Config = "fading", "numbers of a table", FadingConfig
    metrics = (Metric("share", "share", "higher", main=True), Metric("count", "count", unit=""))

    def measure(self, at, config):
        right = json.loads(config.right)[str(at.encoder.config.step)]
        hits = torch.arange(100) < right
        scores = {"share": packed(hits, torch.arange(100))}
        return Outcome({"share": 100 * hits.float().mean().item(), "count": 100.0}, {}, scores=scores)
"""
KNN = {"evaluate_every": "4 steps"}


@pytest.fixture
def fading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """fading(80, 90, 60): an evaluation with so many rows right after the steps 0, 2, 4, ..."""
    (tmp_path / "modules").mkdir(exist_ok=True)
    (tmp_path / "modules" / "fading_protocol.py").write_text(FADING)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def settings(*right: int, start: int = 0) -> dict[str, Any]:
        table = json.dumps({str(start + 2 * i): each for i, each in enumerate(right)})
        about = {"protocol": "fading_protocol:Fading", "every": "2 steps", "settings": {"right": table}}
        return {"evaluations": {"mine": about}, "best": "mine/share"}

    return settings


def log_of(run: Path) -> list[str]:
    """What log.txt says, without the times."""
    return [line[21:] for line in (run / "log.txt").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# -- several evaluations -------------------------------------------------------------------------------------

SEVERAL = {
    "evaluate_every": "4 steps",
    "evaluations": {
        "free": {
            "protocol": "label_free",
            "every": "6 steps",
            "settings": {"limit": 16, "workers": 0, "objects": False},
        },
        "control": {
            "protocol": "knn",
            "every": "8 steps",
            "train": "scenes:?size=32&count=20&seed=5",
            "settings": {"rows": "objects", "view": "object", "workers": 0, "limit": 20, "k": [3]},
        },
    },
    "best": "free/rank1_views",
    "keep_every": "1 steps",
}


def test_each_is_measured_at_its_own_times_on_its_own_data(tiny, tmp_path, lines):
    told = []
    config = tiny(out=str(tmp_path / "run"), **SEVERAL)
    listener = type("Listener", (), {"on_evaluation": lambda _, *what: told.append(what)})()
    run = pretrain(config, callbacks=[listener])
    times = {"knn/top1_masks": [0, 4, 8], "free/rank1_views": [0, 6, 8], "control/top1_plain": [0, 8]}
    for name, steps in times.items():
        assert [line["step"] for line in lines(run.folder) if name in line] == steps
    assert [(step, result.evaluation) for step, result in told if step in (0, 8)] == [
        *((0, "knn"), (0, "free"), (0, "control"), (8, "knn"), (8, "free"), (8, "control"))
    ]
    # Results are files, with the score of each image; those of the end are the run's own.
    folder = RunFolder(run.folder)
    assert folder.measured_steps() == [0, 4, 6, 8]
    for place in (folder.saved_encoder(8).path, run.folder):
        found = [Result.read(path) for path in (place / "results").glob("*.json")]
        assert sorted(result.evaluation for result in found) == ["control", "free", "knn"]
        assert all(result.scores for result in found)
    # The best step is that of the highest number in the log, the first of several.
    name = "free/rank1_views"
    values = {line["step"]: line[name] for line in lines(run.folder) if name in line}
    best = max(values, key=lambda step: (values[step], -step))
    assert folder.best.step == best
    assert best == 6
    for part, value in weights(folder.saved_encoder(best).path).items():
        assert torch.equal(weights(folder.best.path)[part], value)
    assert foveola.load(f"{run.folder}?step=best").config.step == best
    said = f"best: {name} {values[best]:.2f} % at step {best}; its encoder: {folder.best.path}"
    assert said in log_of(run.folder)


def test_an_interruption_at_any_step_changes_nothing_of_it(tiny, tmp_path, lines, interrupt_after, fading):
    settings = {**KNN, **fading(70, 80, 60, 85, 20), "keep_every": "2 steps"}
    whole = pretrain(tiny(out=str(tmp_path / "whole"), **settings)).folder
    config, done = tiny(out=str(tmp_path / "parts"), **settings), 0
    for stop in (4, 4):
        interrupt_after(stop)
        done += stop
        assert pretrain(config).step == done
    interrupt_after(0)
    pretrain(config)  # what the last interruption left out
    parts = tmp_path / "parts"
    known = {json.dumps(line, sort_keys=True) for line in lines(whole)}
    assert {json.dumps(line, sort_keys=True) for line in lines(parts)} == known
    assert len(lines(parts)) == len(lines(whole))
    names = sorted(str(path.relative_to(whole)) for path in (whole / "encoders").rglob("*"))
    assert sorted(str(path.relative_to(parts)) for path in (parts / "encoders").rglob("*")) == names
    for name, value in weights(whole / "encoders" / "best").items():
        assert torch.equal(weights(parts / "encoders" / "best")[name], value)
    assert RunFolder(parts).best.step == RunFolder(whole).best.step == 6
    said = [[line for line in log_of(each) if "hurts" in line or "worse" in line] for each in (parts, whole)]
    assert said[0] == said[1]
    assert len(said[0]) == 3


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
from foveola.training.run import pretrain
run = pretrain("tiny.yaml", out="two")
print(run.step, run.finished)
"""


def test_two_processes_measure_together(tiny, tmp_path, monkeypatch, run_ranks, lines, fading):
    monkeypatch.chdir(tmp_path)
    changes = {**SEVERAL, "stop_when_worse": True}
    changes["evaluations"] = changes["evaluations"] | fading(60, 80, 50)["evaluations"]
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tiny(**changes)))
    words = [f"{tmp_path}/modules"]
    assert run_ranks(RANKS, words=words) == ["4 False\n"] * 2  # both stop where one sees that it got worse
    measured = [line["step"] for line in lines(tmp_path / "two") if "knn/top1_masks" in line]
    assert measured == [0, 4]
    assert RunFolder(tmp_path / "two").measured_steps() == [0, 2, 4]
    first, second = run_ranks(RANKS, words=words)
    assert first.startswith("stopped after step 4 of 8, as stop_when_worse=true asks: later steps are worse")
    assert second == "4 False\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": {"a": {"protocol": "kn"}}, **KNN}, r"evaluations.a.protocol: .*did you mean 'knn'"),
        ({"evaluations": {"a": {"protocol": "knn"}}}, r"a has no time: write evaluations.a.every='1 epochs'"),
        ({"evaluations": {"a": {}}, **KNN}, r"evaluations.a.protocol: a value is needed"),
        ({"evaluations": {"a": {"protocol": "knn", "k": 5}}}, r"unknown key 'evaluations.a.k'"),
        (
            {"evaluations": {"a": {"protocol": "knn", "every": "1 epochs", "settings": {"kk": 5}}}},
            r"unknown key 'evaluations.a.settings.kk'; did you mean 'evaluations.a.settings.k'",
        ),
        ({"evaluations": {"a b": {"protocol": "knn"}}, **KNN}, r"evaluations.a b: a name of letters"),
        ({"evaluations": {"loss": {"protocol": "knn"}}, **KNN}, r"evaluations.loss: a name of letters"),
        ({"evaluations": {"knn": {"protocol": "linear"}}, **KNN}, r"evaluate_every measures knn as well"),
        (
            {"evaluations": {n: {"protocol": "label_free", "every": "1 epochs"} for n in ("a", "b")}},
            r"evaluations.b measures the same as evaluations.a",
        ),
        (
            {"evaluations": {"a": {"protocol": "label_free", "every": "120 %"}}},
            r"evaluations.a.every: not a fraction of the run",
        ),
        (
            {"evaluations": {"a": {"protocol": "label_free", "every": "1 epochs", "train": "scenes:"}}},
            r"evaluations.a.train has no effect: label_free learns from nothing",
        ),
        (
            {"evaluations": {"a": {"protocol": "label_free", "every": "1 epochs", "test": "folder:/no"}}},
            r"no folder /no",
        ),
        ({"best": "knn/top1"}, r"best=knn/top1: nothing is measured: set evaluate_every= or evaluations="),
        ({"best": "kn/top1", **KNN}, r"there is no evaluation 'kn'; did you mean knn/top1\?"),
        ({"best": "knn/top2", **KNN}, r"a number that can be better: knn/top1_\*, knn/top5_\*$"),
        ({"best": "knn", **KNN}, r"expected EVALUATION/METRIC"),
    ],
)
def test_mistakes_show_before_anything_is_made(tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        pretrain(tiny(out=str(tmp_path / "run"), **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_keys_of_milestones_without_evaluations_are_refused(tiny_recipe, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_recipe)
    with pytest.raises(ConfigError, match=r"stop_when_worse has no effect: nothing is measured"):
        pretrain(tmp_path / "tiny.yaml", out=str(tmp_path / "run"), stop_when_worse=True)


def test_a_best_that_several_numbers_fit_is_asked_for_before_the_first_step(tiny, tmp_path, lines):
    with pytest.raises(UserError, match=r"best: 'top1' several are: top1_plain, top1_masks"):
        pretrain(tiny(out=str(tmp_path / "run"), best="knn/top1", **KNN))
    assert not lines(tmp_path / "run")


# -- better and worse ----------------------------------------------------------------------------------------


def hand_worked(gained: int, lost: int) -> str:
    low, high = tango(gained, lost, 100)
    return f"({gained - lost:+.2f}, 95 % {100 * low:+.2f} to {100 * high:+.2f})"


def test_what_hurts_is_said_when_it_begins_and_when_it_ends(tiny, tmp_path, fading):
    """Of a run from given weights, which are those of another run's best step."""
    first = pretrain(tiny(out=str(tmp_path / "first"), duration="1 epochs", **fading(10, 30, 20)))
    init, settings = f"{first.folder}?step=best", fading(80, 60, 55, 78, 90)
    run = pretrain(tiny(out=str(tmp_path / "run"), init=init, **settings | {"best": None}))
    start, given = foveola.load(f"{run.folder}?step=0").weights(), foveola.load(init)
    assert given.config.step == 2
    assert all(torch.equal(value, start[name]) for name, value in given.weights().items())
    said = [line for line in log_of(run.folder) if line.startswith(("adaptation", "mine", "best"))]
    assert said == [
        "best: mine/share 80.00 % at step 0",
        "adaptation hurts since step 2: mine share 80.00 -> 60.00 % "
        f"{hand_worked(0, 20)}, worse than the start",
        "mine share: step 6 is no longer worse beyond the interval",
        "best: mine/share 90.00 % at step 8 (before: 80.00 at step 0)",
        f"best: mine/share 90.00 % at step 8; its encoder: {run.folder}/encoders/best",
    ]
    assert run.finished


def test_without_given_weights_later_steps_are_held_against_the_best(tiny, tmp_path, fading):
    run = pretrain(tiny(out=str(tmp_path / "run"), **fading(40, 90, 85, 60, 70)))
    said = [line for line in log_of(run.folder) if "worse" in line]
    # 85 after 90 of 100 is beyond the paired interval, too: five were lost and none gained.
    assert said == [
        f"later steps are worse than step 2, since step 4: mine share 90.00 -> 85.00 % {hand_worked(0, 5)}"
    ]
    assert RunFolder(run.folder).best.step == 2


def test_a_run_that_got_worse_stops_where_that_is_asked_for_and_goes_on_where_not(
    tiny, tmp_path, fading, capsys, lines, same, newest
):
    config = tiny(out=str(tmp_path / "run"), stop_when_worse=True, **fading(40, 90, 60, 70, 80))
    run = pretrain(config)
    assert (run.step, run.finished) == (4, False)
    assert newest(run.folder)["step"] == 4
    why = f"later steps are worse than step 2, since step 4: mine share 90.00 -> 60.00 % {hand_worked(0, 30)}"
    message = f"stopped after step 4 of 8, as stop_when_worse=true asks: {why}; "
    message += "stop_when_worse=false goes on from there"
    assert log_of(run.folder)[-1] == message
    assert Result.read(run.folder / "results" / "fading.json").metrics["share"] == pytest.approx(60)
    before = (run.folder / "log.txt").read_bytes()
    capsys.readouterr()
    again = pretrain(config)
    assert (again.step, again.metrics) == (4, {})
    assert capsys.readouterr().out == message + "\n"
    assert (run.folder / "log.txt").read_bytes() == before
    on = tiny(out=str(tmp_path / "run"), **fading(40, 90, 60, 70, 80))
    assert pretrain(on).finished
    assert [line["step"] for line in lines(run.folder) if "mine/share" in line] == [0, 2, 4, 6, 8]
    said = [line for line in log_of(run.folder) if line.startswith("later steps")]
    assert len(said) == 1  # it is not said again after it was resumed
    same(newest(pretrain(tiny(out=str(tmp_path / "plain"))).folder), newest(run.folder))


def test_the_command_that_stops_exits_with_0(tiny, tmp_path, fading, monkeypatch, capsys):
    config = tiny(stop_when_worse=True, **fading(40, 90, 60, 70, 80))
    (tmp_path / "tiny.yaml").write_text(dump_yaml(config))
    words = ["pretrain", f"{tmp_path}/tiny.yaml", f"out={tmp_path}/run"]
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("stopped after step 4 of 8, as stop_when_worse=true asks: ")


def test_an_evaluation_that_is_set_otherwise_now_is_not_held_against_the_old_one(
    tiny, tmp_path, fading, interrupt_after
):
    interrupt_after(5)
    pretrain(tiny(out=str(tmp_path / "run"), **fading(40, 95, 90)))
    interrupt_after(0)
    run = pretrain(tiny(out=str(tmp_path / "run"), **fading(30, 31, start=6)))
    assert not [line for line in log_of(run.folder)[-6:] if "worse" in line]
    assert RunFolder(run.folder).best.step == 8


def test_the_start_is_measured_later_where_its_encoder_was_kept(
    tiny, tmp_path, fading, interrupt_after, lines
):
    interrupt_after(5)
    run = pretrain(tiny(out=str(tmp_path / "run"), keep_every="4 steps")).folder
    shutil.copytree(run / "encoders" / "step-00000004", run / "encoders" / "step-00000000")
    about = run / "encoders" / "step-00000000" / "config.json"
    about.write_text(about.read_text().replace('"step": 4', '"step": 0'))
    interrupt_after(0)
    pretrain(tiny(out=str(run), keep_every="4 steps", **fading(50, 60, 70, 71, 72)))
    assert [line["step"] for line in lines(run) if "mine/share" in line] == [0, 6, 8]


def test_start_best_and_end_of_one_run_are_compared(tiny, tmp_path, fading, capsys):
    run = pretrain(tiny(out=str(tmp_path / "run"), **fading(40, 90, 60, 70, 80))).folder
    assert cli.main(["compare", f"{run}?step=0", f"{run}?step=best", str(run)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:4] == ["share", "40.00", "90.00*", "80.00"]


def test_killed_between_two_names_the_best_encoder_is_made_up(tiny, tmp_path, fading, monkeypatch):
    settings = fading(40, 60, 90, 70, 80)
    whole = pretrain(tiny(out=str(tmp_path / "whole"), **settings)).folder
    run, rename = tmp_path / "run", Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == ".writing-best" and RunFolder(run).saved_encoder(4).path.is_dir():
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(out=str(run), **settings))
    assert RunFolder(run).best.step is None  # neither the earlier nor the new one has the name
    pretrain(tiny(out=str(run), **settings))
    assert RunFolder(run).best.step == 4
    assert sorted(path.name for path in (run / "encoders").iterdir()) == sorted(
        path.name for path in (whole / "encoders").iterdir()
    )
    for name, value in weights(whole / "encoders" / "best").items():
        assert torch.equal(weights(run / "encoders" / "best")[name], value)
