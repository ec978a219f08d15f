"""Unsupervised object discovery: what features alone find, held against annotated objects; `discovery`."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32

from foveola import distributed
from foveola.config import UserError, again, key, to_dict
from foveola.data.coco import rle_of
from foveola.data.sample import have_masks
from foveola.evaluation.detection.average_precision import Kind
from foveola.evaluation.detection.detect import DIGITS, SCORE_DIGITS, official
from foveola.evaluation.detection.proposals import METRICS, Compared, MeanRows, compare_proposals
from foveola.evaluation.detection.truth import Annotated, AnnotatedCut
from foveola.evaluation.images import (
    Batches,
    ChosenConfig,
    Images,
    ReadingConfig,
    choose_images,
    facts_of_bad,
    identity_for,
    slice_of_rank,
)
from foveola.evaluation.localisation.box_accuracy import SIDE, STEPS, square_hits
from foveola.evaluation.protocol import At, Metric, Outcome, Protocol
from foveola.proposals.discover import DiscoverConfig, discoverer
from foveola.proposals.proposal import Proposals, Proposer

KEPT_PROPOSALS = "proposals.json"  # in the folder beside the result


@dataclass(frozen=True)
class DiscoveryConfig:
    """Settings of `discovery`."""

    discover: DiscoverConfig = key(factory=DiscoverConfig)
    workers: int = again(ChosenConfig, "workers", 2, at_least=0)
    seed: int = again(ChosenConfig, "seed", 0)
    limit: int | None = again(ChosenConfig, "limit", None)
    resamples: int = key(
        200, "times that images are drawn again for the interval of AP; 0 = no interval", at_least=0
    )


class Discovered(NamedTuple):
    """What was found in images, and what there is, with indices in the source as ids of images."""

    sizes: dict[int, tuple[int, int]]  # rows, columns
    annotations: list[dict[str, Any]]
    proposals: list[dict[str, Any]]


class Discovery(Protocol):
    """Finds objects by the features of the encoder, without labels, and holds them against annotated ones.

    Classes play no part. Numbers in percent, of boxes (`box_`) and, where the data have them, masks
    (`mask_`): `corloc`, of the images with objects those whose first object has an IoU of at least 0.5 with
    any annotated one, as LOST and TokenCut report it; AP and AR of all objects found, as CutLER does;
    `precision`, `recall` and `best_iou`. Beside them the CorLoc of two boxes that need no encoder:
    `full_image_corloc`, and `centred_box_corloc` of the centred box whose size is best on these images.
    Crowds count as nothing.
    """

    name = "discovery"
    help = "objects that features show without labels (TokenCut, MaskCut, LOST): CorLoc, AP and AR"
    Config = DiscoveryConfig
    metrics = (Metric("box_corloc", "box CorLoc", "higher", main=True), *METRICS)

    def measure(self, at: At, config: DiscoveryConfig) -> Outcome:
        """Find the objects of all images of the test data, each process in its part of them, and count."""
        began = perf_counter()
        if not at.test.has_objects:
            raise UserError(
                f"test: {at.test.name} has no objects, which discovery needs (annotations=, boxes=)"
            )
        proposer = discoverer(at.encoder, config.discover, at.encoder.device)
        masks = have_masks(at.test)
        chosen = choose_images(len(at.test), config.limit, config.seed)
        cut = AnnotatedCut(masks, classes=False)
        batch = config.discover.batch_size
        images = Images(at.test, chosen[slice_of_rank(len(chosen))], cut, min(4, batch))
        reading = ReadingConfig(batch_size=batch, workers=config.workers)
        batches: Batches[Annotated] = Batches(images, reading, f"discovery {at.test.name}", at.progress)
        found = _discover(batches, proposer, masks)
        facts = {
            "name": at.test.name,
            "fingerprint": identity_for(at.test, config).digest,
            **facts_of_bad(batches.gathered_bad(), len(chosen), at.test),
            "images": len(chosen),
            "seconds": round(perf_counter() - began, 2),
        }
        return distributed.on_main(lambda: _outcome(at, config, found, masks, facts, proposer))


def _discover(batches: Batches[Annotated], proposer: Proposer, masks: bool) -> Discovered:
    """What all processes find in their images."""
    sizes, annotations, proposals = {}, [], []
    for batch in batches:
        for start in range(0, len(batch.images), proposer.batch_size):
            part = slice(start, start + proposer.batch_size)
            for index, image, known, found in zip(
                batch.indices[part].tolist(),
                batch.images[part],
                batch.annotations[part],
                proposer.propose(batch.images[part]),
                strict=True,
            ):
                sizes[index] = image.shape[:2]
                annotations += known
                proposals += coco_proposals(found, index, masks)
    gathered = distributed.gather_objects((sizes, annotations, proposals))
    return Discovered(
        {index: size for part in gathered for index, size in part[0].items()},
        [each for part in gathered for each in part[1]],
        [each for part in gathered for each in part[2]],
    )


def coco_proposals(found: Proposals, image: int, masks: bool) -> list[dict[str, Any]]:
    """Return proposals of an image in COCO's format of results, all of category 1."""
    results = []
    for k, (x0, y0, x1, y1) in enumerate(found.boxes.astype(np.float64).tolist()):
        result: dict[str, Any] = {
            "image_id": image,
            "category_id": 1,
            "bbox": [round(side, DIGITS) for side in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(float(found.scores[k]), SCORE_DIGITS),
        }
        if masks and found.masks is not None:
            result["segmentation"] = rle_of(found.masks[k])
        results.append(result)
    return results


def _outcome(
    at: At,
    config: DiscoveryConfig,
    found: Discovered,
    masks: bool,
    facts: dict[str, Any],
    proposer: Proposer,
) -> Outcome:
    objects = [annotation for annotation in found.annotations if not annotation["iscrowd"]]
    if not objects:
        raise UserError(f"test: {at.test.name} has no object in {len(found.sizes)} images")
    kinds: tuple[Kind, ...] = ("box", "mask") if masks else ("box",)
    compared = compare_proposals(
        found.sizes, found.annotations, found.proposals, kinds, config.resamples, config.seed
    )
    chosen = _add_squares(compared, found.sizes, objects, config.seed)
    told = {
        **facts,
        "rows": len(found.sizes),
        "with_objects": len({each["image_id"] for each in objects}),
        "objects": len(objects),
        "crowds": len(found.annotations) - len(objects),
        "proposals": len(found.proposals),
    }
    notes = ["the size of the centred box is chosen on the images that are measured"]
    if bare := len(found.sizes) - told["with_objects"]:
        notes.append(f"{bare} images have no annotated object: what is found there is wrong, but for CorLoc")
    return Outcome(
        compared.metrics,
        {"test": told, "proposer": proposer.describe()},
        tuple(notes),
        chosen,
        {"precision": compared.curves},
        compared.scores,
        {KEPT_PROPOSALS: official(at.test, found.proposals)},
        _that_count(config),
    )


def _that_count(config: DiscoveryConfig) -> dict[str, Any]:
    """The settings, without how many images are encoded at once: it changes no number."""
    tree = to_dict(config)
    return tree | {"discover": {name: v for name, v in tree["discover"].items() if name != "batch_size"}}


def _add_squares(
    compared: Compared, sizes: dict[int, tuple[int, int]], objects: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Add the CorLoc of centred boxes, of the shape of each image; returns which size is best."""
    boxes: dict[int, list[list[float]]] = {}
    for each in objects:
        (height, width), (x, y, w, h) = sizes[each["image_id"]], each["bbox"]
        corners = [x / width, y / height, (x + w) / width, (y + h) / height]
        boxes.setdefault(each["image_id"], []).append(corners)
    ids = sorted(boxes)
    hits = np.stack([square_hits(_array(boxes[image]), (0.5,), SIDE, False)[0] for image in ids])
    best, rows = int(hits.mean(axis=0).argmax()), MeanRows(compared.metrics, compared.scores, seed)
    for name, option in (("centred_box", best), ("full_image", STEPS - 1)):
        rows.add(f"{name}_corloc", torch.from_numpy(hits[:, option].copy()), torch.tensor(ids))
    return {"centred_box": {"side": round((best + 1) / STEPS, 4)}}


def _array(boxes: list[list[float]]) -> Float32[np.ndarray, "k 4"]:
    return np.array(boxes, np.float32)
