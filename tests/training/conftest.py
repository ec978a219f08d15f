"""A run small enough to repeat many times: it has every kind of state and randomness that a real one has."""

import hashlib
import json
import signal
import socket
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from foveola.config import build, merge
from foveola.training import checkpoint, loop
from foveola.training.recipe import RunConfig, nested
from foveola.training.run import pretrain

# A run in which a difference between processes shows: plain SGD, and nothing random but the views.
SMALL: dict[str, Any] = {
    "data": "scenes:?size=32&count=64",
    "batch_size": 8,
    "duration": "6 steps",
    "device": "cpu",
    "model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32, "drop_path": 0.0},
    "views.global_size": 32,
    "loader": {"canvas": 32, "workers": 0},
    "transform": {"resize": 32, "crop": 32},
    # The first steps of AdamW have the size of the rate however small a gradient is, so that rounding shows.
    "optimizer": {"kind": "sgd", "lr": {"value": 0.1, "warmup": "0 steps"}, "lr_rule": "none"},
}
HEADS = {"prototypes": 30, "hidden": 24, "bottleneck": 16}
# A run on images of any channels and files.
SMALL_MAE: dict[str, Any] = {
    "views": {"global_size": 32},
    "model": {"width": 24, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 32},
    "method": {"decoder": {"width": 16, "depth": 1, "heads": 2}},
    "loader": {"canvas": 40, "workers": 0},
    "transform": None,
    "batch_size": 6,
    "duration": "2 steps",
    "evaluate_every": None,
    "device": "cpu",
}
TARGET = {"temperature": {"value": 0.07, "start": 0.04, "warmup": "1 epochs", "per_epoch": True}}
TINY = {
    "recipe": "tiny",
    "data": "scenes:?size=32&count=64",
    "duration": "2 epochs",  # 8 steps
    "batch_size": 16,
    "device": "cpu",
    "model": {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "drop_path": 0.2,
    },
    "views": {"global_size": 32, "local_size": 16, "local_count": 2, "masking": {}, "objects": {}},
    "method": {
        "heads": {"main": {"prototypes": 32, "hidden": 32, "bottleneck": 16, "norm_last_layer": False}},
        "token": {"target": TARGET},
        "patch": {"target": TARGET},
        "spread": {},
    },
    "loader": {"canvas": 32, "mask_canvas": 32, "workers": 0},
    "optimizer": {
        "lr": {"value": 1e-3, "start": 0.0, "end": 1e-5, "warmup": "2 steps", "shape": "cosine"},
        "lr_rule": "none",
        "freeze_last_layer": "2 steps",
    },
    "evaluate": {"rows": "objects", "view": "object", "workers": 0, "limit": 24, "k": [5]},
    "log_every": 1,
    "checkpoint_every": "3 steps",
    "keep": 10,
}
# Nothing is drawn: every view is the whole image in its own colours.
PLAIN = {
    "views": {
        "global_scale": [1.0, 1.0],
        "ratio": [1.0, 1.0],
        "flip": 0.0,
        "local_count": 0,
        "masking": None,
        "color": {"jitter": 0.0, "grayscale": 0.0, "blur": [0.0] * 3, "solarize": [0.0] * 3},
    },
    "method": {"patch": None, "spread": None},
    "model": {"drop_path": 0.0},
}


RANKS = """
import hashlib, json, os, signal, sys, torch
torch.set_num_threads(1)
from foveola import distributed
from foveola.config import build, read_yaml
from foveola.training import loop, run
from foveola.training.recipe import RunConfig

made, assemble = [], run.assemble
run.assemble = lambda *a: made.append(assemble(*a)) or made[-1]
step, left = loop.Trainer.step, [0]

def counted(self, *arguments):
    values = step(self, *arguments)
    left[0] -= 1
    if left[0] == 0:
        signal.raise_signal(signal.SIGTERM)
    return values

loop.Trainer.step = counted
rank = int(os.environ["RANK"])
for (tree, out, stop), port in zip(json.loads(WORK), PORTS):
    os.environ["MASTER_PORT"] = str(port)
    left[0] = stop if rank == 1 else 0           # the signal reaches one process only
    done = run.pretrain(build(RunConfig, tree), out=out)
    digest = hashlib.sha256()
    for name, value in sorted(made[-1].method.state_dict().items()):
        if torch.is_tensor(value) and not name.endswith("used"):     # each rank counts for itself
            digest.update(value.numpy().tobytes())
    print(json.dumps([done.step, str(done.folder), digest.hexdigest()]))
sys.stdout.flush()
os._exit(0)  # threads that gloo leaves behind now and then abort the interpreter's exit
"""


@pytest.fixture
def tiny_tree() -> dict[str, Any]:
    """A copy: trees that are merged share what they do not change."""
    return deepcopy(TINY)


@pytest.fixture
def tiny() -> Callable[..., RunConfig]:
    """tiny(out=..., **{"model.depth": 3}): the small run, changed."""

    def make(*trees: dict[str, Any], **changes: Any) -> RunConfig:
        tree = TINY
        for each in (*trees, nested(changes)):
            tree = merge(tree, each)
        return build(RunConfig, tree)

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of `tiny()`, which tests read; who changes a run takes a copy."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return pretrain(build(RunConfig, TINY), out=str(folder)).folder


@pytest.fixture
def plain_tree() -> dict[str, Any]:
    return deepcopy(PLAIN)


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """interrupt_after(n): the next run gets a signal while its n-th step ends; 0: it gets none."""
    step = loop.Trainer.step

    def arrange(count: int, number: int = signal.SIGTERM) -> None:
        left = [count]

        def counted(self, *arguments):
            values = step(self, *arguments)
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(number)
            return values

        monkeypatch.setattr(loop.Trainer, "step", counted)

    return arrange


@pytest.fixture
def same_when_interrupted(
    tmp_path: Path,
    same: Callable[[Any, Any], None],
    newest: Callable[[Path], dict[str, Any]],
    lines: Callable[[Path], list[dict[str, Any]]],
    interrupt_after: Callable[..., None],
) -> Callable[[RunConfig], tuple[Path, Path]]:
    """Runs a configuration whole, and ended after 2 steps and after 3 more: both end the same, bit for bit.

    Returns the two folders.
    """

    def check(config: RunConfig) -> tuple[Path, Path]:
        whole = pretrain(config, out=str(tmp_path / "whole"))
        for stop in (2, 3):
            interrupt_after(stop)
            assert not pretrain(config, out=str(tmp_path / "parts")).finished
        interrupt_after(0)
        last = pretrain(config, out=str(tmp_path / "parts"))
        assert last.finished
        same(newest(whole.folder), newest(last.folder))
        assert lines(whole.folder) == lines(last.folder)
        return whole.folder, last.folder

    return check


def _newest(folder: Path) -> dict[str, Any]:
    path = checkpoint.newest(folder)
    assert path is not None
    return checkpoint.read_checkpoint(path)


@pytest.fixture
def newest() -> Callable[[Path], dict[str, Any]]:
    """The newest checkpoint of a run folder, read back."""
    return _newest


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    """Asserts that two nested structures of tensors and numbers are equal, bit for bit."""

    def compare(a: Any, b: Any, where: str = "") -> None:
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for name in a:
                compare(a[name], b[name], f"{where}.{name}")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        else:
            assert a == b, where

    return compare


@pytest.fixture
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """What stands in metrics.jsonl, without what a clock measured."""

    def read(folder: Path) -> list[dict[str, Any]]:
        timed = ("seconds", "images_per_second", "data_wait")
        parsed = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [{name: value for name, value in line.items() if name not in timed} for line in parsed]

    return read


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, str]]:
    """Every file of a folder with a hash of its content."""

    def take(folder: Path) -> dict[str, str]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }

    return take


@pytest.fixture
def stopped_ranks(run_ranks: Callable[..., list[str]]) -> Callable[..., list[list[Any]]]:
    """stopped_ranks([(settings, folder, stop), ...]): each is a run of two processes, of which one gets a
    signal as its step `stop` ends (0: none). Of each process, of each run: the step that it ended at, its
    folder and a hash of what it learned.
    """

    def run(work: list[tuple[dict[str, Any], str, int]]) -> list[list[Any]]:
        probes = [socket.socket() for _ in work]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        code = f"WORK = {json.dumps(work)!r}\nPORTS = {ports}\n{RANKS}"
        return [[json.loads(line) for line in out.splitlines()] for out in run_ranks(code)]

    return run
