"""Masks at inference: objects that a proposer finds in the images that protocols read, kept beside features.

`evaluate` asks for them with `masks=discover` (or another kind of proposals), in place of the objects that
the data have. What is found is a file of objects, known by the proposer, what it keeps, and the images.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from foveola import distributed
from foveola.config import UserError
from foveola.data.identity import identity_of
from foveola.data.sources import with_objects
from foveola.evaluation.images import Part, choose_images
from foveola.evaluation.job import Job
from foveola.evaluation.protocol import Needs
from foveola.models.encoder import Encoder
from foveola.outside import imported
from foveola.proposals.proposal import Proposer
from foveola.proposals.run import (
    DOOR,
    NO_OTHER_WORK,
    ProposalKind,
    ProposeConfig,
    configure_kind,
    find_kind,
    propose,
)

BEST = {"max_objects": 1}  # of an image, which has one object token


@dataclass(frozen=True)
class MasksBy:
    """Who finds objects, and by which settings."""

    kind: ProposalKind
    model: str | None
    own: Any
    settings: dict[str, Any]  # the keys that differ from the usual ones, as they are noted
    overrides: dict[str, Any]  # the keys that the user gave

    def proposer(self, encoder: Encoder) -> Proposer:
        """Return who finds objects; features are those of the encoder, unless another model is given.

        Raises UserError where a model is needed, or cannot find objects.
        """
        model = encoder if self.model is None and self.kind.name == "discover" else self.model
        if model is None:
            name = self.kind.name
            raise UserError(f"masks={name} needs {name}.model=: what finds the objects")
        return imported(self.kind.build)(model, self.own, encoder.device)


def masks_setting(settings: Mapping[str, Any]) -> tuple[MasksBy | None, dict[str, Any]]:
    """Return who is asked for masks by `masks=KIND` and the keys `KIND.*`, and the settings without them.

    None where `masks` is something else. Raises UserError for keys that the kind does not have, or that have
    no effect.
    """
    kind, rest = settings.get("masks"), dict(settings)
    if not isinstance(kind, str) or kind not in DOOR.names():
        return None, rest
    del rest["masks"]
    given = rest.pop(kind, {})
    if not isinstance(given, dict):
        raise UserError(f"{kind}={given}: keys of masks={kind} are written {kind}.KEY=")
    found = find_kind(kind)
    own = {name: value for name, value in given.items() if name != "model"}
    if "agnostic" in {each.name for each in fields(imported(found.config))}:
        own = {"agnostic": True} | own  # an object has the class of its image
    own = BEST | own
    config, _ = configure_kind(found, own)
    names = {each.name for each in fields(ProposeConfig)}
    noted = {name: value for name, value in own.items() if name in names}
    model = given.get("model")
    return MasksBy(found, None if model is None else str(model), config, noted, given), rest


def reads_objects(config: Any, needs: Needs) -> bool:
    """Return whether a protocol with these settings reads the patches of objects, or each object."""
    if needs.test:
        return any("masked" in reading.need.features for reading in (*needs.train, *needs.test))
    wanted = getattr(config, "masks", True) is not False or getattr(config, "rows", "") == "objects"
    return hasattr(config, "mask_canvas") and wanted and getattr(config, "objects", True) is not False


def jobs_with_masks(
    jobs: Sequence[Job], by: MasksBy, encoder: Encoder, cache: str | Path | None, progress: bool
) -> list[Job]:
    """Return the same jobs, with objects found in the images of those that read any. All processes call it.

    Raises UserError where none of them reads any, and where no object can be found.
    """
    reading = [job for job in jobs if reads_objects(job.config, job.needs)]
    if not reading:
        names = ", ".join(dict.fromkeys(job.protocol.name for job in jobs))
        raise UserError(f"masks={by.kind.name} has no effect: {names} with these settings reads no objects")
    proposer = by.proposer(encoder)
    users: dict[int, list[Any]] = {}
    for job in reading:
        for source in (job.train if job.learns else None, job.test):
            users.setdefault(id(source), []).append(job.config)
    found: dict[int, tuple[Any, dict[str, Any]]] = {id(None): (None, {})}
    with _kept_in(cache) as folder:
        for source in {id(each): each for job in reading for each in (job.train, job.test)}.values():
            if id(source) in users and source is not None:
                chosen = _chosen_by(users[id(source)], len(source))
                parts = (by, proposer, folder / "objects", progress)
                found[id(source)] = _with_found_objects(source, chosen, *parts)
    return [_masked(job, by, proposer, found) if job in reading else job for job in jobs]


def _masked(job: Job, by: MasksBy, proposer: Proposer, found: Mapping[int, tuple[Any, Any]]) -> Job:
    """A job that reads the objects found, and says so."""
    train, test = (found.get(id(source), (source, {})) for source in (job.train, job.test))
    told = {"by": proposer.describe(), "train": train[1], "test": test[1]}
    notes = [
        f"masks={by.kind.name}: masks are of the best object found in each image of {which}; none is "
        f"found in {facts['without']} of {facts['images']}"
        for which, facts in (("train", train[1]), ("test", test[1]))
        if facts
    ]
    return replace(
        job,
        train=train[0],
        test=test[0],
        notes=(*job.notes, *notes),
        plain=(job.train, job.test),
        masks={"kind": by.kind.name, "given": by.overrides, **told},
    )


def _chosen_by(configs: list[Any], count: int) -> Int64[np.ndarray, "n"]:
    """The images of `count` that any protocol with these settings may read, ascending."""
    every = [
        choose_images(count, getattr(config, "limit", None), getattr(config, "seed", 0)) for config in configs
    ]
    return np.unique(np.concatenate(every))


def _with_found_objects(
    source: Any,
    chosen: Int64[np.ndarray, "n"],
    by: MasksBy,
    proposer: Proposer,
    folder: Path,
    progress: bool,
) -> tuple[Any, dict[str, Any]]:
    """A source whose images have the best object that is found in each, with the label of the image.

    Also the number of images looked at, and of those without an object, which have none. All processes call
    it. Objects that `folder` has of the same work are read from there.
    """
    part = Part(source, chosen, classes=False)  # an object has the class of its image
    settings = {name: value for name, value in by.settings.items() if name not in NO_OTHER_WORK}
    work = [proposer.describe(), settings, identity_of(part).digest]
    name = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:20]
    how: dict[str, Any] = {"sheet": 0, **by.settings}
    found = propose(proposer, part, out=folder / name, progress=progress, **how)
    given = with_objects(source, found.file)
    given.name, given.says_lacking = source.name, False
    counts = found.summary.counts
    return given, {"images": len(counts), "without": counts.count(0)}


@contextmanager
def _kept_in(cache: str | Path | None) -> Iterator[Path]:
    """The folder that keeps features; where there is none, a temporary one, the same to all
    processes.
    """
    if cache is not None:
        yield Path(cache).expanduser()
        return
    folder = Path(distributed.on_main(lambda: tempfile.mkdtemp(prefix="foveola-objects-")))
    try:
        yield folder
        distributed.barrier()  # all have read what is there
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
