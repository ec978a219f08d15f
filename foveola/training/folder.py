"""The folder of a run: which one a configuration belongs to, what it may differ in, who writes to it."""

import dataclasses
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from foveola import distributed, files, locks
from foveola.config import ConfigError, UserError, dump_yaml, read_yaml, renewed, to_dict
from foveola.files import LoopFolder, RunFolder
from foveola.training import checkpoint, same_data
from foveola.training.durations import plan
from foveola.training.lengthen import check_longer
from foveola.training.recipe import RunConfig, run_config
from foveola.trees import flat

# What may differ between a run and its continuation: where and how fast it runs, not what it computes.
FREE_KEYS = (
    "about",
    "out",
    "data_changed",
    "pixels",  # facts of the images, which are compared themselves
    "device",
    "checkpoint_activations",
    "parallel",
    "sharding.reshard",
    "sharding.replicas",
    "loader.workers",
    "loader.prefetch",
    "loader.start",
    "loader.max_bad",
    "log_every",
    "checkpoint_every",
    "keep",
    "keep_every",
    "evaluate_every",
    "evaluate_train",
    "evaluate_test",
    "evaluate",
    "evaluations",
    "best",
    "stop_when_worse",
)


class Choice(NamedTuple):
    """The folder of a run, and a note on why it is this one."""

    folder: Path
    note: str = ""


def choose_folder(config: RunConfig, total_steps: int, images: same_data.RunImages) -> Choice:
    """Return the folder of this run: `out`, an unfinished run of the same settings in runs/, or a new one
    there.

    The same `images` at another path are the same data. A run there that was finished on images which
    changed since is left alone, unless `data_changed` allows to go on.
    Nothing is written. Raises ConfigError where `out` holds something else than this run, which may have been
    shorter so far.
    """
    if config.out is not None:
        folder = Path(config.out).expanduser()
        if holds_run(folder):
            before = _settings(folder)
            alike = dataclasses.replace(config, duration=before.duration)
            if different := setting_difference(folder, alike, images):
                raise ConfigError(
                    f"{folder} holds another run ({different}): choose another out=, or repeat its settings"
                )
            if before.duration != config.duration:
                check_longer(folder, before, config, images.count)
        return Choice(folder)
    name = (config.recipe or "run").replace("/", "-")
    runs, note = Path("runs"), ""
    for folder in sorted(runs.glob("*/"), reverse=True):
        if not folder.name.startswith(f"{name}-") or not is_of(folder, config, images):
            continue
        what = "" if config.data_changed == "allow" else same_data.changed_since(folder, images)
        if not _is_finished(folder, config, total_steps, what):
            if _is_free(folder):
                return Choice(folder)
        elif what and not note:
            note = f"{folder} is finished, and {what}: this is a run of its own"
    return Choice(new_folder(name), note)


def holds_run(folder: Path) -> bool:
    """Return whether a run was begun in a folder. Raises ConfigError where something else is there."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file, not a folder")
    if RunFolder(folder).is_run():
        return True
    if not is_empty(folder, besides=LoopFolder.PARTS):
        raise ConfigError(f"{folder} is not empty and holds no run: choose another out=")
    return False


def new_folder(name: str) -> Path:
    """Return the path of a run folder in runs/ that does not exist yet."""
    new = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return new if not new.exists() else new.with_name(f"{new.name}-{os.getpid()}")


def is_empty(folder: Path, besides: Collection[str] = ()) -> bool:
    """Return whether a folder, which need not exist, holds nothing but hidden files and those names."""
    found = folder.iterdir() if folder.exists() else ()
    return all(path.name.startswith(".") or path.name in besides for path in found)


def setting_difference(folder: Path, config: RunConfig, images: same_data.RunImages) -> str | None:
    """Return the first setting in which the run in `folder` differs from `config`, or None."""
    old, new = flat(to_dict(_settings(folder))), flat(to_dict(config))
    for name in sorted(old.keys() | new.keys()):
        free = any(name == part or name.startswith(f"{part}.") for part in FREE_KEYS)
        free = free or (name == "data" and same_data.are_of(folder, images))
        free = free or (name == "model.channels" and 0 in (old.get(name), new.get(name)))  # those of the data
        if not free and old.get(name) != new.get(name):
            return f"its {name} is {old.get(name)!r}, not {new.get(name)!r}"
    return None


def _settings(folder: Path) -> RunConfig:
    path = RunFolder(folder).config
    try:
        return run_config(renewed(read_yaml(path)))  # keys that it lacks have their defaults
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read ({error}): choose another out=") from error


def begin(folder: Path, config: RunConfig, images: same_data.RunImages) -> str | None:
    """Write the configuration into the folder, unless there is one already, and what its images are.

    What is to be said where the run goes on with other images than before, if that is allowed.
    """
    run = RunFolder(folder)
    if not run.config.exists():
        files.write_text(run.config, dump_yaml(to_dict(config) | {"out": None}))
    if run.began_to_train():
        return same_data.note_change(folder, images, config.data_changed == "allow")
    same_data.save_run_images(folder, images)
    return None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from training in `folder`; makes it if needed. A process that dies lets go of it.

    Raises UserError when another process holds it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = RunFolder(folder).lock.open("a")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    with file:
        if locks.is_held(file):
            raise UserError(f"another process is training in {folder}: wait for it, or choose another out=")
        yield


def is_of(folder: Path, config: RunConfig, images: same_data.RunImages) -> bool:
    """Return whether a folder holds a run of these settings."""
    try:
        return RunFolder(folder).config.exists() and not setting_difference(folder, config, images)
    except ConfigError:  # of another version, or not a run: not this run, in any case
        return False


def _is_finished(folder: Path, config: RunConfig, total_steps: int, changed: str) -> bool:
    """Whether a run took all its steps; where its images have `changed`, those of its own images."""
    newest = checkpoint.newest(folder)
    if newest is None:
        return False
    if changed and (before := same_data.load_run_images(folder)):
        try:
            total_steps = plan(config, before.count, distributed.world_size()).total_steps
        except ConfigError:  # it ran with a number of processes that fits its images, unlike this one
            return False
    return checkpoint.step_of(newest) >= total_steps


def _is_free(folder: Path) -> bool:
    """Whether nobody is working on a run."""
    try:
        with RunFolder(folder).lock.open("a") as file:
            return not locks.is_held(file)
    except OSError:  # somebody else's
        return False
