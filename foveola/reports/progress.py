"""Did training help? The same protocols for the untrained encoder, for the trained one at several steps, and
for another encoder. Results are kept beside the run and used again where nothing has changed.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import foveola
from foveola import distributed, files
from foveola.config import UserError, merge, to_dict
from foveola.data.sources import Source
from foveola.evaluation.evaluate import evaluate_all, protocol_configs
from foveola.evaluation.protocol import PROTOCOLS, find_protocol
from foveola.evaluation.result import Result
from foveola.evaluation.stored import results_of
from foveola.models.encoder import Encoder
from foveola.models.transform import evaluation_view
from foveola.reports.record import Record
from foveola.reports.request import (
    CONTROL_LIMIT,
    LIMIT,
    Data,
    ReportConfig,
    each_sample,
    open_control,
)
from foveola.reports.saved import home, identity, key_of, read_tree
from foveola.zoo.load import load

POSITION_IMAGES = 128  # images on which the fraction of position is measured
OBJECTS_TO_FIND = 500  # that are to be found among each other
UNTRAINED, START, BEST, END = "untrained", "start", "best", "end"
NEAR_END = 0.98  # fraction of the steps after which a kept encoder is as good as the last


@dataclass(frozen=True, eq=False)
class MeasuredStep:
    """What one encoder gave; `step` is None for one that is no step of this run."""

    label: str
    step: int | None
    results: dict[str, Result]
    position_fraction: float | None = None  # of the variance of patches that their position explains
    position_images: int | None = None  # on so many images

    @property
    def title(self) -> str:
        """Its label, with the step of the best one."""
        return f"{self.label} (step {self.step:,})" if self.label == BEST else self.label


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """Points of one run: untrained, the starting weights, kept steps and the best, the last encoder, the
    reference; those that there are.
    """

    points: tuple[MeasuredStep, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each protocol
    classes: int | None = None  # of the test data, where they have labels
    test: str = ""  # the name of the test data

    @property
    def baseline(self) -> str:
        """What training began with: the starting weights, or else an untrained network."""
        return UNTRAINED if self.point(START) is None else START

    def point(self, label: str) -> MeasuredStep | None:
        return next((point for point in self.points if point.label == label), None)


# -- protocols -----------------------------------------------------------------------------------------------


def plan_protocols(
    record: Record, data: Data, config: ReportConfig, changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return settings of each protocol to run: those of the recipe's own evaluation, then `changes`.

    Raises UserError for unknown protocols and keys, and for bad values.
    """
    if data.test is None:
        return {}
    names = config.protocols
    if names is None:
        there = {"label_free": True, "knn": data.labels is not None, "retrieval": data.test.has_objects}
        names = tuple(name for name, use in there.items() if use)
        changes = {k: v for k, v in changes.items() if k not in PROTOCOLS or k in names}
    protocol_configs(names, changes)
    settings = {}
    for name in names:
        protocol = find_protocol(name)
        known = set(protocol.Config.__dataclass_fields__)
        mine = {k: v for k, v in changes.items() if k in known and k not in names}
        own = changes.get(protocol.name) if isinstance(changes.get(protocol.name), dict) else {}
        settings[name] = merge(_defaults(name, names, record, data, config), merge(mine, own or {}))
        if "exclude_self" in known and "exclude_self" not in settings[name]:
            read = settings[name].get("limit"), settings[name].get("seed", 0)
            settings[name]["exclude_self"] = data.overlap(*read)
    return settings


def _defaults(
    name: str, names: Sequence[str], record: Record, data: Data, config: ReportConfig
) -> dict[str, Any]:
    """Settings of one of the protocols where nobody asks for others."""
    known = set(find_protocol(name).Config.__dataclass_fields__)
    settings: dict[str, Any] = {}
    if name == "knn":
        settings |= {k: v for k, v in (record.get("evaluate") or {}).items() if k in known}
        if data.labels == "objects" and settings.get("rows") != "objects":
            settings |= {"rows": "objects", "view": "object"}
        elif data.labels == "images" and settings.get("rows") == "objects":
            settings |= {"rows": "images", "view": "image"}
    if "limit" in known:
        settings["limit"] = config.limit or settings.get("limit") or LIMIT
    if "workers" in known and isinstance(record.get("evaluate.workers"), int):
        settings["workers"] = record.get("evaluate.workers")
    if name == "retrieval":
        settings["objects"] = OBJECTS_TO_FIND
    if name == "label_free" and "retrieval" in names:
        settings["objects"] = False  # that is what retrieval measures
    return settings


def measure_run(
    record: Record,
    data: Data,
    config: ReportConfig,
    changes: dict[str, Any],
    saved: Sequence[Path] = (),
    say: Callable[[str], None] = lambda text: None,
    brief: bool = False,
) -> MeasuredRun:
    """Measure all points of a run, each encoder loaded once; results that would be the same are used again.

    Args:
        changes: settings of protocols, as `evaluate_all` takes them.
        saved: folders of other runs' results to look in as well.
        say: is told what is being measured.
        brief: leave out the reference, the steps on the way but the best, and what positions explain.

    Raises UserError for unknown protocols and keys, a device that is not there, and a reference that cannot
    be loaded, before anything is measured. What the run itself lacks becomes a note.
    """
    settings = plan_protocols(record, data, config, changes)
    device = distributed.find_device(config.device)
    reference = load(config.reference, device) if config.reference else None
    if data.test is None:
        return MeasuredRun(notes=data.notes)
    if not record.has_encoder:
        why = "The run has no encoder yet: the first checkpoint writes it."
        return MeasuredRun(notes=(*data.notes, why), settings=settings)
    points, notes = [], list(data.notes)
    own = key_of([None if s is None else identity(s) for s in (data.train, data.test)])
    encoders = _encoders(record, config, brief)
    for number, (label, step, path) in enumerate(encoders, start=1):
        say(f"measuring {label}, {number} of {len(encoders)} networks: {', '.join(settings)}")
        try:
            encoder = load(path, device) if reference is None or label != config.reference else reference
        except UserError as error:
            notes.append(f"{label} was not measured: {error}")
            continue
        folders = [folder / encoder.fingerprint() / own for folder in (home(record.folder), *saved)]
        results, failed = _results(encoder, data, settings, folders)
        notes += failed
        placed = label in (UNTRAINED, END) and not brief
        fraction = _position_fraction(encoder, data.test, folders) if placed else (None, None)
        points.append(MeasuredStep(label, step, results, *fraction))
    classes = len(data.test.classes or ()) if data.labels else None
    return MeasuredRun(tuple(points), tuple(dict.fromkeys(notes)), settings, classes, data.test.name)


def measure_control(
    record: Record,
    config: ReportConfig,
    changes: dict[str, Any],
    saved: Sequence[Path] = (),
    say: Callable[[str], None] = lambda text: None,
) -> MeasuredRun | None:
    """Measure k-NN of the same networks on the control set; None where there is none."""
    data = open_control(record, config)
    if data is None:
        return None
    config = replace(config, protocols=("knn",), limit=config.limit or CONTROL_LIMIT)
    known = find_protocol("knn").Config.__dataclass_fields__
    changes = {key: value for key, value in changes.items() if key in known or key == "knn"}
    return measure_run(
        record, data, config, changes, saved, lambda text: say(f"control set: {text}"), brief=True
    )


def _encoders(record: Record, config: ReportConfig, brief: bool) -> list[tuple[str, int | None, str | Path]]:
    """Label, step and path of what is measured; of the kept encoders at most `checkpoints`."""
    start, best = record.start, record.best
    if start is None or (best is not None and best[0] in (0, record.encoder_step)):
        best = None
    saved = [(step, path) for step, path in record.checkpoints() if step < NEAR_END * record.encoder_step]
    saved = [] if brief else [pair for pair in saved if best is None or pair[0] != best[0]]
    if len(saved) > config.checkpoints:
        chosen = np.linspace(0, len(saved), config.checkpoints + 2)[1:-1].astype(int)
        saved = [saved[i] for i in dict.fromkeys(chosen.tolist())]
    steps: list[tuple[str, int, Path]] = [(f"step {step:,}", step, path) for step, path in saved]
    steps += [] if best is None else [(BEST, *best)]
    untrained = f"{UNTRAINED}:{record.folder}"
    found: list[tuple[str, int | None, str | Path]] = [(UNTRAINED, None if start else 0, untrained)]
    found += [] if start is None else [(START, 0, start)]
    found += sorted(steps, key=lambda each: each[1])
    found.append((END, record.encoder_step, record.folder))
    reference = None if brief else config.reference
    return found + ([(reference, None, reference)] if reference else [])


def _results(
    encoder: Encoder, data: Data, settings: dict[str, dict[str, Any]], folders: Sequence[Path]
) -> tuple[dict[str, Result], list[str]]:
    """Results by protocol, kept or new (written to the first folder), and what could not be measured."""
    results: dict[str, Result] = {}
    failed, missing = [], []
    for name, wanted in settings.items():
        own = find_protocol(name).name
        try:
            protocol_configs((name,), {own: wanted})
        except UserError as error:  # settings of another version's recipe
            failed.append(f"{name} was not measured: {error}")
            continue
        found = (_saved(folder, name, wanted, data) for folder in folders)
        if result := next(filter(None, found), None):
            results[own] = result
        else:
            missing.append(name)
    if not missing:
        return results, failed
    try:  # together they share a pass over the images
        return results | _evaluate(encoder, missing, data, settings, folders[0]), failed
    except UserError as error:
        if len(missing) == 1:
            return results, [*failed, f"{missing[0]} was not measured: {error}"]
    for name in missing:
        try:
            results |= _evaluate(encoder, (name,), data, settings, folders[0])
        except UserError as error:
            failed.append(f"{name} was not measured: {error}")
    return results, failed


def _evaluate(
    encoder: Encoder, names: Sequence[str], data: Data, settings: dict[str, Any], out: Path
) -> dict[str, Result]:
    changes: dict[str, Any] = {find_protocol(name).name: settings[name] for name in names}
    learns = any(find_protocol(name).train != "unused" for name in names)
    train = data.train if learns else None
    return evaluate_all(encoder, names, train=train, test=data.test, out=out, progress=False, **changes)


def _saved(folder: Path, name: str, wanted: dict[str, Any], data: Data) -> Result | None:
    """An earlier result of the encoder and images whose folder this is, if all else is the same as well."""
    if data.test is None:
        return None
    name, config = next(iter(protocol_configs((name,), {find_protocol(name).name: wanted}).items()))
    settings = json.loads(json.dumps(to_dict(config)))
    found = [stored.result for stored in results_of(folder)[0]]  # without those of another version
    same = (result for result in found if result.protocol == name and result.settings == settings)
    return next((result for result in same if result.versions.get("foveola") == foveola.__version__), None)


# -- position ------------------------------------------------------------------------------------------------


def position_fraction(batches: Iterable[Float[Tensor, "_ N D"]]) -> tuple[float, int]:
    """Return the fraction of the variance of patches that their position explains, in [0, 1], and of how many
    images.

    Components of variance of a one-way analysis with the N positions as groups of all images, at least 2: the
    variance of the positions' means, less what it would have by chance (within / images), over its sum with
    that within positions; 0 for constant features and for a single image. Batches are read one by one.
    """
    mean, squares, count = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        x, before = batch.double(), count
        count += len(x)
        step = x.mean(dim=0) - mean
        squares = squares + (x - x.mean(dim=0)).square().sum(dim=0)
        squares = squares + step.square() * before * len(x) / count
        mean = mean + step * len(x) / count
    if count < 2:
        return 0.0, count
    within = (squares / (count - 1)).sum(dim=1).mean().item()
    between = mean.var(dim=0, correction=1).sum().item() - within / count
    total = max(between, 0.0) + within
    return (max(between, 0.0) / total if total > 0 else 0.0), count


def _square(encoder: Encoder, pixels: Any) -> Tensor:
    """What is encoded of an image that is read already."""
    cut = evaluation_view(pixels, encoder.config.transform).pixels
    return encoder.normalise(cut[None].to(encoder.device))[0]


def _position_fraction(
    encoder: Encoder, source: Source, folders: Sequence[Path]
) -> tuple[float | None, int | None]:
    """Return how much position explains of the encoder's patches; None where too few can be read."""
    about = {"images": POSITION_IMAGES, "data": identity(source), "foveola": foveola.__version__}
    for folder in folders:
        tree = read_tree(folder / "place.json")
        if tree.get("about") == about and isinstance(tree.get("share"), float):
            return tree["share"], tree.get("used")
    if encoder.grid == (1, 1):
        return None, None
    patches = (
        encoder(_square(encoder, sample.image)[None]).patches.cpu()
        for _, sample in each_sample(source, POSITION_IMAGES)
    )
    with torch.inference_mode():  # as the generator goes
        fraction, used = position_fraction(patches)
    if used < 2:
        return None, None
    tree = {"about": about, "share": fraction, "used": used}
    files.write_text(folders[0] / "place.json", json.dumps(tree) + "\n")
    return fraction, used
