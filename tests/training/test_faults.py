"""Faults on the way: what is whole is kept and goes on bit for bit, and log.txt says why a run ended."""

import builtins
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from foveola.config import UserError, dump_yaml
from foveola.data.sample import DataError, Sample
from foveola.data.scenes import Scenes
from foveola.files import RunFolder, facts_of
from foveola.training import checkpoint
from foveola.training.run import _Session, pretrain

FAULTS = {
    2: MemoryError("Unable to allocate 1.00 TiB"),
    4: OSError(28, "No space left on device", "/x"),
    6: UserError("such data"),
    8: ZeroDivisionError("a bug"),
}
SAYS = {
    2: "out of memory: Unable to allocate 1.00 TiB; ",
    4: "/x: No space left on device; make room on that disk; ",
    6: "such data; ",
    8: "ZeroDivisionError('a bug'); ",
}


def test_whatever_fails_between_steps_the_state_is_kept(tiny, tmp_path, same, newest, lines, monkeypatch):
    whole = pretrain(tiny(out=str(tmp_path / "whole"), checkpoint_every="2 steps"))
    config, left = tiny(out=str(tmp_path / "run"), checkpoint_every="2 steps"), dict(FAULTS)

    def failing(self, step, log):  # before the checkpoint of that step
        if step in left:
            raise left.pop(step)

    monkeypatch.setattr(_Session, "_draw", failing)
    for step in FAULTS:
        with pytest.raises(ZeroDivisionError if step == 8 else UserError) as caught:
            pretrain(config)
        assert newest(tmp_path / "run")["step"] == step
        kept = f"kept: {tmp_path}/run/checkpoints/step-{step:08d}, from where the same command goes on"
        text = (tmp_path / "run" / "log.txt").read_text()
        assert SAYS[step] in text
        assert kept in text
        if step < 8:
            assert str(caught.value).startswith(SAYS[step])
            assert str(caught.value).endswith(kept)
            assert "\n" not in str(caught.value)
        assert text.count("Traceback") == {2: 1, 4: 2, 6: 2, 8: 3}[step]  # none of a UserError
    same(newest(whole.folder)["trainer"], newest(pretrain(config).folder)["trainer"])
    assert lines(whole.folder) == lines(tmp_path / "run")


class Broken(Scenes):
    """Nothing can be read from the `after`-th read on, for good."""

    def __init__(self, after: int) -> None:
        super().__init__(size=32, count=64)
        self.left = after

    def __getitem__(self, index: int) -> Sample:
        self.left -= 1
        return super().__getitem__(index) if self.left >= 0 else Sample(b"", f"number {index}")


def test_data_that_cannot_be_read_any_more_cost_no_step(tiny, tmp_path, same, newest, monkeypatch):
    from foveola.training import run

    config = tiny(out=str(tmp_path / "run"), checkpoint_every="1000 steps")
    whole = pretrain(tiny(out=str(tmp_path / "whole"), checkpoint_every="1000 steps"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "as_source", lambda *_: Broken(5 * 16 + 3))
        with pytest.raises(DataError, match=r"20 images cannot be read, such as .*; kept: .*step-00000005, "):
            pretrain(config)
    assert newest(tmp_path / "run")["step"] == 5
    same(newest(whole.folder), newest(pretrain(config).folder))


OF_ANOTHER = """
import sys
from foveola import distributed
from foveola.config import UserError
from foveola.data import loader
from foveola.training.run import pretrain
try_, left = loader._Batches.__getitem__, [4]
def failing(self, step):
    left[0] -= 1
    if self.rank == 1 and left[0] < 0:
        return loader.DataError("the disk of this machine is gone")
    return try_(self, step)
loader._Batches.__getitem__ = failing
try:
    pretrain({recipe!r}, out={out!r})
except UserError as error:
    print(error)
"""


def test_the_reason_of_another_process_ends_all_of_them(tiny, tmp_path, newest, run_ranks):
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tiny(checkpoint_every="1000 steps")))
    out = tmp_path / "run"
    first, second = run_ranks(OF_ANOTHER.format(recipe=str(tmp_path / "tiny.yaml"), out=str(out)))
    kept = f"kept: {out}/checkpoints/step-00000004, from where the same command goes on"
    assert first == f"process 1: the disk of this machine is gone; {kept}\n"
    assert second == f"the disk of this machine is gone; {kept}\n"
    assert newest(out)["step"] == 4
    assert "process 1: the disk of this machine is gone" in (out / "log.txt").read_text()
    assert "going on after step 4" not in (out / "log.txt").read_text()
    resumed = pretrain(tiny(out=str(out), checkpoint_every="1000 steps"))
    assert resumed.finished
    assert "1 processes instead of 2: other views from here on" in (out / "log.txt").read_text()


# -- damaged run folders -------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    with (path / "state.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"damaged!")


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(tiny, tmp_path, snapshot, capsys):
    config = tiny(out=str(tmp_path / "run"))
    run = pretrain(config)
    shutil.copytree(run.folder, tmp_path / "copy")
    for path in RunFolder(run.folder).found_checkpoints():
        damage(path)
    before = snapshot(run.folder)
    with pytest.raises(UserError, match=r"whole checkpoint \(damaged: step-00000008, step-00000006, "):
        pretrain(config)
    assert snapshot(run.folder) == before
    shutil.rmtree(run.folder / "checkpoints")  # as rsync --exclude checkpoints does
    with pytest.raises(UserError, match=rf"\(none is there\): .* remove {run.folder}/encoder$"):
        pretrain(config)
    shutil.rmtree(run.folder / "encoder")  # as the message says
    assert pretrain(config).finished
    # The newest alone: it is said, and the run goes on from the one before.
    damage(tmp_path / "copy" / "checkpoints" / "step-00000008")
    capsys.readouterr()
    assert pretrain(tiny(out=str(tmp_path / "copy"))).finished
    said = "damaged, so passed over: step-00000008; step-00000006 is the newest whole checkpoint"
    assert said in capsys.readouterr().err
    assert said in (tmp_path / "copy" / "log.txt").read_text()


def test_stray_files_among_checkpoints_do_no_harm(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step-00000007").write_text("a file")
    (checkpoints / ".writing-step-00000001").write_text("a file")
    (checkpoints / "notes.txt").write_text("mine")
    checkpoint.save(tmp_path, 7, {"x": torch.zeros(3)}, keep=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["notes.txt", "step-00000007"]
    newest = checkpoints / "step-00000008"
    newest.mkdir()
    (newest / "manifest.json").write_text('{"step": 8, "files": {}}')
    assert checkpoint.newest_whole(tmp_path) == (checkpoints / "step-00000007", [newest])
    torch.save([1, 2], newest / "state.pt")
    manifest = {"files": {"state.pt": facts_of(newest / "state.pt")}}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="step-00000008 is no checkpoint of a run: it holds a list"):
        checkpoint.read_checkpoint(newest)


# -- a kill at every file event ------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of SIGKILL: nothing that the product catches."""


def interrupt_at(monkeypatch, folder: Path, count: int) -> Callable[[], int]:
    """Raise Killed at the `count`-th opening for writing, renaming, making or removing in `folder`.

    From then on at every further one, as nobody is left to clean up. Returns how many there were.
    """
    seen = [0]

    def guarded(function, writes=lambda *_: True):
        def wrapper(path, *arguments, **options):
            named = isinstance(path, str | os.PathLike) and str(os.fspath(path)).startswith(str(folder))
            if named and writes(*arguments, *options.values()):
                seen[0] += 1
                if seen[0] >= count:
                    raise Killed
            return function(path, *arguments, **options)

        return wrapper

    def to_write(*arguments) -> bool:
        return any(isinstance(a, str) and set(a) & set("wax+") for a in arguments[:1])

    for name in ("rename", "replace", "mkdir", "remove", "unlink", "rmdir", "open"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    monkeypatch.setattr(builtins, "open", guarded(builtins.open, to_write))
    monkeypatch.setattr(io, "open", guarded(io.open, to_write))
    return lambda: seen[0]


def test_killed_at_any_file_event_a_run_ends_as_if_it_had_not_been(
    tiny, tmp_path, same, newest, lines, monkeypatch
):
    """A real kill leaves the same files as an exception that nobody catches, a hundred times faster."""
    short = {
        "duration": "3 steps",
        "checkpoint_every": "1 steps",
        "keep": 2,
        "optimizer.freeze_last_layer": "1 steps",
    }
    short |= {"optimizer.lr.warmup": "1 steps", "method.token.target.temperature.warmup": "1 steps"}
    short |= {"method.patch.target.temperature.warmup": "1 steps"}
    whole = pretrain(tiny(out=str(tmp_path / "whole"), **short))
    with monkeypatch.context() as patch:
        counted = interrupt_at(patch, tmp_path / "counted", 10**9)
        pretrain(tiny(out=str(tmp_path / "counted"), **short))
        events = counted()
    assert events > 40
    for at in range(events, 0, -(events // 8)):  # some, spread over all
        config = tiny(out=str(tmp_path / f"killed-{at}"), **short)
        with monkeypatch.context() as patch:
            interrupt_at(patch, tmp_path / f"killed-{at}", at)
            with pytest.raises(Killed):
                pretrain(config)
        run = pretrain(config)
        same(newest(whole.folder), newest(run.folder))
        assert lines(run.folder) == lines(whole.folder)
        ours = (run.folder / "encoder" / "model.safetensors").read_bytes()
        assert ours == (whole.folder / "encoder" / "model.safetensors").read_bytes()
