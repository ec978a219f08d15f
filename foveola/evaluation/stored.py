"""Results in folders: which there are, which were measured alike, and where a new one goes.

`results/<protocol>.json` is what was measured last, of several test sets the first. A result that was
measured with other settings, or on other data, moves to `results/<protocol>-<8 letters>.json` before it would
be replaced; results of further test sets go there at once. What a protocol keeps beside its result (the
detections of `detect`, a trained probe) is in a folder of the same name, without `.json`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

from foveola.config import UserError, to_dict
from foveola.data.identity import PREFIX
from foveola.evaluation.protocol import PROTOCOLS, find_protocol
from foveola.evaluation.result import Result, documents_of
from foveola.files import results_in
from foveola.model_names import home_of

SPEED = {"batch_size", "workers"}  # settings that change how long it takes, not what comes out
FACTS = ("fingerprint", "images", "rows", "objects", "unreadable")  # of data that were measured alike


class Stored(NamedTuple):
    """A result and the file that holds it."""

    path: Path
    result: Result


def results_of(path: str | Path) -> tuple[list[Stored], list[str]]:
    """Return the results of a run folder, an `out=` folder, its `results/`, `untrained:RUN` or a file, newest
    first.

    Also a line for each file that holds none. Raises UserError for a single file that holds none.
    """
    folder = home_of(path) or Path(path)
    if folder.is_file():
        return [Stored(folder, Result.read(folder))], []
    if folder.name != results_in("").name:
        folder = results_in(folder)
    found, broken = [], []
    for file in sorted(folder.glob("*.json")):
        try:
            found.append(Stored(file, Result.read(file)))
        except UserError as error:
            broken.append(f"left out: {error}")
    return sorted(found, key=lambda stored: stored.result.date, reverse=True), broken


def store(result: Result, folder: str | Path, further: bool = False) -> Result:
    """Write `folder/results/<protocol>.json` and return the result with a line on what was written.

    An earlier result is replaced only where it was measured alike; any other is kept under a name of its own.
    A `further` result (of another test set, or of a probe that was trained before) takes such a name itself,
    and leaves `<protocol>.json` as it is, if there is another measurement.
    """
    path = results_in(folder) / f"{result.protocol}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    alike = path.with_stem(f"{path.stem}-{_key(result)}")  # measured alike before, if it is there
    with _alone(path.parent):
        first = _readable(path)
        own = alike if further and first is not None and differences(first, result) else path
        note = f"written to {own}"
        if own is path and path.exists():
            note += _make_room(path, result)
        earlier = [each.evaluation for each in map(_readable, (path, alike)) if each is not None]
        result = replace(result, evaluation=next(filter(None, (result.evaluation, *earlier)), ""))
        result.save(folder, own.stem.removeprefix(path.stem))
        if own is path:
            alike.unlink(missing_ok=True)
            rmtree(documents_of(alike), ignore_errors=True)
    return replace(result, written=note)


def _readable(path: Path) -> Result | None:
    try:
        return Result.read(path)
    except UserError:  # it is not there, or of another version, perhaps
        return None


def _make_room(path: Path, result: Result) -> str:
    """Keep what `path` holds where it is no earlier `result`; what to say of it."""
    before = _readable(path)
    if before is None:
        target = path.with_stem(f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}")
        _move(path, target)
        return f"; what was there cannot be read and is kept in {target.name}"
    if found := differences(before, result):
        target = path.with_stem(f"{path.stem}-{_key(before)}")
        _move(path, target)
        return f"; the one before was measured differently ({found[0]}) and is kept in {target.name}"
    return (
        "" if before.encoder == result.encoder else f", in place of that of another encoder ({before.date})"
    )


def _move(path: Path, target: Path) -> None:
    """Give a result, and what is kept beside it, another name."""
    path.replace(target)
    if documents_of(path).is_dir():
        documents_of(path).replace(documents_of(target))


def _key(result: Result) -> str:
    """Names what differs between results of one protocol in one folder: settings and data."""
    settings = {name: value for name, value in result.settings.items() if name not in SPEED}
    data = {
        which: {fact: facts.get(fact) for fact in FACTS} if isinstance(facts, dict) else facts
        for which, facts in result.data.items()
        if which in ("train", "test")
    }
    return hashlib.sha256(json.dumps([settings, data], sort_keys=True).encode()).hexdigest()[:8]


def differences(a: Result, b: Result) -> list[str]:
    """Return what was not the same in two measurements, apart from the encoder; one line each."""
    found = []
    mine, theirs = (json.loads(json.dumps(result.settings)) for result in (a, b))  # a file has no tuples
    usual = _defaults(a.protocol)
    for key in sorted((mine.keys() | theirs.keys()) - SPEED):
        left, right = (side.get(key, usual.get(key, "absent")) for side in (mine, theirs))
        if left != right:
            found.append(f"{key} = {mine.get(key, 'absent')} and {theirs.get(key, 'absent')}")
    for which in ("train", "test"):
        left, right = a.data.get(which), b.data.get(which)
        if not isinstance(left, dict) or not isinstance(right, dict):
            if left is not right and left != right:
                found.append(f"only one has {which} data")
            continue
        for key in FACTS:
            if left.get(key) != right.get(key):
                of_contents = {str(side.get(key)).startswith(PREFIX) for side in (left, right)}
                if key == "fingerprint" and len(of_contents) == 2:
                    found.append(f"{which}: one is of a version that knew data by names; measure it again")
                    continue
                named = f"{left.get('name')} and {right.get('name')}, " if key == "fingerprint" else ""
                found.append(f"{which} {key}: {named}{left.get(key)} and {right.get(key)}")
    return found


def _defaults(protocol: str) -> dict[str, Any]:
    """Settings of a protocol of foveola: a version that lacked a key measured as its default has it."""
    if protocol not in PROTOCOLS:
        return {}
    return json.loads(json.dumps(to_dict(find_protocol(protocol).Config())))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for other processes that write to the folder, where its file system has locks."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
