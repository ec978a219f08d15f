"""`foveola demo`: pretrain on the built-in images, ask whether it helped, and draw what was learned."""

import json
import os
import signal
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, parse_overrides, to_dict
from foveola.data.sources import open_source
from foveola.drawing.overlays import magnify, outline
from foveola.drawing.sheet import Pixels, Row, panel, save_png
from foveola.evaluation.classification.knn import KnnConfig
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.features.table import FeatureTable, extract
from foveola.figures.maps import neighbours
from foveola.files import RunFolder
from foveola.launchers import STOPPING, own_cores, start_processes
from foveola.models.encoder import Encoder
from foveola.reports.report import report
from foveola.training.recipe import RunConfig, nested, resolve
from foveola.training.run import Run, pretrain, untrained
from foveola.trees import flat
from foveola.zoo.load import load

DEMO_OBJECTS = 1000  # to find among each other
LEGIBLE = 0.12  # of its image that an object must cover to be shown
ENLARGED = 4  # times the pixels of scenes in the figure
DRAWN = 800  # images of each half among which the figure looks for objects
STOPPED_EXIT = 75  # of processes that a signal stopped before the end of the run
REPORTED = 200  # objects and images of the measurements that the report makes at each kept step
MEASURES = {  # of the table: (protocol, metric)
    "same-object retrieval, rank-1": ("retrieval", "rank1_masks"),
    "object k-NN with masks": ("knn", "top1_masks"),
    "object k-NN without masks": ("knn", "top1_plain"),
}


@dataclass(frozen=True)
class DemoTable:
    """Untrained against trained, in percent, for each seed."""

    before: dict[str, list[float]]
    after: dict[str, list[float]]

    def table(self) -> str:
        """Return one line a measure: mean and standard deviation over seeds."""
        count = len(next(iter(self.before.values())))
        title = "objects never seen in training, %"
        wide = max(len(title), *map(len, MEASURES))
        lines = [f"{title:<{wide}}  {'untrained':>12}  {'trained':>12}  {'change':>14}"]
        for name in MEASURES:
            before, after = np.array(self.before[name]), np.array(self.after[name])
            factor = f"x {after.mean() / before.mean():.1f}" if before.mean() else ""
            change = f"{after.mean() - before.mean():+.1f}  {factor:>6}"
            lines.append(f"{name:<{wide}}  {_spread(before):>12}  {_spread(after):>12}  {change:>14}")
        about = f"mean ± standard deviation over {count} seeds"
        return "\n".join([*lines, about if count > 1 else "one seed; seeds=3 says how much they differ"])


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def demo(
    out: str | Path = "runs/demo",
    seeds: int = 1,
    overrides: list[str] | dict[str, Any] | None = None,
    processes: int | None = 1,
) -> DemoTable | None:
    """Train the recipe `demo` once for each seed, compare with untrained encoders, and write `demo.png` and
    `report.html`.

    Runs go to `out/seed-<n>`; one that is there is resumed or, if finished, reused. `processes` train
    together, each a part of the batch; None: two on a CPU of several cores, which is faster than one with two
    threads. Returns None if a signal stopped it. Raises UserError for bad overrides, before anything is
    trained.
    """
    before: dict[str, list[float]] = {name: [] for name in MEASURES}
    after: dict[str, list[float]] = {name: [] for name in MEASURES}
    config: RunConfig = resolve("demo", overrides)
    processes = _fitting_processes(config) if processes is None else processes
    for seed in range(seeds):
        folder = Path(out) / f"seed-{seed}"
        changes = {"seed": config.seed + seed, "out": str(folder)}
        print(f"seed {seed}: training in {folder}", flush=True)
        run = _train(config, changes, overrides, processes)
        if run is None or not run.finished:
            return None
        for table, encoder in ((before, untrained(run.config)), (after, run.folder)):
            for name, value in measure_demo(encoder, run.config).items():
                table[name].append(value)
    comparison = DemoTable(before, after)
    image = save_png(figure_of(Path(out) / "seed-0", config), Path(out) / "demo.png")
    page = _report(Path(out), seeds, config)
    print(f"\n{comparison.table()}\n\nimage: {image}\nreport:  {page}")
    print(f"encoder: {Path(out) / 'seed-0' / 'encoder'}", flush=True)
    return comparison


def _fitting_processes(config: RunConfig) -> int:
    """How many processes train: no more than two, so that most machines come to the same numbers."""
    alone = "WORLD_SIZE" in os.environ or distributed.find_device(config.device).type != "cpu"
    return 1 if alone or config.batch_size % 2 or own_cores() < 2 else 2


def _train(
    config: RunConfig,
    changes: dict[str, Any],
    overrides: list[str] | dict[str, Any] | None,
    processes: int,
) -> Run | None:
    """Train one seed; None where a signal stopped it."""
    if processes > 1 and not RunFolder(Path(changes["out"])).encoder.is_whole():
        keys = overrides if isinstance(overrides, dict) else parse_overrides(overrides or [])
        words = [
            f"{key}={json.dumps(value, default=str)}" for key, value in (flat(nested(keys)) | changes).items()
        ]
        code = start_processes(["pretrain", "demo", *words], f"processes={processes}", STOPPED_EXIT)
        if code in (STOPPED_EXIT, *(128 + getattr(signal, name, 0) for name in STOPPING)):
            return None
        if code:  # also of a process that was killed, as where memory ran out
            raise UserError(
                f"training in {processes} processes ended with exit code {code}; the same command goes on "
                "from the last checkpoint, with processes=1 in one process, which needs less memory"
            )
        with redirect_stdout(None):  # they have said that the run is finished
            return pretrain(config, **changes)
    return pretrain(config, **changes)


def measure_demo(model: Encoder | Path, config: RunConfig) -> dict[str, float]:
    """Return the measures of the demo's table, in percent, for one encoder."""
    settings = {"knn": _knn(config), "retrieval": _find(config, DEMO_OBJECTS)}
    learns = {"knn": config.data, "retrieval": None}
    results = {
        name: evaluate(model, name, train=train, test=config.data, progress=False, **settings[name])
        for name, train in learns.items()
    }
    return {title: results[protocol].metrics[metric] for title, (protocol, metric) in MEASURES.items()}


def _knn(config: RunConfig) -> dict[str, Any]:
    return {f: getattr(config.evaluate, f) for f in KnnConfig.__dataclass_fields__}


def _find(config: RunConfig, objects: int) -> dict[str, Any]:
    """Settings of the retrieval: objects are searched in views like those of training."""
    views = config.views
    assert views.objects is not None
    return {
        "objects": objects,
        "masks": True,
        "scale": views.global_scale,
        "min_visible": views.objects.min_visible,
        "min_area": 0.03,
        "color": to_dict(views.color),
        "workers": 0,
    }


def _report(out: Path, seeds: int, config: RunConfig) -> Path:
    """The report of all runs, with measurements small enough for a minute or two."""
    limit = min(REPORTED, config.evaluate.limit or REPORTED)
    settings = {"knn": {"limit": limit, "masks": True}, "retrieval": _find(config, limit), "limit": limit}
    return report([out / f"seed-{seed}" for seed in range(seeds)], RunFolder(out).report, **settings)


def figure_of(folder: Path, config: RunConfig, count: int = 5, found: int = 4) -> Pixels:
    """Draw held-out objects, and what is nearest to them in training before and after it.

    Shown are the objects whose `2 * found` nearest objects agree most after training, one for each kind of
    product that they agree on: the label of the object itself has no say in it. A frame is around neighbours
    of the same kind.
    """
    train: Any = open_source(config.data or "scenes:", "train")
    test: Any = open_source(config.data or "scenes:", "test")
    settings = KnnConfig(rows="objects", view="object", context=0.2, workers=0, limit=DRAWN)
    tables = [
        [extract(encoder, source, masks=True, config=settings, progress=False) for source in (test, train)]
        for encoder in (untrained(config), load(folder))
    ]
    (before, first), (queries, last) = tables
    numbers = zip(queries.image_indices.tolist(), queries.objects.tolist(), strict=True)
    areas = np.array([test[image].objects.areas[number] for image, number in numbers])
    chosen = _surest(queries, last, torch.from_numpy(areas >= LEGIBLE), 2 * found, count)
    rows = []
    for query in chosen:
        name, label = test.classes[int(queries.labels[query])], int(queries.labels[query])
        tiles, captions = [_cut(test, queries, query)], [""]
        right: list[bool | None] = [None]
        for asked, table in ((before, first), (queries, last)):
            for near in neighbours(asked.features[[query]], table.features, found)[0].tolist():
                tiles.append(_cut(train, table, near))
                captions.append(train.classes[int(table.labels[near])])
                right.append(True if int(table.labels[near]) == label else None)
        rows.append(Row(name, tiles, captions, right))
    columns = ["held-out object", *[f"untrained: {n + 1}" for n in range(found)]]
    columns += [f"trained: {n + 1}" for n in range(found)]
    return panel(
        "What is nearest to an object it has never seen, before and after training without labels",
        columns,
        rows,
        note="Green frame: the same kind of product. The kinds are printed for you; training knew none. Of "
        f"{int((areas >= LEGIBLE).sum()):,} large held-out objects those are shown whose neighbours agree "
        "most, one for each kind that they agree on, right or wrong; the table has the numbers of all.",
    )


def _surest(
    queries: FeatureTable, train: FeatureTable, legible: Bool[Tensor, "Q"], k: int, count: int
) -> list[int]:
    """Legible queries whose k nearest rows of `train` agree most on a label, one for each such label."""
    large = torch.nonzero(legible)[:, 0]
    votes = train.labels[neighbours(queries.features[large], train.features, k)]
    labels = votes.mode(dim=1).values
    order = (votes == labels[:, None]).sum(dim=1).argsort(descending=True, stable=True)
    chosen: dict[int, int] = {}
    for row in order.tolist():
        chosen.setdefault(int(labels[row]), int(large[row]))
    return list(chosen.values())[:count]


def _cut(source: Any, table: FeatureTable, row: int) -> Pixels:
    """A square around an object, cut out of its image, in which everything else is dark."""
    sample = source[int(table.image_indices[row])]
    number = int(table.objects[row])
    height, width = (ENLARGED * side for side in sample.image.shape[:2])
    pixels = outline(magnify(sample.image, height, width), sample.objects.masks[number])
    x0, y0, x1, y1 = sample.objects.boxes[number] * len(pixels)
    half = max(x1 - x0, y1 - y0) * 0.6
    x, y = (min(max(half, v), len(pixels) - half) for v in ((x0 + x1) / 2, (y0 + y1) / 2))
    left, top = (round(max(v - half, 0)) for v in (x, y))
    return pixels[top : round(top + 2 * half), left : round(left + 2 * half)]
