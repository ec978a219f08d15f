"""Rounds of: find objects by features, train on them, find them again by better features.

Round 0, where no weights are given, trains the recipe without objects. Every other round cuts objects out of
the features of the round before it, writes them as `foveola masks` does, and is a run as any other, on data
that read that file. What is finished stays as it is, so a loop that was killed goes on where it was.
"""

import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

import numpy as np
import torch
from pycocotools import mask as coco

from foveola import distributed
from foveola.config import ConfigError, build, to_dict
from foveola.data.sources import OBJECT, open_source
from foveola.data.suited import suited
from foveola.files import LoopFolder
from foveola.methods.distillation import DistillationConfig
from foveola.proposals.discover import discoverer
from foveola.proposals.run import Proposed, propose
from foveola.training import folder, same_data
from foveola.training.recipe import BootstrapConfig, RunConfig
from foveola.zoo.load import load
from foveola.zoo.transfer import USUAL_CHANNELS

KeyTree = dict[str, Any]
FINISHED = "finished"  # how the last line of the log of a loop begins


@runtime_checkable
class Trained(Protocol):
    """What there is to know of a run: whether it took all its steps."""

    @property
    def finished(self) -> bool: ...


R = TypeVar("R", bound=Trained)


def run_rounds(config: BootstrapConfig, device: torch.device, train: Callable[[RunConfig], R]) -> R:
    """Go through the rounds of a loop, or through what is left of them; returns the run of the last one.

    A signal ends the round that trains, whose run is returned; the same call then goes on. `train` trains a
    run. Raises UserError for data that have objects already, and for an `out` that holds something else.
    """
    data = data_of(config)
    source = open_source(data)
    if config.init is not None:  # before all images are read: they are what its features find objects in
        first = load(config.init).config
        suited(source, first.transform.decoding, first.model.channels)
    images = same_data.agreed(source)
    with ExitStack() as stack:
        loop = LoopFolder(distributed.on_main(lambda: _claim(config, images, stack)))
        begins = distributed.on_main(lambda: _reached(loop, config.rounds))
        run: R | None = None
        for number in range(begins, config.rounds + 1):
            before = str(loop.run(number - 1, config.rounds)) if number else None
            features = config.init if number == 1 and config.init is not None else before
            if number == 0:
                if config.init is not None:
                    continue
                _say(
                    loop, "round 0: the recipe without objects on the same images, as no init gives features"
                )
            elif not distributed.on_main(lambda n=number: _was_said(loop, f"round {n}:")):
                assert features is not None
                found = _find(config, features, loop, number, device)
                _say(loop, f"round {number}: {_account(loop, number, found)}")
            run = train(round_config(config, number, loop, features))
            if not run.finished:
                return run
        assert run is not None  # there is at least one round
        _say(
            loop, f"{FINISHED}: {config.rounds} rounds; the encoder of the last one: {loop.path / 'encoder'}"
        )
    return run


def data_of(config: BootstrapConfig) -> str:
    """Return the data string of a loop. Raises ConfigError where there is none, or its images have
    objects.
    """
    config.refuse_fresh()
    if config.data is None:
        raise ConfigError(f"recipe {config.recipe!r} needs data=..., for example data=folder:/my/images")
    if config.data.startswith(f"{OBJECT}:"):
        raise ConfigError(
            "rounds: each round reads its objects beside the images: give data as a data string, no source"
        )
    source = open_source(config.data)
    if source.has_objects:
        raise ConfigError(
            f"{source.name} has objects already: train on them, by a recipe without rounds "
            "(odis-small); or leave them out of the data string, for rounds that find their own"
        )
    return config.data


def round_config(
    config: BootstrapConfig, number: int, loop: LoopFolder | None, features: str | None
) -> RunConfig:
    """Return the configuration of a round: a run on the objects of that round in `loop`.

    It begins with the weights behind `features`, or, told to restart, with those that the loop began with.
    Without a loop (`--dry-run`), it is one on the images alone.
    """
    own = {f.name for f in fields(BootstrapConfig)} - {f.name for f in fields(RunConfig)}
    tree: KeyTree = {name: value for name, value in to_dict(config).items() if name not in own}
    tree["init"] = config.init if config.restart else features
    if tree["init"] != config.init:  # a round before, of the same channels
        tree["init_channels"] = USUAL_CHANNELS
    if not config.restart:  # else rounds differ by their objects alone
        tree["seed"] = (config.seed + number) % 2**64
    if loop is not None:
        tree["out"] = str(loop.run(number, config.rounds))
        if number:
            tree["data"] = reading_objects(str(config.data), loop.objects(number))
    if number == 0:
        tree |= {"init": None, "duration": config.first_duration or config.duration}
        tree |= {"views": tree["views"] | {"objects": None}}
        tree |= {"loader": tree["loader"] | {"objects_noise": None}}
        if isinstance(config.method, DistillationConfig):
            tree["method"] = tree["method"] | _without_objects(config.method, tree["method"])
    return build(RunConfig, tree)


def reading_objects(data: str, file: Path) -> str:
    """Return a data string whose objects are those of a file."""
    return f"{data}{'&' if '?' in data else '?'}annotations={quote(str(file))}"


def _without_objects(method: DistillationConfig, tree: KeyTree) -> KeyTree:
    """What of a method changes where views have no object tokens: a term about a second token is away, and
    nothing is weighted by object.
    """
    changes: KeyTree = {"token": tree["token"] and tree["token"] | {"weight_by": None}}
    terms = method.terms().items()
    return changes | {name: None for name, term in terms if method.known[name].reads_image_token(term)}


def _claim(config: BootstrapConfig, images: same_data.RunImages, stack: ExitStack) -> Path:
    """The folder of a loop, which no other process works in from here on, and which says what it is."""
    path = _choose(config, images)
    about = LoopFolder(path).about
    stack.enter_context(folder.lock(about.path))
    if about.is_run():
        changed = same_data.note_change(about.path, images, config.data_changed == "allow")
    else:
        changed = folder.begin(about.path, config, images)
    if changed:
        _write(LoopFolder(path), changed)
    return path


def _choose(config: BootstrapConfig, images: same_data.RunImages) -> Path:
    if config.out is not None:
        path = Path(config.out).expanduser()
        about = LoopFolder(path).about
        if about.is_run():
            if different := folder.setting_difference(about.path, config, images):
                raise ConfigError(
                    f"{path} holds another loop ({different}): choose another out=, or repeat its settings; "
                    f"init={shlex.quote(str(path))} goes on from what it learned"
                )
        elif path.exists() and not (path.is_dir() and folder.is_empty(path)):
            raise ConfigError(f"{path} is not empty and holds no rounds: choose another out=")
        return path
    name = (config.recipe or "rounds").replace("/", "-")
    for path in sorted(Path("runs").glob(f"{name}-*/"), reverse=True):
        loop = LoopFolder(path)
        if folder.is_of(loop.about.path, config, images) and not _was_said(loop, FINISHED):
            return path
    return folder.new_folder(name)


def _reached(loop: LoopFolder, rounds: int) -> int:
    """The round that a loop is in: the last one that has its objects."""
    return max((number for number in range(1, rounds + 1) if loop.objects(number).is_file()), default=0)


def _find(
    config: BootstrapConfig, model: str, loop: LoopFolder, number: int, device: torch.device
) -> Proposed:
    idle = config.filter.unread()
    kept = {name: value for name, value in to_dict(config.filter).items() if name not in idle}
    finder = discoverer(model, config.discover, device)
    found = propose(finder, str(config.data), out=loop.masks(number), workers=config.loader.workers, **kept)
    if not any(found.summary.counts):
        raise ConfigError(
            f"round {number}: no objects were found in any image: other discover.* or filter.* keys, "
            "or features that tell patches apart (a longer first_duration, or init=)"
        )
    return found


def _account(loop: LoopFolder, number: int, found: Proposed) -> str:
    """How many objects a round has, and how they differ from those of the round before."""
    counts = found.summary.counts
    text = (
        f"{sum(counts):,} objects in {len(counts):,} images, {counts.count(0):,} of them without any; "
        f"half of the objects cover more than {np.median(found.summary.areas):.0%} of their image"
    )
    if number > 1 and distributed.is_main():
        text += f"; {object_changes(loop.objects(number - 1), loop.objects(number))}"
    return text


def object_changes(before: Path, now: Path) -> str:
    """Return how the objects of two files of the same images differ, in words."""
    old, new = _by_image(before), _by_image(now)
    gained = sum(not old.get(name) for name, found in new.items() if found)
    lost = sum(not new.get(name) for name, found in old.items() if found)
    both = [name for name, found in new.items() if found and old.get(name)]
    ious = [np.asarray(coco.iou(new[name], old[name], [0] * len(old[name]))) for name in both]
    best = [each.max(axis=1) for each in ious]
    alike = f"mean best IoU {np.concatenate(best).mean():.2f} with those of the round before" if best else ""
    moved = f"{gained:,} images have some now and had none, {lost:,} have none any more"
    return ", ".join(filter(None, (alike, moved)))


def _by_image(file: Path) -> dict[str, list[Any]]:
    tree = json.loads(file.read_text(encoding="utf-8"))
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    found: dict[str, list[Any]] = {name: [] for name in names.values()}
    for annotation in tree["annotations"]:
        found[names[annotation["image_id"]]].append(annotation["segmentation"])
    return found


def _say(loop: LoopFolder, text: str) -> None:
    """Show a line, and write it to the log of the loop, once."""

    def once() -> None:
        if not _was_said(loop, text):
            _write(loop, text)

    distributed.on_main(once)


def _write(loop: LoopFolder, text: str) -> None:
    print(text, flush=True)
    with loop.about.log.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")


def _was_said(loop: LoopFolder, beginning: str) -> bool:
    log = loop.about.log
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return any(line.partition("  ")[2].startswith(beginning) for line in lines)
