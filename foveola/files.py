"""Files that are whole or not there, and the layout of run and encoder folders, which nobody else knows."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from foveola.config import UserError, renewed

STEP = re.compile(r"step-(\d+)", re.ASCII)
FIXED_TARGETS = "the targets of this method do not move"  # a line of log.txt, which the report reads
WHOLE_STEPS = "logged numbers are of all images of a step"  # the same; older logs: of a part, on one process
CHECKPOINT = re.compile(r"step-(\d{8,})(\.replaced)?", re.ASCII)
STALE_SECONDS = 3600.0  # no write takes so long: what is older was left by a process that was killed

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what only writing meets


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, in the folder of `path` (made if needed), which becomes `path` when the block
    ends.

    An error or a kill inside the block leaves the file that was there before, or none. The file gets the
    permissions that any new file gets (0666 & ~umask), also from libraries that write private ones, and is on
    the disk before it has its name. What killed processes left of earlier writes of `path` is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path, part):
            part.unlink(missing_ok=True)
            part.touch()
            mode = part.stat().st_mode  # asking for the umask would mean to change it, for all threads
            yield part
            if part.stat().st_mode != mode:
                part.chmod(mode)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    except BaseException:
        with suppress(OSError):  # the disk may be the reason
            part.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path, *temporary: Path) -> Iterator[None]:
    """Let errors of the system within name `path`, which was asked for, in place of files and folders that
    are `temporary`; some libraries name none where a disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_FULL:
            error.filename = str(path)
        for part, name in product(temporary, ("filename", "filename2")):
            named = getattr(error, name)
            if isinstance(named, str | Path) and Path(named).is_relative_to(part):
                setattr(error, name, str(path / Path(named).relative_to(part)))
        if error.filename2 == str(path):
            error.filename2 = None
        raise


@contextmanager
def whole_folder(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Give a folder to write to, which becomes `path`, or what it links to, when the block ends, in place of
    one that is there.

    An error inside the block leaves what was there before; after a kill, too, but for `part`, a folder beside
    `path` that whoever writes next begins anew (by default one of a name that only this process has, which
    is removed as those of `whole` are).
    """
    asked, path = path, link_target(path)
    part = path.with_name(f".{path.name}.{os.getpid()}") if part is None else part
    with naming(asked, part, _earlier(path)):
        try:
            restore_folder(path)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            _remove_stale(path)
            yield part
            put_folder(part, path, _earlier(path))
        finally:
            shutil.rmtree(part, ignore_errors=True)


def link_target(path: Path) -> Path:
    """Return where a link leads, whether anything is there or not; of what is no link, the path itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def restore_folder(path: Path) -> None:
    """Give a folder its name back that `whole_folder` was replacing when its process was killed."""
    if not path.exists() and _earlier(path).is_dir():
        _earlier(path).rename(path)


def _earlier(path: Path) -> Path:
    return path.with_name(f".replaced-{path.name}")


def put_folder(new: Path, path: Path, earlier: Path) -> None:
    """Give a complete folder the name `path`; one that has it is `earlier` until the new one stands."""
    if path.exists() or path.is_symlink():  # which may lead nowhere
        remove_tree(earlier)
        path.rename(earlier)
    new.rename(path)
    sync(path.parent)
    remove_tree(earlier)


def remove_tree(path: Path) -> None:
    """Remove a folder, or a file of that name, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Let a file, or the names in a folder, be on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: str | Path, remedy: str) -> None:
    """Raise UserError, before any work is done for it, where no file can be written to `folder`.

    Nothing is made: the nearest folder that exists must be one, and be open to writing.
    """
    near = Path(folder).expanduser()
    while not near.exists() and near != near.parent:
        near = near.parent
    if not near.is_dir():
        raise UserError(f"{near} is a file where a folder belongs: {remedy}")
    if not os.access(near, os.W_OK | os.X_OK):
        raise UserError(f"{near} cannot be written to: {remedy}")


def write_text(path: str | Path, text: str) -> Path:
    """Write a file of UTF-8 text as a whole; returns its path."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


@dataclass(frozen=True)
class EncoderFolder:
    """The two files of an encoder, and the two of a head for a task that may stand on it."""

    path: Path

    @property
    def config(self) -> Path:
        """Architecture, transform and pooling, as JSON."""
        return self.path / "config.json"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def head_config(self) -> Path:
        """Which task the head answers for, and how it is built, as JSON."""
        return self.path / "head.json"

    @property
    def head_weights(self) -> Path:
        return self.path / "head.safetensors"

    def is_whole(self) -> bool:
        """Return whether both files of the encoder are there."""
        return self.config.is_file() and self.weights.is_file()

    @property
    def step(self) -> int | None:
        """The steps of training behind it, where it is whole and says them."""
        try:
            step = (
                json.loads(self.config.read_text(encoding="utf-8")).get("step") if self.is_whole() else None
            )
        except (OSError, ValueError, AttributeError):
            return None
        return step if isinstance(step, int) else None


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run is, below `path`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe: all that is needed to repeat the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A line of JSON for each logged step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def data(self) -> Path:
        """What the images of the run are; `inventory` beside it tells which."""
        return self.path / "data.json"

    @property
    def inventory(self) -> Path:
        return self.path / "data.npz"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def figures(self) -> Path:
        """What the method draws, NAME-STEP.png; runs of earlier versions have a folder `pictures` for it."""
        earlier = self.path / "pictures"
        return earlier if earlier.is_dir() else self.path / "figures"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def encoder(self) -> EncoderFolder:
        """The encoder of the newest checkpoint."""
        return EncoderFolder(self.path / "encoder")

    @property
    def results(self) -> Path:
        return results_in(self.path)

    @property
    def untrained(self) -> Path:
        """What has the results of the same network before training."""
        return self.path / "untrained"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def measured(self) -> Path:
        """What reports keep of what they measure and draw."""
        return self.path / "report"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def found_checkpoints(self) -> list[Path]:
        """Return the folders of checkpoints, newest first; one that was being replaced comes after its
        successor. Nothing says yet that they are whole (`is_whole`).
        """
        named = [path for path in self.checkpoints.glob("step-*") if CHECKPOINT.fullmatch(path.name)]
        return sorted(named, key=lambda path: (-checkpoint_step(path), len(path.name)))

    @property
    def best(self) -> EncoderFolder:
        """The encoder of the step that was measured as the best."""
        return EncoderFolder(self.path / "encoders" / "best")

    def saved_encoder(self, step: int) -> EncoderFolder:
        """Return the encoder of an earlier step."""
        return EncoderFolder(self.path / "encoders" / f"step-{step:08d}")

    def saved_encoders(self) -> list[tuple[int, EncoderFolder]]:
        """Return the encoders of earlier steps that are whole, by rising step."""
        kept = (self.path / "encoders").glob("step-*")
        found = [(STEP.fullmatch(path.name), EncoderFolder(path)) for path in kept]
        whole = [(int(match[1]), folder) for match, folder in found if match and folder.is_whole()]
        return sorted(whole, key=lambda pair: pair[0])

    def measured_steps(self) -> list[int]:
        """Return the steps, rising, of which there are results in encoders/, with or without an encoder."""
        homes = (path.parent for path in (self.path / "encoders").glob("step-*/results"))
        return sorted(int(match[1]) for match in (STEP.fullmatch(path.name) for path in homes) if match)

    def is_run(self) -> bool:
        """Return whether a run was begun here."""
        return self.config.is_file()

    def began_to_train(self) -> bool:
        """Return whether there are traces of a checkpoint."""
        return any(self.checkpoints.glob("step-*")) or self.encoder.config.exists()

    def read_metrics(self, odd: Callable[[int], None] = lambda _: None) -> list[dict[str, Any]]:
        """Return the metrics by rising step; lines of one step (training and evaluation) are laid together.

        The last line may be torn by an interruption and is left out then; so is any other that is not as
        metrics are, whose number (from 1) is given to `odd`.
        """
        path, steps = self.metrics, dict[int, dict[str, Any]]()
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for number, text in enumerate(texts, start=1):
            try:
                line = renewed(json.loads(text))
                step = int(line["step"])
            except (ValueError, KeyError, TypeError, RecursionError):
                if number < len(texts):
                    odd(number)
                continue
            steps[step] = steps.get(step, {}) | line
        return [steps[step] for step in sorted(steps)]


@dataclass(frozen=True)
class LoopFolder:
    """Where everything of a loop of rounds is: its last round is the run in `path` itself, earlier ones are
    runs of their own in `rounds/`, which also says what the loop is, and each has its objects in `masks/`.
    """

    path: Path
    PARTS = ("rounds", "masks")  # what is here before the last round begins

    @property
    def about(self) -> RunFolder:
        """The configuration, the images and the log of the loop."""
        return RunFolder(self.path / "rounds")

    def masks(self, number: int) -> Path:
        """Return the folder of the objects that a round is trained on."""
        return self.path / "masks" / f"round-{number}"

    def objects(self, number: int) -> Path:
        return self.masks(number) / "objects.json"

    def run(self, number: int, last: int) -> Path:
        """Return the folder of the run of a round, of which there are `last`."""
        return self.path if number == last else self.path / "rounds" / f"round-{number}"


def results_in(folder: str | Path) -> Path:
    """Return the folder of the results, one file for each protocol, beside an encoder or in a run folder."""
    return Path(folder) / "results"


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint folder, from its name."""
    match = CHECKPOINT.fullmatch(path.name)
    assert match, path
    return int(match[1])


def is_whole(checkpoint: Path) -> bool:
    """Return whether every file of a checkpoint is as its manifest says, byte for byte."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        return "state.pt" in files and all(
            facts_of(checkpoint / name) == facts for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no manifest, or not one of ours
        return False


def facts_of(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file: its size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _remove_stale(path: Path) -> None:
    # Not by a pattern: names may hold the letters that patterns are made of.
    for left in path.parent.iterdir():
        stem, _, process = left.name.rpartition(".")
        if stem == f".{path.name}" and process.isdecimal():
            with suppress(OSError):  # another process was first, or it is not ours to remove
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    remove_tree(left)
