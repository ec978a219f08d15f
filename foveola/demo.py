"""`foveola demo`: pretrain on the built-in images, ask whether it helped, and draw what was learned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveola.config import to_dict
from foveola.data.sources import open_source
from foveola.drawing.overlays import heat, outline
from foveola.drawing.sheet import Pixels, Row, panel, save_png
from foveola.evaluation.classification.knn import KnnConfig
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.features.table import FeatureTable, extract
from foveola.evaluation.views import retrieval
from foveola.figures.maps import neighbours, object_attention
from foveola.files import RunFolder
from foveola.models.encoder import Encoder
from foveola.reports.report import report
from foveola.training.recipe import RunConfig, resolve
from foveola.training.run import pretrain, untrained
from foveola.views.batch import Streams, make_views
from foveola.zoo.load import load

DEMO_OBJECTS = 1000  # to find among each other
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
        return "\n".join([*lines, f"mean ± standard deviation over {count} seed{'s' * (count > 1)}"])


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def demo(
    out: str | Path = "runs/demo", seeds: int = 3, overrides: list[str] | dict[str, Any] | None = None
) -> DemoTable | None:
    """Train the recipe `demo` once for each seed, compare with untrained encoders, and write `demo.png` and
    `report.html`.

    Runs go to `out/seed-<n>`; one that is there is resumed or, if finished, reused. Returns None if a signal
    stopped it. Raises UserError for bad overrides, before anything is trained.
    """
    before: dict[str, list[float]] = {name: [] for name in MEASURES}
    after: dict[str, list[float]] = {name: [] for name in MEASURES}
    config: RunConfig = resolve("demo", overrides)
    for seed in range(seeds):
        folder = Path(out) / f"seed-{seed}"
        changes = {"seed": config.seed + seed, "out": str(folder)}
        print(f"seed {seed}: training in {folder}", flush=True)
        run = pretrain(config, **changes)
        if not run.finished:
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


def measure_demo(model: Encoder | Path, config: RunConfig) -> dict[str, float]:
    """Return the measures of the demo's table, in percent, for one encoder."""
    settings = {"knn": _knn(config), "retrieval": _find(config, DEMO_OBJECTS)}
    results = {
        name: evaluate(model, name, train=config.data, test=config.data, progress=False, **settings[name])
        for name in ("knn", "retrieval")
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


def figure_of(folder: Path, config: RunConfig, count: int = 6, found: int = 5) -> Pixels:
    """Draw crops of both views with the object's mask, attention, and nearest neighbours of held-out
    objects.
    """
    encoder = load(folder)
    test, train = (
        open_source(config.data or "scenes:", "test"),
        open_source(config.data or "scenes:", "train"),
    )
    settings = KnnConfig(rows="objects", view="object", context=0.2, workers=0, limit=1500)
    bank = extract(encoder, train, masks=True, config=settings, progress=False)
    queries = extract(encoder, test, masks=True, config=settings, progress=False)
    rng = np.random.default_rng(0)
    large = torch.nonzero(queries.readable >= 0.15)[:, 0].numpy()
    chosen = torch.from_numpy(rng.choice(large, count, replace=False))
    nearest = neighbours(queries.features[chosen], bank.features, found)
    rows = []
    for row, near in zip(chosen.tolist(), nearest.tolist(), strict=True):
        rows.append(_row(encoder, config, test, train, queries, bank, row, near))
    columns = ["view 1 + mask", "view 2 + mask", "attention", *[f"nearest {i + 1}" for i in range(found)]]
    return panel(
        "What the encoder learned: held-out objects, their attention, their neighbours in training",
        columns,
        rows,
    )


def _row(
    encoder: Encoder,
    config: RunConfig,
    test: Any,
    train: Any,
    queries: FeatureTable,
    bank: FeatureTable,
    row: int,
    near: list[int],
) -> Row:
    names = test.classes
    index, size = int(queries.image_indices[row]), config.loader.canvas
    cut = retrieval.CanvasCut(size, size, encoder.config.transform)
    canvases = cut(test[index], index, int(queries.objects[row])).canvases()
    views = make_views(canvases, config.views, encoder.patch_size, Streams(1, row)).large
    assert views.objects is not None
    patches = views.objects[0, :, 0]
    crops = [_pixels(encoder, view) for view in views.pixels[0]]
    masks = [mask.view(encoder.grid).numpy() for mask in patches]
    attention = object_attention(encoder, views.pixels[:, 0], views.objects[:, 0])[0, 0].numpy()
    tiles = [outline(crop, mask) for crop, mask in zip(crops, masks, strict=True)]
    tiles.append(heat(crops[0], attention))
    label = int(queries.labels[row])
    captions = ["", "", ""]
    right: list[bool | None] = [None, None, None]
    for other in near:
        tiles.append(_cut(train, int(bank.image_indices[other]), int(bank.objects[other])))
        captions.append(names[int(bank.labels[other])])
        right.append(int(bank.labels[other]) == label)
    return Row(names[label], tiles, captions, right)


def _pixels(encoder: Encoder, view: torch.Tensor) -> Pixels:
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (encoder.config.transform.mean, encoder.config.transform.std)
    )
    return (255 * (view * std + mean)).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def _cut(source: Any, image: int, number: int) -> Pixels:
    """A square around an object, cut out of its image."""
    sample = source[image]
    x0, y0, x1, y1 = sample.objects.boxes[number] * len(sample.image)
    half = max(x1 - x0, y1 - y0) * 0.6
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    left, top = (round(max(0, v - half)) for v in (x, y))
    right, bottom = (round(min(len(sample.image), v + half)) for v in (x, y))
    return sample.image[top:bottom, left:right]
