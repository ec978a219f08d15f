"""Does the encoder look at the object? Boxes from maps over the patches; protocol `localisation`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, key
from foveola.data.sources import Source
from foveola.evaluation.classification.abmilp import load_weights
from foveola.evaluation.classification.saved import SavedProbe
from foveola.evaluation.classification.task import held_out
from foveola.evaluation.features.cache import feeding
from foveola.evaluation.features.need import need
from foveola.evaluation.features.table import check_finite
from foveola.evaluation.images import (
    Batches,
    Images,
    SquashedConfig,
    choose_images,
    facts_of_bad,
    identity_for,
    slice_of_rank,
)
from foveola.evaluation.localisation.box_accuracy import (
    IOUS,
    SIDE,
    STEPS,
    BoxAccuracy,
    accuracy,
    distinct,
    enlarge,
    image_hits,
    locate,
    max_box_acc,
    square_hits,
)
from foveola.evaluation.localisation.boxed import Boxed, BoxedCut
from foveola.evaluation.localisation.components import GREY_LEVELS
from foveola.evaluation.localisation.score_maps import (
    SCORE_MAPS,
    MapReader,
    choose_maps,
    is_map,
    learn_weights,
)
from foveola.evaluation.metrics import interval
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import At, Metric, Needs, Outcome, Protocol, Reading
from foveola.models.encoder import Encoder

__all__ = ["BoxAccuracy", "Localisation", "LocalisationConfig", "locate", "max_box_acc"]

OF_TRAINING = ("epochs", "lr", "store")  # keys of AbMILP's training
CURVE = 20  # points of the curves over thresholds that a result keeps


@dataclass(frozen=True)
class LocalisationConfig(SquashedConfig):
    """Settings of `localisation`. Defaults: MaxBoxAccV2 as Selective Aggregation measures it (Table 8)."""

    maps: tuple[str, ...] | None = key(
        None,
        "maps to make boxes of: attention, lowest_entropy, heads (or head0, ...), centre, abmilp, pca; "
        "null = attention if the encoder has it, and abmilp where train is given",
    )
    block: int = key(-1, "block whose attention is read; negative numbers count from the last")
    iou: tuple[float, ...] = key(IOUS, "overlaps from which an image is found", above=0, at_most=1)
    interval: float = key(0.001, "step between the thresholds tried", above=0, at_most=0.5)
    official: bool = key(True, "the published rules to the pixel; false = exact boxes, none around holes")
    holdout: float = key(
        0.1,
        "fraction of the images that chooses the thresholds of boxacc_v2, measured on the rest",
        above=0,
        below=1,
    )
    epochs: int = key(90, "abmilp: passes over the training images", at_least=1)
    lr: tuple[float, ...] = key((0.1,), "abmilp: learning rates to try, of a batch of 256", above=0)
    store: Literal["float32", "float16"] = key("float32", "abmilp: number format of stored patches")
    probe: str | None = key(
        None, "abmilp: a file that an evaluation by `abmilp` wrote; its weights, without training and train="
    )

    def __post_init__(self) -> None:
        if self.probe and self.maps is not None and "abmilp" not in self.maps:
            raise ValueError("probe: has no effect, as maps= has no abmilp")
        for each in fields(self) if self.probe else ():
            if each.name in OF_TRAINING and getattr(self, each.name) != each.default:
                raise ValueError(f"{each.name}: probe={self.probe} is trained already, so it has no effect")
        for name in ("maps", "iou", "lr"):
            value = getattr(self, name)
            if value is not None and (not value or len(set(value)) < len(value)):
                raise ValueError(f"{name}: needs different values, got {list(value)}")
        for name in self.maps or ():
            if not is_map(name):
                raise ValueError(f"maps: unknown {name!r}; known: {', '.join(SCORE_MAPS)}, head0, head1, ...")
        if len({iou_name(iou) for iou in self.iou}) < len(self.iou):
            raise ValueError(f"iou: needs values that differ by 0.01 or more, got {list(self.iou)}")


def iou_name(iou: float) -> str:
    """Write 0.3 as "30", as it stands in names of metrics."""
    return f"{round(100 * iou):02d}"


# -- the pass over the images ------------------------------------------------------------------------------


class Localised(NamedTuple):
    """Whether each option finds the object: of n images, M maps and D IoUs (and a last row for MaxBoxAcc)."""

    maps: UInt8[Tensor, "n M D1 bytes"]  # a bit for each of 255 grey levels
    squares: Bool[Tensor, "n D1 56"]
    image_indices: Int64[Tensor, "n"]
    counts: Int64[Tensor, "n"]  # annotated boxes
    areas: Float32[Tensor, "n"]  # mean fraction of the image that a box covers
    bad: Int64[Tensor, "b"]
    bare: int

    def hits(self, index: int) -> Bool[np.ndarray, "n D1 255"]:
        """Return whether one map finds the boxes."""
        return np.unpackbits(self.maps[:, index].numpy(), axis=-1, count=GREY_LEVELS).astype(bool)


def find_boxes(
    encoder: Encoder, source: Source, reader: MapReader, config: LocalisationConfig, side: int, progress: bool
) -> Localised:
    """Return the pass over the images: maps of each, and at once whether their boxes are right."""
    chosen = choose_images(len(source), config.limit, config.seed)
    images = Images(
        source, chosen[slice_of_rank(len(chosen))], BoxedCut(encoder.config.transform.squashed(side))
    )
    batches: Batches[Boxed] = Batches(images, config, f"maps of {source.name}", progress)
    rows = len(config.iou) + 1
    maps = [torch.zeros(0, len(reader.names), rows, -(-GREY_LEVELS // 8), dtype=torch.uint8)]
    squares, image_indices = (
        [torch.zeros(0, rows, STEPS, dtype=torch.bool)],
        [torch.zeros(0, dtype=torch.int64)],
    )
    counts, areas = [], []
    for batch in batches:
        for at in torch.arange(len(batch.image_indices)).split(config.batch_size):
            found = reader(batch.images[at])
            check_finite(found.flatten(1), batch.image_indices[at], source)
            boxes = [batch.boxes[i] for i in at.tolist()]
            maps.append(torch.from_numpy(_packed_hits(found, boxes, config)))
        for boxes in batch.boxes:
            squares.append(torch.from_numpy(square_hits(boxes, config.iou, SIDE, config.official))[None])
            counts.append(len(boxes))
            areas.append(float((boxes[:, 2:] - boxes[:, :2]).prod(axis=1).mean()))
        image_indices.append(batch.image_indices)
    return Localised(
        maps=distributed.gather_rows(torch.cat(maps)),
        squares=distributed.gather_rows(torch.cat(squares)),
        image_indices=distributed.gather_rows(torch.cat(image_indices)),
        counts=distributed.gather_rows(torch.tensor(counts, dtype=torch.int64)),
        areas=distributed.gather_rows(torch.tensor(areas, dtype=torch.float32)),
        bad=batches.gathered_bad(),
        bare=sum(distributed.gather_objects(len(images.chosen) - len(counts) - len(batches.bad))),
    )


def _packed_hits(
    maps: Float32[Tensor, "b M h w"], boxes: Sequence[np.ndarray], config: LocalisationConfig
) -> UInt8[np.ndarray, "b M D1 bytes"]:
    heights, grey = enlarge(maps.flatten(0, 1))
    repeated = [of_image for of_image in boxes for _ in range(maps.shape[1])]
    each = zip(heights, grey, repeated, strict=True)
    hits = [image_hits(h, levels, of_image, config.iou, config.official) for h, levels, of_image in each]
    return np.packbits(np.stack(hits), axis=-1).reshape(len(maps), maps.shape[1], len(config.iou) + 1, -1)


# -- protocol ------------------------------------------------------------------------------------------------


class Localisation(Protocol):
    """Draws boxes around what each map lights up, and holds them against annotated boxes of `test`.

    So it does with content-free squares (`full_image`, `centred_box`). Numbers in percent, of each map m:
    `maxboxacc_v2_m`, thresholds chosen on the images that are measured (as published), with a 95 % interval
    over images at these thresholds; `maxboxacc_30_m`, ... at each IoU; `maxboxacc_v1_m`; and `boxacc_v2_m`,
    thresholds chosen on a hold-out, measured on the others.
    """

    name = "localisation"
    help = "boxes around the bright parts of attention (or another map), against annotated boxes"
    Config = LocalisationConfig
    train = "optional"
    metrics = (
        Metric(
            "maxboxacc_v2_*", "localisation maxboxacc (v2 {})", "higher", main=True, column="maxboxacc_v2"
        ),
        Metric("maxboxacc_*_*", "localisation maxboxacc ({} {})", "higher", column="maxboxacc_{}"),
        Metric("boxacc_v2_*", "localisation boxacc (v2 {})", "higher", column="boxacc_v2"),
        Metric("holdout_*", "localisation holdout ({})", "higher"),
    )

    def needs(self, config: LocalisationConfig, encoder: Encoder) -> Needs:
        """Return the need of patches of training images, for AbMILP; test images are squashed, in a
        pass of its own.
        """
        learned = not config.probe and (config.maps is None or "abmilp" in config.maps)
        return Needs(train=(Reading(need("patches")),) if learned else ())

    def train_for(self, config: LocalisationConfig) -> Literal["optional", "unused"]:
        """Return that AbMILP may learn from training data, unless it is trained already."""
        return "unused" if config.probe else "optional"

    def measure(self, at: At, config: LocalisationConfig) -> Outcome:
        """Measure boxes from each map, and from content-free squares, against `test`'s."""
        train, test = at.train, at.test
        if not test.has_objects:
            raise UserError(
                f"{test.name} has no boxes, against which to localise; give it some (boxes=, annotations=)"
            )
        labelled = train is not None and len(train.classes or ()) > 1
        names = choose_maps(at.encoder, config.maps, labelled or config.probe is not None)
        side = config.image_size or at.encoder.config.transform.crop
        at.encoder.check_side(side, "image_size")
        reader = MapReader(at.encoder, names, config.block, config.precision)
        data: dict[str, Any] = {}
        chosen: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        if config.probe:
            reader.weights = load_weights(config.probe, at.encoder)
            data["train"] = SavedProbe.load(config.probe).about["data"]["train"]
        elif "abmilp" in names and train is not None and at.feed is not None:
            learned = learn_weights(
                at.feed,
                train,
                feeding(config),
                at.encoder.device,
                lr=config.lr,
                epochs=config.epochs,
                progress=at.progress,
            )
            reader.weights, data["train"] = learned.weights, learned.facts
            metrics |= learned.metrics
            chosen["abmilp"] = learned.chosen
        found = find_boxes(at.encoder, test, reader, config, side, at.progress)
        data["test"] = _facts(found, test, config)
        measure = Measure(found, config)
        for index, name in enumerate(names):
            measure.add(name, found.hits(index)[:, :, measure.levels], measure.thresholds, "threshold")
        squares = found.squares.numpy()
        sides = [round(step / STEPS, 4) for step in range(1, STEPS + 1)]
        measure.add("centred_box", squares, sides, "side")
        measure.add("full_image", squares[:, :, -1:], [1.0], "side")
        for name, options in chosen.items():
            measure.chosen[name] = options | measure.chosen[name]
        notes = _notes(config, train, names)
        return Outcome(measure.metrics | metrics, data, notes, measure.chosen, measure.grid, measure.scores)


class Measure:
    """Metrics, chosen options and curves of one map (or square) after another."""

    def __init__(self, found: Localised, config: LocalisationConfig) -> None:
        self.config, self.image_indices = config, found.image_indices
        self.levels, self.thresholds = distinct(np.arange(0, 1, config.interval).tolist())
        rest, hold = held_out(torch.arange(len(found.image_indices)), config.holdout, config.seed)
        self.rest, self.hold = rest.numpy(), hold.numpy()
        self.metrics: dict[str, float] = {}
        self.chosen: dict[str, Any] = {}
        self.grid: dict[str, Any] = {}
        self.scores: dict[str, Any] = {}

    def add(self, name: str, hits: Bool[np.ndarray, "n D1 T"], options: Sequence[float], kind: str) -> None:
        """Add the accuracies of one map: the threshold chosen on all images, and one that the hold-out
        chose.
        """
        ious = [iou_name(iou) for iou in self.config.iou]
        every = accuracy(hits, options)
        all_ = np.arange(len(hits))
        self._interval(f"maxboxacc_v2_{name}", hits, all_, every, options)
        self.metrics |= {
            f"maxboxacc_{iou}_{name}": value for iou, value in zip(ious, every.best, strict=True)
        }
        self.metrics[f"maxboxacc_v1_{name}"] = every.largest
        held = accuracy(hits[self.hold], options)
        self._interval(f"boxacc_v2_{name}", hits, self.rest, held, options)
        self.chosen[name] = {
            **{f"{kind}_{iou}": option for iou, option in zip(ious, every.chosen, strict=True)},
            **{f"{kind}_{iou}_of_holdout": option for iou, option in zip(ious, held.chosen, strict=True)},
        }
        points = np.unique(np.linspace(0, len(options) - 1, CURVE).round().astype(int))
        self.grid[name] = [
            {
                kind: options[i],
                **{iou: float(curve[i]) for iou, curve in zip(ious, every.curves, strict=True)},
            }
            for i in points
        ]

    def _interval(
        self, metric: str, hits: np.ndarray, rows: np.ndarray, by: BoxAccuracy, options: Sequence[float]
    ) -> None:
        """The mean over IoUs with the options that `by` chose, and its interval over the images `rows`."""
        indices = [options.index(option) for option in by.chosen]
        values = torch.from_numpy(hits[rows][:, range(len(indices)), indices].mean(axis=1))
        low, high = interval(values, seed=self.config.seed)
        self.scores[metric] = packed(values, self.image_indices[torch.from_numpy(rows)])
        found = 100 * values.mean().item()
        self.metrics |= {metric: found, f"{metric}_low": 100 * low, f"{metric}_high": 100 * high}


def _facts(found: Localised, source: Source, config: LocalisationConfig) -> dict[str, Any]:
    count = len(found.image_indices) + len(found.bad) + found.bare
    facts = facts_of_bad(found.bad, count, source)
    if len(found.image_indices) < 2:
        raise UserError(
            f"{source.name}: {len(found.image_indices)} of {count} images have a box; 2 are needed"
        )
    return {
        "name": source.name,
        "fingerprint": identity_for(source, config).digest,
        "images": count,
        **facts,
        "rows": len(found.image_indices),
        "without_boxes": found.bare,
        "boxes": int(found.counts.sum()),
        "mean_box_area": round(found.areas.double().mean().item(), 4),
        "holdout": max(1, int(config.holdout * len(found.image_indices))),
    }


def _notes(config: LocalisationConfig, train: Source | None, names: tuple[str, ...]) -> tuple[str, ...]:
    notes = ["maxboxacc: thresholds (and sides of centred boxes) chosen on the images that are measured"]
    if not config.official:
        notes.append("official=false: exact boxes, not comparable with published numbers")
    if train is not None and "abmilp" not in names:
        notes.append("train is not used: maps= has no abmilp")
    return tuple(notes)
