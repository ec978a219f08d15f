"""Checkpoints that are whole or not there: written under a temporary name, flushed to disk, then renamed.

    <run>/checkpoints/step-00001000/state.pt        everything needed to go on
                                    parts/          but what processes have parts of, where they do
                                    manifest.json   sizes and SHA-256 of these files, written last

A process killed at any moment leaves the earlier checkpoints as they were; `newest` skips what is not whole.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveola.config import UserError, kind_of
from foveola.files import RunFolder, facts_of, is_whole, naming, put_folder, remove_tree, sync
from foveola.files import checkpoint_step as step_of
from foveola.state_files import CUT_PARTS, STATE, StatePlace, read_state

_TEMPORARY = ".writing-"


def save(
    folder: Path, step: int, state: dict[str, Any], *, keep: int = 2, keep_every: int | None = None
) -> Path:
    """Write `state` as the checkpoint of `step` in the run folder, then remove old ones.

    The newest `keep` checkpoints stay, and besides them every one whose step is a multiple of `keep_every`.
    `state` holds tensors, numbers, text, and lists, tuples and dicts of these: only that can be read back
    safely, anything else raises TypeError. Call it on one process. Returns the checkpoint's folder.
    """
    begin_checkpoint(folder, step)
    return finish(folder, step, state, keep=keep, keep_every=keep_every)


def begin_checkpoint(folder: Path, step: int) -> Path:
    """Make the temporary folder of a checkpoint, in which files may be written; call it on one process."""
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    for stale in run.checkpoints.glob(f"{_TEMPORARY}*"):
        remove_tree(stale)
    temporary = _temporary(run, step)
    temporary.mkdir()
    return temporary


def finish(folder: Path, step: int, state: dict[str, Any], *, keep: int, keep_every: int | None) -> Path:
    """Write `state` into a checkpoint that was begun, and put it in its place, as `save` does."""
    run = RunFolder(folder)
    path, temporary = run.checkpoint(step), _temporary(run, step)
    try:
        with naming(path, temporary):
            _write(state, step, temporary)
    except BaseException:
        drop(folder, step)  # it may fill the disk that was too small for it
        raise
    put_folder(temporary, path, path.with_name(path.name + ".replaced"))
    _prune(run, step, keep, keep_every)
    return path


def drop(folder: Path, step: int) -> None:
    """Remove what was begun."""
    shutil.rmtree(_temporary(RunFolder(folder), step), ignore_errors=True)


def _temporary(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"{_TEMPORARY}{run.checkpoint(step).name}"


def _write(state: dict[str, Any], step: int, temporary: Path) -> None:
    """The files of a checkpoint, on the disk when this returns."""
    torch.save(state, temporary / STATE)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(temporary / STATE):
        raise TypeError(f"a checkpoint cannot hold objects of {', '.join(unsafe)}")
    sync(temporary / STATE)
    files = {STATE, *(f"{CUT_PARTS}/{path.name}" for path in (temporary / CUT_PARTS).glob("*"))}
    manifest = {"step": step, "files": {name: facts_of(temporary / name) for name in sorted(files)}}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    sync(temporary / "manifest.json")
    sync(temporary)


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run folder, or None. Half-written and damaged ones are passed
    over.
    """
    return next((path for path in RunFolder(folder).found_checkpoints() if is_whole(path)), None)


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest whole checkpoint of a run folder, and the damaged ones that are newer.

    Raises UserError where the run had checkpoints and none is whole: to begin again would overwrite what is
    left of it.
    """
    damaged: list[Path] = []
    for path in RunFolder(folder).found_checkpoints():
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


def read_checkpoint(
    path: Path, like: Callable[[StatePlace], Tensor | None] = lambda where: None, *, checked: bool = False
) -> dict[str, Any]:
    """Read a checkpoint folder back as `read_state` does, tensors on the CPU unless `like` says.

    Raises UserError when it is missing or damaged; `checked` says that it is whole.
    """
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}")
    if not checked and not is_whole(path):
        raise UserError(
            f"{path} is damaged: its files do not match its manifest; remove it to use an older one"
        )
    state = read_state(path, like)
    if not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint of a run: it holds {kind_of(state)}")
    return state


def _prune(run: RunFolder, step: int, keep: int, keep_every: int | None) -> None:
    # Later steps can only be damaged ones that a resumed run passed over: they must not push out whole ones.
    past = [path for path in run.found_checkpoints() if step_of(path) <= step]
    for old in past[max(keep, 1) :]:
        if not keep_every or step_of(old) % keep_every:
            # never half a checkpoint under its name
            remove_tree(old.rename(old.with_name(f"{_TEMPORARY}{old.name}")))
