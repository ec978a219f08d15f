"""Runs from end to end: interrupted and resumed, on several processes, on bad data, evaluated, diverging."""

import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import foveola
from foveola.config import ConfigError, UserError, dump_yaml, read_yaml
from foveola.data.sample import DataError
from foveola.data.sources import open_source
from foveola.methods.distillation import Distillation
from foveola.methods.method import Output
from foveola.training import checkpoint, folder
from foveola.training.loop import Diverged
from foveola.training.run import pretrain, untrained
from foveola.training.same_data import images_of_run

ROOT = Path(__file__).resolve().parents[2]


# -- the run folder ------------------------------------------------------------------------------------------


def test_a_run_writes_what_the_design_promises(tiny, tmp_path, lines, newest):
    config = tiny(out=str(tmp_path / "run"))
    run = pretrain(config)
    assert (run.finished, run.step, run.total_steps, run.folder) == (True, 8, 8, tmp_path / "run")
    assert {path.name for path in run.folder.iterdir()} == {
        *(".lock", "checkpoints", "config.yaml", "data.json", "data.npz"),
        *("encoder", "log.txt", "metrics.jsonl", "tensorboard"),
    }
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == [
        *("step-00000003", "step-00000006", "step-00000008")
    ]
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, 9))
    promised = {"step", "epoch", "loss", "loss/token", "loss/patch", "loss/spread", "lr", "weight_decay"}
    promised |= {"momentum", "grad_norm", "images_per_second", "data_wait", "seconds"}
    promised |= {"token/target_entropy", "token/kl_to_uniform", "token/prototypes_used"}  # signs of collapse
    promised |= {"feature_spread", "effective_rank"}
    for line in logged:
        assert promised <= line.keys()
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values())
        assert line["loss"] == pytest.approx(line["loss/token"] + line["loss/patch"] + line["loss/spread"])
        assert line["epoch"] == line["step"] / 4
        assert 0 <= line["data_wait"] <= 1
    assert run.metrics.items() <= logged[-1].items() | {("step", 8)}

    encoder = foveola.load(run.folder)
    state = newest(run.folder)["trainer"]["method"]
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, state[f"teacher.backbone.{name}"]), name
    assert encoder.config.model.shape == (32, 2, 2)
    assert encoder.config.transform.crop == 32
    images = torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 1, 16, dtype=torch.bool)
    mask[..., 5] = True
    assert not torch.equal(encoder(images).objects, encoder(images, mask).objects)


def test_the_saved_configuration_repeats_the_run(tiny, tmp_path, same, newest):
    one = pretrain(tiny(out=str(tmp_path / "one")))
    saved = tmp_path / "one" / "config.yaml"
    assert read_yaml(saved)["out"] is None
    two = pretrain(saved, out=str(tmp_path / "two"))
    same(newest(one.folder)["trainer"], newest(two.folder)["trainer"])
    assert saved.read_bytes() == (tmp_path / "two" / "config.yaml").read_bytes()


def test_python_takes_overrides_in_every_form(tiny, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(tiny()))
    wishes = {"optimizer.lr.value": 0.5, "duration": "2 steps"}
    run = foveola.pretrain(
        tmp_path / "recipe.yaml", out=str(tmp_path / "a"), seed=3, model={"depth": 1}, **wishes
    )
    assert (run.config.seed, run.config.model.depth, run.config.model.width) == (3, 1, 32)
    assert run.config.optimizer.lr.value == 0.5
    assert run.encoder().config.origin == "tiny"
    again = foveola.pretrain(run.config, out=str(tmp_path / "b"), **{"model.depth": 2})
    assert (again.config.seed, again.config.model.depth, again.total_steps) == (3, 2, 2)


# -- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, [1] * 7),  # after each single step
        ({"loader.workers": 2}, [5]),  # in the second epoch
        ({"accumulate": 2}, [3]),
        ({"precision": "fp16", "seed": 5}, [2, 3]),
        ({"method.token.target.kind": "sinkhorn", "checkpoint_activations": True}, [4]),  # between epochs
    ],
    ids=["every-step", "two-workers", "accumulate", "fp16", "sinkhorn"],
)
def test_an_interrupted_run_ends_bit_for_bit_as_one_in_a_go(
    tiny, tmp_path, same, newest, lines, interrupt_after, whole, changes, stops
):
    if changes:
        whole = pretrain(tiny(out=str(tmp_path / "whole"), **changes)).folder
    parts = tiny(out=str(tmp_path / "parts"), **changes)
    done = 0
    for stop in stops:
        interrupt_after(stop)
        run = pretrain(parts)
        done += stop
        assert (run.step, run.finished) == (done, False)
    interrupt_after(0)
    last = pretrain(parts)
    assert (last.step, last.finished) == (8, True)
    same(newest(whole), newest(last.folder))
    for name, value in foveola.load(whole).state_dict().items():
        assert torch.equal(value, last.encoder().state_dict()[name])
    assert lines(whole) == lines(last.folder)  # every step once, with the same numbers
    assert f"going on after step {done}" in (last.folder / "log.txt").read_text()


def test_a_new_run_takes_the_steps_of_a_fresh_start_not_of_a_resumed_one(tiny, tmp_path, newest, whole):
    """The comparison above sees when something is not restored."""
    for part in ("optimizer", "method"):
        path = shutil.copytree(whole, tmp_path / part)
        shutil.rmtree(path / "checkpoints" / "step-00000008")
        state = checkpoint.read_checkpoint(path / "checkpoints" / "step-00000006")
        broken = state["trainer"][part]
        if part == "optimizer":
            broken[0]["exp_avg"] *= 1.01
        else:
            broken["token.targets.centering.center"] += 0.01
        checkpoint.save(path, 6, state, keep=10)
        again = pretrain(tiny(out=str(path)))
        ours, theirs = newest(whole)["trainer"]["method"], newest(again.folder)["trainer"]["method"]
        assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_started_again_does_nothing(tiny, tmp_path, snapshot, capsys):
    config = tiny(out=str(tmp_path / "run"))
    pretrain(config)
    before = snapshot(tmp_path)
    capsys.readouterr()
    again = pretrain(config)
    assert (again.step, again.finished, again.metrics) == (8, True, {})
    assert snapshot(tmp_path) == before
    assert "nothing to do" in capsys.readouterr().out


def test_without_out_the_unfinished_run_of_the_same_settings_goes_on(
    tiny, tmp_path, monkeypatch, interrupt_after
):
    monkeypatch.chdir(tmp_path)
    interrupt_after(3)
    first = pretrain(tiny())
    assert first.folder.parent == Path("runs")
    assert first.folder.name.startswith("tiny-2")
    interrupt_after(2)
    other = pretrain(tiny(seed=1))
    assert other.folder != first.folder
    (tmp_path / "runs" / "tiny-9-broken").mkdir()
    (tmp_path / "runs" / "tiny-9-broken" / "config.yaml").write_text("this: [is not\n")
    interrupt_after(0)
    second = pretrain(tiny(log_every=2))  # what does not change the result may differ
    assert (second.folder, second.step) == (first.folder, 8)
    third = pretrain(tiny(duration="2 steps"))
    assert third.folder not in (first.folder, other.folder)
    fourth = pretrain(tiny(duration="2 steps"))  # finished ones are left alone
    assert fourth.folder != third.folder
    assert fourth.metrics


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"optimizer.lr.value": 0.1},
        {"views.masking": None, "method.patch": None},
        {"batch_size": 8},
    ],
    ids=str,
)
def test_other_settings_on_a_run_are_an_error_and_nothing_is_overwritten(tiny, tmp_path, snapshot, changes):
    pretrain(tiny(out=str(tmp_path / "run"), duration="2 steps"))
    before = snapshot(tmp_path)
    with pytest.raises(
        ConfigError, match=r"run holds another run \(its .* is .*, not .*\): choose another out="
    ):
        pretrain(tiny(out=str(tmp_path / "run"), duration="2 steps", **changes))
    assert snapshot(tmp_path) == before


def test_what_is_no_run_is_left_alone(tiny, tmp_path, snapshot):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("work of years")
    (tmp_path / "file").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="mine is not empty and holds no run"):
        pretrain(tiny(out=str(tmp_path / "mine")))
    with pytest.raises(ConfigError, match="file is a file, not a folder"):
        pretrain(tiny(out=str(tmp_path / "file")))
    with pytest.raises(UserError, match=r"cannot write to the run folder .*: Not a directory"):
        pretrain(tiny(out=str(tmp_path / "file" / "run")))
    assert snapshot(tmp_path) == before


HOLD = """
import sys, pathlib, time
from foveola.training.folder import lock
with lock(pathlib.Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(600)
"""


def wait_for(path: Path, enough, process, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not (path.exists() and enough(path.read_text())):
        assert time.monotonic() < end, process.errors[0].read_text()
        time.sleep(0.02)


def test_two_processes_do_not_train_in_one_folder(tiny, tmp_path, monkeypatch, forked):
    monkeypatch.chdir(tmp_path)
    folder_ = tmp_path / "runs" / "tiny-20260101-000000"
    folder_.mkdir(parents=True)
    images = images_of_run(open_source(tiny().data))
    folder.begin(folder_, tiny(), images)
    assert folder.choose_folder(tiny(), 8, images).folder.resolve() == folder_
    with forked(HOLD, [str(folder_)]) as other:
        wait_for(other.printed[0], lambda text: text == "held\n", other)
        with pytest.raises(UserError, match=r"another process is training in .*tiny-2026"):
            pretrain(tiny(out=str(folder_)))
        assert folder.choose_folder(tiny(), 8, images).folder.resolve() != folder_
    assert pretrain(tiny(out=str(folder_))).finished


KILL = """
import os, signal, sys, torch
from foveola.training.run import pretrain
save, calls = torch.save, []

def torn(state, path):
    calls.append(path)
    save(state, path)
    if len(calls) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = torn
pretrain(sys.argv[1], out=sys.argv[2])
"""


def test_killed_while_it_writes_a_checkpoint_a_run_goes_on_from_the_one_before(
    tiny, tmp_path, same, newest, lines, whole, forked
):
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tiny()))
    with forked(KILL, [str(tmp_path / "tiny.yaml"), str(tmp_path / "killed")]) as process:
        assert process.wait() == [-signal.SIGKILL], process.errors[0].read_text()
    assert newest(tmp_path / "killed")["step"] == 3
    assert max(line["step"] for line in lines(tmp_path / "killed")) == 6
    resumed = pretrain(tiny(out=str(tmp_path / "killed")))
    same(newest(whole), newest(resumed.folder))
    assert lines(whole) == lines(resumed.folder)
    left = [path.name for path in (resumed.folder / "checkpoints").iterdir()]
    assert sorted(left) == ["step-00000003", "step-00000006", "step-00000008"]


# -- signals -------------------------------------------------------------------------------------------------


COMMAND = "import sys; from foveola.cli import main; sys.exit(main())"


def test_signals_checkpoint_and_exit_0_and_the_same_command_goes_on(
    tiny, tmp_path, newest, lines, forked, monkeypatch
):
    config = tiny(duration="100000 steps", checkpoint_every="100000 steps", **{"loader.workers": 2})
    (tmp_path / "tiny.yaml").write_text(dump_yaml(config))
    monkeypatch.chdir(tmp_path)
    last = 0
    for number in (signal.SIGTERM, signal.SIGINT):  # others are tested below, in this process
        with forked(COMMAND, ["pretrain", "tiny.yaml"]) as process:
            end = time.monotonic() + 60
            while (metrics := next(tmp_path.glob("runs/*/metrics.jsonl"), None)) is None:
                assert time.monotonic() < end, process.errors[0].read_text()
                time.sleep(0.02)
            wait_for(metrics, lambda text, n=last + 5: len(text.splitlines()) > n, process)
            if number == signal.SIGINT:
                os.killpg(process.pids[0], number)  # Ctrl-C reaches all processes of a terminal
            else:
                os.kill(process.pids[0], number)
            codes, errors = process.wait(30), process.errors[0].read_text()
        assert codes == [0], errors
        assert "Traceback" not in errors
        (run,) = tmp_path.glob("runs/*")
        steps = [line["step"] for line in lines(run)]
        assert steps == list(range(1, len(steps) + 1))
        assert newest(run)["step"] == steps[-1] > last
        assert f"stopped after step {steps[-1]} of 100000; the same command goes on from there" in errors
        if last:
            assert f"going on after step {last} " in errors
        last = steps[-1]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_closed_terminal_and_batch_systems_end_a_run_with_a_checkpoint(
    tiny, tmp_path, newest, interrupt_after, name
):
    interrupt_after(2, number := getattr(signal, name))
    before = signal.signal(number, signal.SIG_DFL)  # nohup may have started these tests
    try:
        run = pretrain(tiny(out=str(tmp_path / "run")))
        assert run.step == newest(run.folder)["step"] == 2
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_what_nohup_ignores_stays_ignored(tiny, tmp_path, interrupt_after):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_after(2, signal.SIGHUP)
        assert pretrain(tiny(out=str(tmp_path / "run"))).finished
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_an_evaluation_waits_for_it(tiny, tmp_path, lines, forked, monkeypatch):
    """Ctrl-C reaches the workers of the evaluation, too, and must not break them."""
    evaluation = {"evaluate_every": "1 steps", "evaluate.workers": 2, "evaluate.limit": 64}
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tiny(duration="1000 steps", **evaluation)))
    monkeypatch.chdir(tmp_path)
    with forked(COMMAND, ["pretrain", "tiny.yaml", "out=run"]) as process:
        wait_for(tmp_path / "run" / "metrics.jsonl", lambda text: "knn/" in text, process)
        time.sleep(0.1)  # into the next one: a step is short, an evaluation is not
        os.killpg(process.pids[0], signal.SIGINT)
        codes, errors = process.wait(60), process.errors[0].read_text()
    assert codes == [0], errors
    assert "Traceback" not in errors
    assert errors.count("stopping after this step") == 1  # workers are silent
    steps = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert f"stopped after step {steps[-1]} of 1000" in errors


def test_an_impatient_second_interruption_ends_at_once(tiny, tmp_path, monkeypatch):
    from foveola.training import signals

    # A shell that starts this in the background has interruptions ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with signals.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun's copy of the first
        assert stop.requested
        monkeypatch.setattr(signals, "IMPATIENT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, before)


def test_a_process_that_was_just_forked_says_nothing_of_a_signal(capfd, monkeypatch):
    """A worker that has not yet set its own handlers has those of the run."""
    from foveola.training import signals

    with signals.Stop() as stop:
        own = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        signal.raise_signal(signal.SIGTERM)
        assert not stop.requested
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_run_in_a_thread_works_without_signals(tiny, tmp_path):
    runs = []
    thread = threading.Thread(
        target=lambda: runs.append(pretrain(tiny(out=str(tmp_path), duration="2 steps")))
    )
    thread.start()
    thread.join()
    assert runs[0].finished


# -- several processes ---------------------------------------------------------------------------------------


def test_two_processes_resume_bit_for_bit_and_equal_one_process(
    tiny, tiny_tree, plain_tree, tmp_path, stopped_ranks, same, newest, lines
):
    """One of two processes is told to stop in the second epoch; both stop, resume, and end alike.

    Without random views, two processes are one process with the whole batch, but for rounding.
    """
    from foveola.config import merge

    whole, parts, plain = (str(tmp_path / name) for name in ("whole", "parts", "plain"))
    work = [
        (tiny_tree, whole, 0),
        (tiny_tree, parts, 5),
        (tiny_tree, parts, 0),
        (merge(tiny_tree, plain_tree), plain, 0),
    ]
    first, second = stopped_ranks(work)
    assert first == second  # the same steps, folders, and weights of students, teachers and centres
    assert [step for step, *_ in first] == [8, 5, 8, 8]
    assert first[0][2] == first[2][2]
    same(newest(Path(whole)), newest(Path(parts)))
    assert lines(Path(whole)) == lines(Path(parts))

    alone = pretrain(tiny(plain_tree, out=str(tmp_path / "alone")))
    one, two = newest(alone.folder)["trainer"]["method"], newest(Path(plain))["trainer"]["method"]
    floats = [name for name, value in one.items() if value.is_floating_point()]
    assert max((one[name] - two[name]).abs().max().item() for name in floats) < 1e-4
    for a, b in zip(lines(alone.folder), lines(Path(plain)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


# -- data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of 128 small images of two classes."""
    rng = np.random.default_rng(0)
    for number in range(128):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_replaced_counted_and_named(tiny, tmp_path, images, lines, workers):
    truncate(images / "class1" / "033.jpg")
    data = {"data": f"folder:{images}", "loader.workers": workers}
    run = pretrain(tiny(out=str(tmp_path / "run"), duration="3 epochs", **data))
    text = (run.folder / "log.txt").read_text()
    assert text.count("033.jpg") == 1
    assert "unreadable images, replaced by others: class1/033.jpg (" in text
    assert "has no objects, so each image counts as one object" in text
    counts = [line["bad_images"] for line in lines(run.folder)]
    assert counts == sorted(counts)
    assert counts[-1] == 1


def test_a_name_that_is_not_utf8_and_files_of_other_kinds_are_said_and_end_nothing(tiny, tmp_path, images):
    (images / "scan.xyz").touch()
    Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.png")).write_bytes(b"no image")
    run = pretrain(tiny(data=f"folder:{images}", out=str(tmp_path / "run"), **{"loader.max_bad": 0.5}))
    text = (run.folder / "log.txt").read_text(encoding="utf-8")
    assert run.finished
    assert "caf\\udce9.png (not an image of a known kind)" in text
    assert "files of other kinds are left out: 1 .xyz" in text


def test_too_many_bad_images_are_an_error(tiny, tmp_path, images):
    for number in (3, 33, 63, 93):
        truncate(images / "class1" / f"{number:03d}.jpg")
    config = tiny(out=str(tmp_path / "run"), duration="3 epochs", data=f"folder:{images}")
    with pytest.raises(DataError, match=r"images cannot be read, more than loader.max_bad=0.01"):
        pretrain(config)
    assert "more than loader.max_bad=0.01" in (tmp_path / "run" / "log.txt").read_text()
    # A larger share may be allowed, on the same run.
    run = pretrain(
        tiny(out=str(tmp_path / "run"), duration="3 epochs", data=config.data, **{"loader.max_bad": 0.1})
    )
    assert run.finished


# -- evaluation ----------------------------------------------------------------------------------------------


def test_evaluations_are_logged_and_change_nothing_else(tiny, tmp_path, same, newest, lines, whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = pretrain(tiny(out=str(tmp_path / "run"), evaluate_every="1 epochs"))
    same(newest(whole), newest(run.folder))
    measured = [line for line in lines(run.folder) if "knn/top1_masks" in line]
    trained = [line for line in lines(run.folder) if "loss" in line]
    assert [line["step"] for line in measured] == [4, 8]
    assert trained == lines(whole)
    assert all(0 <= line["knn/top1_plain"] <= 100 for line in measured)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("knn/top1_masks")}
    assert scalars == pytest.approx({line["step"]: line["knn/top1_masks"] for line in measured})
    # The same numbers as an evaluation of the encoder that was kept.
    settings = {"rows": "objects", "view": "object", "workers": 0, "limit": 24, "k": [5]}
    result = foveola.evaluate(
        run.folder,
        "knn",
        train=run.config.data,
        test=run.config.data,
        device="cpu",
        progress=False,
        **settings,
    )
    assert result.metrics == pytest.approx(
        {k[4:]: v for k, v in measured[-1].items() if k.startswith("knn/")}
    )


def test_an_evaluation_that_an_interruption_left_out_is_made_up(tiny, tmp_path, lines, interrupt_after):
    config = tiny(out=str(tmp_path / "run"), evaluate_every="4 steps")
    interrupt_after(4)
    pretrain(config)
    assert not any("knn/top1_plain" in line for line in lines(tmp_path / "run"))
    interrupt_after(0)
    pretrain(config)
    assert [line["step"] for line in lines(tmp_path / "run") if "knn/top1_plain" in line] == [4, 8]
    # A finished run may still be asked, as nothing of it changes.
    late = tiny(out=str(tmp_path / "late"))
    pretrain(late)
    pretrain(tiny(out=str(tmp_path / "late"), evaluate_every="8 steps"))
    assert [line["step"] for line in lines(tmp_path / "late") if "knn/top1_plain" in line] == [8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_train": "folder:/nowhere"}, "no folder /nowhere"),
        (
            {"evaluate_test": "scenes:?split=train&size=32&count=64"},
            "24 of 24 test images are in train as well .*: set evaluate_test=",
        ),
    ],
)
def test_mistakes_in_evaluations_show_before_the_first_step(tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        pretrain(tiny(out=str(tmp_path / "run"), evaluate_every="1 epochs", **changes))
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_labels(tiny, tmp_path, images):
    for path in images.glob("*/*.jpg"):
        path.rename(images / path.name)
    for path in images.glob("class*"):
        path.rmdir()
    config = tiny(out=str(tmp_path / "run"), data=f"folder:{images}", evaluate_every="1 epochs")
    with pytest.raises(
        ConfigError, match=r"evaluate_train: folder:.* has no labels, which evaluate_every needs"
    ):
        pretrain(config)


def test_untrained_encoders(tiny, tmp_path):
    run = pretrain(tiny(out=str(tmp_path / "run"), seed=3))
    before = torch.get_rng_state()
    fresh = foveola.load(f"untrained:{run.folder}")
    assert torch.equal(torch.get_rng_state(), before)
    # Drawn by the seed of the run: these are the weights that it began with.
    first = untrained(run.config).backbone.state_dict()
    for name, value in fresh.backbone.state_dict().items():
        assert torch.equal(value, first[name])
    assert fresh.config.transform == run.encoder().config.transform
    assert fresh.config.origin == "untrained"
    assert fresh.fingerprint() != run.encoder().fingerprint()
    with pytest.raises(UserError, match="no model at nowhere"):
        foveola.load("untrained:nowhere")
    settings = {"rows": "objects", "view": "object", "workers": 0, "limit": 24, "k": [5]}
    result = foveola.evaluate(
        f"untrained:{run.folder}",
        "knn",
        train=run.config.data,
        test=run.config.data,
        progress=False,
        **settings,
    )
    assert result.encoder == fresh.fingerprint()
    assert not (run.folder / "results").exists()  # it is not this run that was measured


# -- divergence ----------------------------------------------------------------------------------------------


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny, tmp_path, monkeypatch, newest, lines
):
    forward = Distillation.forward

    def spoiled(self, batch, progress):
        output = forward(self, batch, progress)
        factor = math.nan if progress.step >= 4 else 1.0
        return Output({name: loss * factor for name, loss in output.losses.items()}, output.logs)

    config = tiny(out=str(tmp_path / "run"), checkpoint_every="3 steps")
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "forward", spoiled)
        with pytest.raises(Diverged, match=r"up to step 7: .*step-00000003 is from before that"):
            pretrain(config)
    state = newest(tmp_path / "run")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["trainer"]["method"].values())
    assert [line["loss"] is None for line in lines(tmp_path / "run")] == [False] * 4 + [True] * 2
    notes = (tmp_path / "run" / "log.txt").read_text()
    assert "step 5: gradients are not finite" in notes
    assert "step-00000003 is from before that" in notes
    assert pretrain(config).finished


def test_features_that_are_not_finite_end_in_the_message_of_divergence(tiny, tmp_path):
    """Every step is logged, so signals of collapse are asked for while the features are not finite."""
    with pytest.raises(Diverged, match="not finite in 3 steps in a row"):
        pretrain(tiny(out=str(tmp_path / "run"), duration="12 steps", **{"optimizer.lr.value": 1e30}))


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": None, "about": {"data": "coco:/x"}},
            r"recipe 'tiny' needs data=..., for example data=coco:/x",
        ),
        ({"data": "folder:/nowhere"}, "no folder /nowhere"),
        ({"batch_size": 65}, "has 64 images, fewer than batch_size=65: write batch_size=32$"),
        ({"accumulate": 3}, "batch_size=16 cannot be shared by 1 process x accumulate=3"),
        ({"accumulate": 32}, "batch_size=16 cannot be shared by 1 process x accumulate=32"),
        ({"duration": "soon"}, r"duration: not a duration: 'soon'"),
        ({"duration": "5 %"}, "duration: the length of the run cannot be a fraction of itself"),
        ({"duration": "0 steps"}, "duration: '0 steps' is less than a step of 16 images"),
        ({"checkpoint_every": "3 samples"}, "checkpoint_every: '3 samples' is less than a step"),
        ({"keep_every": "often"}, "keep_every: not a duration: 'often'"),
        ({"evaluate_every": "120 %"}, "evaluate_every: not a fraction of the run"),
        ({"optimizer.freeze_last_layer": "1 day"}, "optimizer.freeze_last_layer: not a duration: '1 day'"),
        ({"optimizer.lr.warmup": "x"}, r"optimizer\.lr\.warmup: not a duration: 'x'"),
        (  # all at once, with what to write
            {"batch_size": 99, "accumulate": 2, "keep_every": "often", "optimizer.lr.warmup": "x"},
            r"batch_size=99 cannot be shared by 1 process x accumulate=2; .* has 64 images, fewer than "
            r"batch_size=99; keep_every: not a duration.*; optimizer.lr.warmup: not a duration: 'x'.*: "
            r"write batch_size=32$",
        ),
        ({"batch_size": 1, "duration": "8 steps"}, r"method\.spread \(KoLeo\) compares the images"),
        ({"accumulate": 16}, r"method\.spread \(KoLeo\) compares the images"),
        ({"device": "gpu"}, "no such device: 'gpu'"),
    ],
    ids=str,
)
def test_mistakes_name_the_key_before_anything_is_written(tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        pretrain(tiny(out=str(tmp_path / "run"), **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_old_checkpoints_go_and_some_stay_for_good(tiny, tmp_path):
    pretrain(tiny(out=str(tmp_path / "run"), checkpoint_every="1 steps", keep=2, keep_every="3 steps"))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-0000000{step}" for step in (3, 6, 7, 8)]


def test_what_is_kept_for_good_is_also_written(tiny, tmp_path):
    pretrain(tiny(out=str(tmp_path / "run"), checkpoint_every="5 steps", keep=1, keep_every="3 steps"))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-0000000{step}" for step in (3, 6, 8)]


def test_encoders_of_kept_steps_are_those_of_their_checkpoints(tiny, tmp_path):
    run = pretrain(tiny(out=str(tmp_path / "run"), keep_every="4 steps"))
    kept = sorted(path.name for path in (run.folder / "encoders").iterdir())
    assert kept == ["step-00000004", "step-00000008"]
    for name in kept:
        teacher = checkpoint.read_checkpoint(run.folder / "checkpoints" / name)["trainer"]["method"]
        weights = foveola.load(run.folder / "encoders" / name).backbone.state_dict()
        assert weights
        assert all(torch.equal(teacher[f"teacher.backbone.{key}"], value) for key, value in weights.items())
    assert foveola.load(run.folder / "encoders" / kept[1]).fingerprint() == run.encoder().fingerprint()
