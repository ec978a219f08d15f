"""What is called in a run, when and with what, and what becomes of a callback that fails."""

import importlib

import pytest

import foveola
from foveola import distributed
from foveola.config import UserError
from foveola.training import checkpoint
from foveola.training.callbacks import Callbacks
from foveola.training.run import pretrain


class Witness:
    def __init__(self) -> None:
        self.seen: list = []
        self.metrics: list[dict] = []

    def on_step(self, step, metrics):
        self.seen.append(("step", step))
        self.metrics.append({"step": step, **metrics})
        metrics.clear()  # its own copy

    def on_checkpoint(self, step, folder):
        assert checkpoint.is_whole(folder)
        encoder = foveola.load(folder.parents[1]).backbone.state_dict()
        method = checkpoint.read_checkpoint(folder)["trainer"]["method"]
        kept = method["teacher.backbone.norm.weight"]
        assert encoder["norm.weight"].equal(kept)
        self.seen.append(("checkpoint", step))

    def on_evaluation(self, step, result):
        assert isinstance(result, foveola.Result)
        self.seen.append(("evaluation", step, result.metrics["top1_masks"]))


def test_what_is_called_in_which_order(tiny, tmp_path, lines):
    witness, other = Witness(), Witness()
    changes = {"log_every": 2, "checkpoint_every": "3 steps", "evaluate_every": "8 steps"}
    config = tiny(out=str(tmp_path / "run"), **changes)
    run = pretrain(config, callbacks=[witness, other])
    events = [event[:2] for event in witness.seen]
    assert events == [
        *[("step", 2), ("checkpoint", 3), ("step", 4)],
        *[("step", 6), ("checkpoint", 6), ("step", 8), ("checkpoint", 8), ("evaluation", 8)],
    ]
    assert other.seen == witness.seen
    logged = lines(run.folder)
    steps = [line for line in logged if "loss" in line]
    told = [{k: v for k, v in each.items() if k in steps[0]} for each in witness.metrics]
    assert told == steps
    found = {line["step"]: line["knn/top1_masks"] for line in logged if "knn/top1_masks" in line}
    assert found == {event[1]: event[2] for event in witness.seen if event[0] == "evaluation"}
    assert pretrain(config, callbacks=[witness]).finished
    assert witness.seen == other.seen  # there was nothing to do


def test_one_that_fails_ends_the_run_with_a_checkpoint(tiny, tmp_path, lines, same, newest):
    changes = {"evaluate_every": "6 steps", "checkpoint_every": "4 steps", "duration": "6 steps"}
    whole = pretrain(tiny(out=str(tmp_path / "whole"), **changes))
    config = tiny(out=str(tmp_path / "parts"), **changes)
    for event, at in (("on_step", 2), ("on_checkpoint", 4), ("on_evaluation", 6)):

        def fail(step, what, at=at):
            if step == at:
                raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"):
            pretrain(config, callbacks=[type("Failing", (), {event: staticmethod(fail)})()])
        kept = checkpoint.newest(tmp_path / "parts")
        assert kept is not None
        assert checkpoint.step_of(kept) == at
        assert f"ZeroDivisionError('mine'); kept: {kept}" in (tmp_path / "parts" / "log.txt").read_text()
    assert pretrain(config).finished
    same(newest(whole.folder), newest(tmp_path / "parts"))
    assert lines(whole.folder) == lines(tmp_path / "parts")


def test_the_example_of_the_page_ends_a_run(tiny, tmp_path, example_of_docs):
    example_of_docs("Patience", "patience_of_docs")
    module = importlib.import_module("patience_of_docs")
    stops = module.Patience(2, tmp_path / "copies")
    stops.best = -1e9  # no loss will do
    run = pretrain(tiny(out=str(tmp_path / "run")), callbacks=[stops])
    assert 2 <= run.step <= 3
    assert not run.finished
    (copy,) = (tmp_path / "copies").iterdir()
    assert checkpoint.is_whole(copy)
    assert checkpoint.step_of(copy) == run.step
    assert module.train(tiny(out=str(tmp_path / "run")), tmp_path / "copies").finished


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ("on_step", "callbacks: expected a list of objects, got a str"),
        ([Witness], r"Witness is a class: pass an object, Witness\(\)"),
        (["on_step"], "a str has none of on_step, on_checkpoint, on_evaluation"),
        ([lambda step, metrics: None], "a function has none of"),
        ([type("Typo", (Witness,), {"on_evalution": print})()], "did you mean on_evaluation"),
        ([type("Epochs", (Witness,), {"on_fit_end": print})()], "has on_fit_end, which is never called"),
        ([type("One", (), {"on_step": lambda self, step: None})()], r"needs on_step\(step, metrics\)"),
        ([type("No", (), {"on_checkpoint": 3})()], r"needs on_checkpoint\(step, folder\)"),
    ],
)
def test_what_cannot_be_called_is_refused_at_once(tmp_path, callbacks, message):
    with pytest.raises(UserError, match=message):
        pretrain("no such recipe", out=str(tmp_path / "run"), callbacks=callbacks)


def test_only_the_first_process_calls(monkeypatch):
    witness = Witness()
    callbacks = Callbacks([witness])
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    callbacks.on_step(1, {"loss": 1.0})
    assert not witness.seen
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    callbacks.on_step(2, {"loss": 1.0})
    assert witness.seen == [("step", 2)]
