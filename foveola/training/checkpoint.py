"""Checkpoints that are whole or not there: written under a temporary name, flushed to disk, then renamed.

    <run>/checkpoints/step-00001000/state.pt        everything needed to go on
                                    manifest.json   its size and SHA-256, written last

A process killed at any moment leaves the earlier checkpoints as they were; `newest` skips what is not whole.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from foveola.config import UserError, kind_of
from foveola.files import RunFolder

_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_TEMPORARY = ".writing-"


def save(
    folder: Path, step: int, state: dict[str, Any], *, keep: int = 2, keep_every: int | None = None
) -> Path:
    """Write `state` as the checkpoint of `step` in the run folder, then remove old ones.

    The newest `keep` checkpoints stay, and besides them every one whose step is a multiple of `keep_every`.
    `state` holds tensors, numbers, text, and lists, tuples and dicts of these: only that can be read back
    safely, anything else raises TypeError. Call it on one process. Returns the checkpoint's folder.
    """
    checkpoints = RunFolder(folder).checkpoints
    checkpoints.mkdir(parents=True, exist_ok=True)
    for stale in checkpoints.glob(f"{_TEMPORARY}*"):
        _remove(stale)
    path = RunFolder(folder).checkpoint(step)
    temporary = checkpoints / f"{_TEMPORARY}{path.name}"
    temporary.mkdir()
    try:
        _write(state, step, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # it may fill the disk that was too small for it
        raise
    _put(temporary, path)
    _prune(checkpoints, step, keep, keep_every)
    return path


def _write(state: dict[str, Any], step: int, temporary: Path) -> None:
    """The files of a checkpoint, on the disk when this returns."""
    torch.save(state, temporary / "state.pt")
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(temporary / "state.pt"):
        raise TypeError(f"a checkpoint cannot hold objects of {', '.join(unsafe)}")
    _sync(temporary / "state.pt")
    manifest = {"step": step, "files": {"state.pt": _facts(temporary / "state.pt")}}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    _sync(temporary / "manifest.json")
    _sync(temporary)


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run folder, or None. Half-written and damaged ones are passed
    over.
    """
    return next((path for path in _found(RunFolder(folder).checkpoints) if is_whole(path)), None)


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest whole checkpoint of a run folder, and the damaged ones that are newer.

    Raises UserError where the run had checkpoints and none is whole: to begin again would overwrite what is
    left of it.
    """
    damaged: list[Path] = []
    for path in _found(RunFolder(folder).checkpoints):
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    run = RunFolder(folder)
    left = [run.encoder.path] if run.encoder.config.exists() else []
    if damaged or left:
        which = f"damaged: {', '.join(path.name for path in damaged)}" if damaged else "none is there"
        remove = " and ".join(map(str, [*left, *([run.checkpoints] if damaged else [])]))
        raise UserError(
            f"{folder} holds a run without a whole checkpoint ({which}): put its checkpoints back, choose "
            f"another out=, or, to train from the beginning, remove {remove}"
        )
    return None, []


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint folder back, tensors on the CPU. Raises UserError when it is missing or damaged."""
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}")
    if not is_whole(path):
        raise UserError(
            f"{path} is damaged: its files do not match its manifest; remove it to use an older one"
        )
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint of a run: it holds {kind_of(state)}")
    return state


def is_whole(path: Path) -> bool:
    """Return whether every file of the checkpoint is as its manifest says, byte for byte."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        return "state.pt" in files and all(_facts(path / name) == facts for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no manifest, or not one of ours
        return False


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _found(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first; one that was being replaced comes after its successor."""
    named = [path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: (-step_of(path), len(path.name)))


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder, from its name."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _put(temporary: Path, path: Path) -> None:
    """Rename a complete checkpoint to its name; one already there stays readable until the new one stands."""
    replaced = path.with_name(path.name + ".replaced")
    if path.exists():
        if replaced.exists():
            _remove(replaced)
        path.rename(replaced)
    temporary.rename(path)
    _sync(path.parent)
    if replaced.exists():
        _remove(replaced)


def _prune(checkpoints: Path, step: int, keep: int, keep_every: int | None) -> None:
    # Later steps can only be damaged ones that a resumed run passed over: they must not push out whole ones.
    past = [path for path in _found(checkpoints) if step_of(path) <= step]
    for old in past[max(keep, 1) :]:
        if not keep_every or step_of(old) % keep_every:
            doomed = old.rename(
                old.with_name(f"{_TEMPORARY}{old.name}")
            )  # never half a checkpoint under its name
            _remove(doomed)


def _remove(path: Path) -> None:
    """A checkpoint, or a stray file of such a name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    """Make sure that a file, or the entries of a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
