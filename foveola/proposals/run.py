"""A run of a proposer over data: in batches, by several processes, going on after a kill; then one file."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from foveola import distributed, files, locks
from foveola.config import UserError, build, key, kind_of, nearest, refuse_unread, to_dict
from foveola.data.identity import identity_of, looked_at_once, saying
from foveola.data.listing import check_inside, printable
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.sources import Source, as_source
from foveola.data.values import ImagePixels
from foveola.outside import Door, imported
from foveola.progress import show
from foveola.proposals.filter import FilterConfig, filtered
from foveola.proposals.journal import ImageRecord, Journal, refuse_other_work
from foveola.proposals.proposal import Proposer, as_seen, check_arrays, seen_pixels
from foveola.proposals.sheet import numbers_of, save_sheets
from foveola.proposals.written import (
    OBJECTS,
    Summary,
    read_about,
    read_summary,
    record_of,
    write_objects,
)

LOCK = ".objects.lock"  # of the folder, while a run goes on
BAD_NAMED = 3  # unreadable images that are named
NO_OTHER_WORK = ("workers", "sheet")  # keys that say how the work is done, or shown


@dataclass(frozen=True)
class ProposalKind:
    """A way to find objects: `config` and `build` are importable names of its configuration and of
    `build(model, config, device) -> Proposer`.
    """

    name: str
    help: str
    config: str
    build: str


DOOR = Door(
    "kind of proposals",
    "foveola.proposals",
    {
        "discover": ProposalKind(
            "discover",
            "objects from the features of any encoder, without labels",
            "foveola.proposals.discover:DiscoverConfig",
            "foveola.proposals.discover:discoverer",
        ),
        "detect": ProposalKind(
            "detect",
            "objects that a detector of yours or of others finds",
            "foveola.proposals.detect:DetectorConfig",
            "foveola.proposals.detect:detector",
        ),
        "segment": ProposalKind(
            "segment",
            "masks by a segmenter of others, automatic or prompted by the boxes that the data have",
            "foveola.proposals.segment:SegmenterConfig",
            "foveola.proposals.segment:segmenter",
        ),
    },
    "my_package.my_module:KIND",
)


@dataclass(frozen=True)
class ProposeConfig(FilterConfig):
    """What is kept, and how the run goes."""

    workers: int = key(2, "threads that read images; 0 = none besides this one", at_least=0)
    sheet: int = key(48, "images on the contact sheet, spread over the data; 0 = no sheet", at_least=0)


@dataclass(frozen=True, eq=False)
class Proposed:
    """What a run has written: the file, which `annotations=` of a data string reads, and a summary of it."""

    file: Path
    summary: Summary
    known: bool = False  # whether it was there before, from the same work
    sheets: tuple[Path, ...] = ()  # images with their objects, as PNG and as a web page

    def table(self) -> str:
        """Return the numbers in words, for people."""
        lines = [f"{self.file}" + (" (was there already)" if self.known else "")]
        lines += [f"{name.lower()}: {value}" for name, value in numbers_of(self.summary)]
        if bad := self.summary.unreadable:
            named = "; ".join(f"{name} ({reason})" for name, reason in bad[:BAD_NAMED])
            lines.append(
                f"unreadable images: {len(bad):,}: {named}" + ("; ..." if len(bad) > BAD_NAMED else "")
            )
        return "\n".join([*lines, *map(str, self.sheets)])


def find_kind(name: str) -> ProposalKind:
    """Return the kind of this name. Raises UserError where there is none."""
    found = DOOR.find(name)
    if not isinstance(found, ProposalKind):
        raise UserError(f"{name} is {kind_of(found)}, and no foveola.proposals.run.ProposalKind")
    return found


def config_of_kind(kind: ProposalKind) -> type:
    """Return the class of a kind's configuration."""
    return imported(kind.config)


def configure_kind(kind: ProposalKind, settings: dict[str, Any]) -> tuple[Any, ProposeConfig]:
    """Return the configuration of a kind, and that of the run, from one set of keys.

    Raises UserError for a key that neither has, and where one has no effect.
    """
    own = config_of_kind(kind)
    mine = {f.name for f in fields(own)}
    rest = {f.name for f in fields(ProposeConfig)}
    if both := mine & rest:
        raise TypeError(f"{kind.name}: keys of the run are taken: {sorted(both)}")
    for name in settings:
        if name not in mine | rest:
            near = nearest(str(name), mine | rest)
            hint = f"did you mean {near!r}?" if near else f"`foveola masks {kind.name} --help` lists all"
            raise UserError(f"unknown key {name!r}; {hint}")
    parts = [{n: v for n, v in settings.items() if n in names} for names in (mine, rest)]
    configs = build(own, parts[0]), build(ProposeConfig, parts[1])
    for config, given in zip(configs, parts, strict=True):
        refuse_unread(config, given)
    return configs


@looked_at_once()
def propose(
    kind: str | Proposer,
    data: str | Source,
    model: Any = None,
    *,
    out: str | Path,
    device: str = "auto",
    progress: bool = True,
    **settings: Any,
) -> Proposed:
    """Find objects in images that have none, and write them to `out`/objects.json.

    The file is COCO's, with masks as RLE and scores; `folder:/my/images?annotations=OUT/objects.json` and any
    other data string reads it. A run that was killed goes on when it is started again, and ends with the same
    bytes; one that is finished returns what is there. Every process of torchrun takes its part of the data.

    Args:
        kind: `discover` (features of an encoder), `detect`, `segment`, or a `Proposer` of your own.
        data: a data string, or a source of your own, whose images have different names.
        model: what finds the objects; which models there are depends on the kind (docs/masks.md).
        out: the folder to write to.
        device: cpu, cuda, cuda:1; auto = a GPU if there is one.
        progress: whether a bar, or a line each minute, is shown on standard error.
        settings: keys of the kind, of what is kept, and of the run: `foveola masks KIND --help` lists them.

    Raises UserError (DataError for data) for a key that is unknown or has no effect, where `out` holds other
    work, where names would leave the folder of the data, and where no image can be read.
    """
    open_proposer, config = _prepared(kind, model, settings)
    files.check_writable(out, "give another out=")
    source = as_source(data, "train", "data")
    proposer = open_proposer(distributed.find_device(device))
    source = as_seen(source, proposer)
    if getattr(proposer, "prompts", False):
        if not source.has_objects:
            raise UserError(f"{source.name} has no objects, and this model is prompted by their boxes")
        of_classes = getattr(proposer, "of_classes", None)
        proposer = proposer if of_classes is None else of_classes(tuple(source.classes or ()))
    with saying(progress):
        return _Run(source, proposer, config, Path(out).expanduser(), progress).run()


def _prepared(
    kind: str | Proposer, model: Any, settings: dict[str, Any]
) -> tuple[Callable[[torch.device], Proposer], ProposeConfig]:
    """What opens the proposer, which takes a while, once all that is asked for is known to be in order."""
    if not isinstance(kind, str):
        if model is not None:
            raise UserError(f"model= has no effect: {kind_of(kind)} finds the objects itself")
        config = build(ProposeConfig, settings)
        refuse_unread(config, settings)
        return lambda device: kind, config
    found = find_kind(kind)
    own, config = configure_kind(found, settings)
    if model is None:
        raise UserError(f"masks {kind} needs model=: what finds the objects")
    return lambda device: imported(found.build)(model, own, device), config


class _Run:
    """One run, as each process goes through it."""

    def __init__(
        self, source: Source, proposer: Proposer, config: ProposeConfig, out: Path, progress: bool
    ) -> None:
        self.source, self.proposer, self.config, self.progress = source, proposer, config, progress
        self.file = out / OBJECTS
        self.journal = Journal(out / "objects.unfinished")
        kept = {name: value for name, value in to_dict(config).items() if name not in NO_OTHER_WORK}
        work = {"by": proposer.describe(), "kept": kept, "classes": list(proposer.classes)}
        names = "\0".join(source.image_names()) if hasattr(source, "image_names") else ""  # type: ignore[attr-defined]
        work |= {"data": source.name, "contents": identity_of(source).digest}
        work |= {"names": hashlib.sha256(names.encode()).hexdigest()[:16]}  # contents alone do not tell them
        self.work = json.loads(json.dumps(work))

    def run(self) -> Proposed:
        with ExitStack() as stack:
            distributed.on_main(lambda: stack.enter_context(self._alone()))
            return self._run()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other runs from the folder. A process that dies lets go of it."""
        files.link_target(self.file.parent).mkdir(parents=True, exist_ok=True)
        path = self.file.parent / LOCK
        with path.open("a") as lock:
            if locks.is_held(lock):
                raise UserError(
                    f"another process finds objects in {path.parent}: wait for it, or give another out="
                )
            yield
            path.unlink(missing_ok=True)

    def _run(self) -> Proposed:
        if distributed.on_main(self._is_done):
            summary = read_summary(self.file)
            return Proposed(self.file, summary, True, self._sheets(summary))
        distributed.on_main(lambda: self.journal.begin(self._told_apart(self.work)))
        if not self.journal.folder.is_dir():
            raise UserError(f"{self.journal.folder} is not on this machine: give an out= that all reach")
        done = distributed.on_main(self.journal.done)
        groups = self._groups(done)
        rank, world = distributed.rank(), distributed.world_size()
        mine = groups[rank * len(groups) // world : (rank + 1) * len(groups) // world]
        self.journal.mend(rank)
        for batch in show(self._batches(mine), len(mine), "finding objects", self.progress):
            self.journal.append(rank, self._records(batch))
        distributed.barrier()
        summary = distributed.on_main(self._finish)
        return Proposed(self.file, summary, False, self._sheets(summary))

    def _sheets(self, summary: Summary) -> tuple[Path, ...]:
        if not self.config.sheet:
            return ()
        return distributed.on_main(
            lambda: save_sheets(self.source, self.file, summary, self.config.sheet, self.work)
        )

    def _is_done(self) -> bool:
        if not self.file.exists():
            return False
        there = read_about(self.file)
        if there is None:
            raise UserError(f"{self.file} was not written by foveola masks: give another out=")
        refuse_other_work(self.file, self._told_apart(there), self._told_apart(self.work))
        return True

    @staticmethod
    def _told_apart(work: dict[str, Any]) -> dict[str, Any]:
        """What makes it the same work: the contents of the data, not their path."""
        return {name: value for name, value in work.items() if name != "data"}

    def _groups(self, done: Int64[np.ndarray, "n"]) -> list[list[int]]:
        """Images that are still to be done, in batches that do not depend on what was done before."""
        rest = np.setdiff1d(np.arange(len(self.source)), done)
        cells = rest // self.proposer.batch_size
        return [part.tolist() for part in np.split(rest, np.flatnonzero(np.diff(cells)) + 1) if len(part)]

    def _batches(self, groups: Sequence[list[int]]) -> Iterator[list["_Read"]]:
        """Images read, a batch ahead of the one that is looked at."""
        if not self.config.workers:
            for group in groups:
                yield [self._read(index) for index in group]
            return
        with ThreadPoolExecutor(self.config.workers) as pool:
            ahead: deque[list[Future[_Read]]] = deque()
            for group in groups:
                ahead.append([pool.submit(self._read, index) for index in group])
                if len(ahead) > 1:
                    yield [each.result() for each in ahead.popleft()]
            while ahead:
                yield [each.result() for each in ahead.popleft()]

    def _read(self, index: int) -> "_Read":
        name, sample = f"image {index}", None
        try:
            sample = self.source[index]
            name = printable(sample.name)
            pixels = np.ascontiguousarray(seen_pixels(sample.image, self.proposer))
        except (BadImage, OSError) as error:
            return _Read(index, name, sample, reason=str(error))
        check_inside(Path(self.source.name), [name])
        return _Read(index, name, sample, pixels)

    def _records(self, batch: list["_Read"]) -> list[ImageRecord]:
        images = [each for each in batch if each.pixels is not None]
        proposals = self._propose(images) if images else []
        if not isinstance(proposals, list | tuple) or len(proposals) != len(images):
            what = f"{len(proposals)} results" if isinstance(proposals, list | tuple) else kind_of(proposals)
            raise UserError(
                f"{kind_of(self.proposer)} returned {what} for {len(images)} images: expected one for each"
            )
        records = [
            {"index": each.index, "file_name": each.name, "unreadable": each.reason}
            for each in batch
            if each.pixels is None
        ]
        for each, found in zip(images, proposals, strict=True):
            assert each.pixels is not None
            size = each.pixels.shape[0], each.pixels.shape[1]
            try:
                check_arrays(found, len(self.proposer.classes))
                kept = filtered(found, size, self.config)
            except UserError as error:
                raise UserError(f"{each.name}: {error}") from error
            records.append(record_of(each.index, each.name, size, kept))
        return records

    def _propose(self, images: list["_Read"]) -> Any:
        pixels = [each.pixels for each in images]
        if getattr(self.proposer, "prompts", False):
            objects = [None if each.sample is None else each.sample.objects for each in images]
            return self.proposer.propose(pixels, objects)  # type: ignore[arg-type, call-arg]
        return self.proposer.propose(pixels)  # type: ignore[arg-type]

    def _finish(self) -> Summary:
        names: dict[str, int] = {}
        bad: list[str] = []
        for record in self.journal.records():
            name, index = record["file_name"], record["index"]
            if name in names:
                raise DataError(f"{self.source.name}: images {names[name]} and {index} are both named {name}")
            names[name] = index
            bad += [f"{name} ({record['unreadable']})"] if "unreadable" in record else []
        if len(bad) == len(names):
            raise DataError(f"{self.source.name}: none of {len(bad)} images can be read, such as {bad[0]}")
        summary = write_objects(self.file, self.work, self.proposer.classes, self.journal.records)
        self.journal.remove()
        return summary


@dataclass(frozen=True, eq=False)
class _Read:
    """An image that was read, or why it was not."""

    index: int
    name: str
    sample: Sample | None = None
    pixels: ImagePixels | None = None
    reason: str = ""
