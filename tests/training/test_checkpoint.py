import json
import random
import time
from pathlib import Path

import pytest
import torch

from foveola.config import UserError
from foveola.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def state_of(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "model": {"weight": torch.randn(4, 3, generator=generator), "count": torch.tensor(step)},
        "optimizer": [{"lr": 0.1, "betas": (0.9, 0.95)}],
        "rng": generator.get_state(),
    }


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_is_saved_comes_back(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    path = checkpoint.save(tmp_path, 7, state_of(7))
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert checkpoint.newest(tmp_path) == path
    assert same(checkpoint.read_checkpoint(path), state_of(7))
    checkpoint.save(tmp_path, 123_456_789, state_of(9))  # more digits than the name is padded to
    assert checkpoint.newest(tmp_path).name == "step-123456789"


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 5, state_of(1))
    checkpoint.save(tmp_path, 5, state_of(2))
    assert same(checkpoint.read_checkpoint(checkpoint.newest(tmp_path)), state_of(2))
    assert steps_in(tmp_path) == [5]


def test_pruning_keeps_the_last_and_the_milestones(tmp_path):
    for step in range(10, 80, 10):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2, keep_every=30)
    assert steps_in(tmp_path) == [30, 60, 70]
    checkpoint.save(tmp_path, 80, {"step": 80}, keep=1)
    assert steps_in(tmp_path) == [80]


def test_a_damaged_newer_one_does_not_push_out_a_whole_one(tmp_path):
    checkpoint.save(tmp_path, 10, state_of(10), keep=1)
    (checkpoint.save(tmp_path, 20, state_of(20), keep=2) / "state.pt").write_bytes(b"")
    assert checkpoint.newest(tmp_path).name == "step-00000010"
    checkpoint.save(tmp_path, 15, state_of(15), keep=1)
    assert checkpoint.newest(tmp_path).name == "step-00000015"
    checkpoint.save(tmp_path, 20, state_of(20), keep=1)
    assert same(checkpoint.read_checkpoint(checkpoint.newest(tmp_path)), state_of(20))
    assert steps_in(tmp_path) == [20]


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "no state", "torn manifest", "empty"])
def test_damaged_checkpoints_are_passed_over(tmp_path, damage):
    good = checkpoint.save(tmp_path, 1, state_of(1))
    bad = checkpoint.save(tmp_path, 2, state_of(2))
    state, manifest = bad / "state.pt", bad / "manifest.json"
    data = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(data[:-1])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "torn manifest":
        manifest.write_text(manifest.read_text()[:20])
    for name, file in (("no manifest", manifest), ("no state", state)):
        if damage in (name, "empty"):
            file.unlink()
    assert checkpoint.newest(tmp_path) == good
    with pytest.raises(UserError, match="step-00000002 is damaged"):
        checkpoint.read_checkpoint(bad)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.read_checkpoint(tmp_path / "nothing")


def test_a_manifest_of_something_else_is_not_whole(tmp_path):
    for text in ("[]", "{}", '{"files": 3}', '{"files": {"../x": 1}}', "null"):
        (tmp_path / "manifest.json").write_text(text)
        assert not checkpoint.is_whole(tmp_path)


def test_objects_that_cannot_be_read_back_safely_are_refused(tmp_path):
    checkpoint.save(tmp_path, 1, state_of(1))
    with pytest.raises(TypeError, match=r"cannot hold objects of .*Path"):
        checkpoint.save(tmp_path, 2, {"path": Path("x")})
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    assert steps_in(tmp_path) == [1]


KILLED_AT_EACH_CALL = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from foveola.training import checkpoint

folder, outcomes = Path(sys.argv[1]), []
first, second = {"x": torch.zeros(1000)}, {"x": torch.ones(1000)}

def die_at(count):
    seen = [0]
    def wrap(function):
        def wrapped(*arguments, **options):
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return wrapped
    for name in ("fsync", "rename", "open", "unlink", "rmdir", "mkdir"):
        setattr(os, name, wrap(getattr(os, name)))
    torch.save, shutil.rmtree = wrap(torch.save), wrap(shutil.rmtree)

for replace in (False, True):
    for count in range(1, 100):
        run = folder / f"{replace}-{count}"
        checkpoint.save(run, 1, first)
        if (child := os.fork()) == 0:
            die_at(count)
            checkpoint.save(run, 1 if replace else 2, second, keep=1)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        found = checkpoint.read_checkpoint(checkpoint.newest(run))["x"]
        outcomes.append([replace, count, finished, found.unique().tolist()])
        checkpoint.save(run, 3, second, keep=1)                       # and life goes on
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
        if finished:
            break
print(json.dumps(outcomes))
"""


def test_kill_9_at_every_system_call_of_a_save(tmp_path, run_ranks):
    """Killed before its first, second, ... call that touches the disk, a save loses nothing from before."""
    (printed,) = run_ranks(KILLED_AT_EACH_CALL, ranks=1, words=[str(tmp_path)])
    outcomes = json.loads(printed)
    for replace in (False, True):
        mine = [outcome for outcome in outcomes if outcome[0] == replace]
        assert len(mine) > 8  # so many places to die at
        values = [value for *_, value in mine]
        assert values == sorted(values)  # the old state, then, from the rename on, the new
        assert (values[0], values[-1]) == ([0.0], [1.0])
        assert [finished for _, _, finished, _ in mine] == [False] * (len(mine) - 1) + [True]


WRITES_FOR_EVER = """
import sys, torch
from pathlib import Path
from foveola.training import checkpoint
for step in range(1, 10_000):
    checkpoint.save(Path(sys.argv[1]), step, {"x": torch.full((2_000_000,), float(step))}, keep=1)
    print(step, flush=True)
"""


def test_kill_9_at_any_time(tmp_path, forked):
    with forked(WRITES_FOR_EVER, [str(tmp_path)]) as process:
        while len(process.printed[0].read_text().splitlines()) < 3:
            time.sleep(0.001)
        time.sleep(random.Random(0).uniform(0.0, 0.05))
        process.kill()
        process.wait()
        said = process.printed[0].read_text().splitlines()
    state = checkpoint.read_checkpoint(checkpoint.newest(tmp_path))
    assert state["x"].unique().item() >= int(said[-1])


def test_what_could_not_be_written_leaves_the_disk(tmp_path, monkeypatch):
    """A half-written checkpoint would fill the disk that was too small for it."""

    def half(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 1, {"step": 1})
    assert not list((tmp_path / "checkpoints").iterdir())
