"""Whether the objects of a file are those that people annotated: `foveola masks check`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from foveola import files
from foveola.config import again, build, key, to_dict
from foveola.data.given import GivenObjects, image_names
from foveola.data.identity import identity_of, looked_at_once
from foveola.data.instances import AGNOSTIC, InstancesFile, read_instances
from foveola.data.listing import find_names
from foveola.data.sample import DataError, Sample, have_masks
from foveola.data.sources import Source, as_source, decode
from foveola.evaluation.detection.average_precision import Kind
from foveola.evaluation.detection.proposals import METRICS, compare_proposals
from foveola.evaluation.detection.truth import all_annotations, annotations_of
from foveola.evaluation.images import Batches, Images, ReadingConfig, facts_of_bad
from foveola.evaluation.result import Result, versions
from foveola.evaluation.stored import store
from foveola.failures import explained

CHECK_RESULT = "masks_check"  # of its results
SUCH = 3  # images that a note names


@dataclass(frozen=True)
class MasksCheckConfig:
    """Settings of a check."""

    workers: int = again(ReadingConfig, "workers", 2, at_least=0)
    seed: int = key(0, "seed of the intervals", at_least=0)
    resamples: int = key(
        200, "times that images are drawn again for the interval of AP; 0 = no interval", at_least=0
    )


class _Pairs(NamedTuple):
    """Some images with what people annotated and what was found, as COCO has it."""

    indices: Int64[Tensor, "b"]
    sizes: tuple[tuple[int, int], ...]
    annotations: tuple[list[dict[str, Any]], ...]
    proposals: tuple[list[dict[str, Any]], ...]


class _PairsCut:
    """Makes `_Pairs` of an image of the true data."""

    def __init__(self, found: GivenObjects, masks: bool) -> None:
        self.found, self.masks = found, masks

    def __call__(self, sample: Sample, index: int) -> _Pairs:
        """Return what is compared of one image. Raises BadImage."""
        height, width = decode(sample.image).shape[:2]
        size = height, width
        known = all_annotations(sample, index, size, self.masks, classes=False)
        objects = self.found[index].objects
        found = annotations_of(objects, index, size, self.masks, crowd=False, classes=False)
        scores = None if objects is None else objects.scores
        scored = [
            each | {"score": 1.0 if scores is None else float(scores[k])} for k, each in enumerate(found)
        ]
        return _Pairs(torch.tensor([index]), (size,), (known,), (scored,))


@looked_at_once()
def check_masks(
    annotations: str | Path,
    truth: str | Source,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Hold the objects of a file against those that people annotated, whatever their classes.

    Images are met by name: the path below the folder of the data, or the file name where only one image has
    it. Those that only one side has are left out, and the notes say which. Numbers are those of the protocol
    `discovery` (`docs/evaluation/discovery.md`): precision and recall, CorLoc, mean best IoU, COCO's AP and
    AR, of boxes and, where both sides have them, of masks. Crowds of the truth are no mistakes, crowds of the
    file no proposals.

    Args:
        annotations: a file of COCO's instances, with scores or without, as `foveola masks` writes it.
        truth: a data string, or a source, with objects; of data with splits the training one, as `propose`
            reads them, unless the string says `split=`.
        out: folder for `results/masks_check.json`; None = that of the file. `foveola.compare` takes it.
        progress: whether a bar, or a line each minute, is shown on standard error.
        settings: keys of `MasksCheckConfig`: workers, seed, resamples.

    Raises DataError for data without objects, and where both have no image in common.
    """
    began, config = perf_counter(), build(MasksCheckConfig, settings)
    path = Path(annotations).expanduser()
    folder = path.parent if out is None else Path(out).expanduser()
    files.check_writable(files.results_in(folder), "give another out= for the result")
    source = as_source(truth, "train", "data")
    if not source.has_objects:
        raise DataError(f"{source.name} has no objects to check against (annotations=, boxes=, masks=)")
    file = read_instances(path)
    met, notes = _meet(file, source)
    result, more = _checked(source, met, config, progress)
    result = replace(
        result,
        data=result.data | {"file": str(path)},
        encoder=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        seconds=round(perf_counter() - began, 2),
        notes=(*notes, *more),
    )
    with explained(f"the check is done, but cannot be written to {folder}"):
        return store(result, folder)


def _checked(
    source: Source, met: "_Met", config: MasksCheckConfig, progress: bool
) -> tuple[Result, list[str]]:
    """What all images say that both sides have, and notes."""
    drawn = any(each.get("segmentation") for of_image in met.file.annotations for each in of_image)
    masks = drawn and have_masks(source)
    cut = _PairsCut(GivenObjects(source, met.file), masks)
    reading = ReadingConfig(workers=config.workers)
    batches: Batches[_Pairs] = Batches(Images(source, met.indices, cut), reading, "checking", progress)
    sizes, known, found = {}, [], []
    for batch in batches:
        sizes |= dict(zip(batch.indices.tolist(), batch.sizes, strict=True))
        known += [each for of_image in batch.annotations for each in of_image]
        found += [each for of_image in batch.proposals for each in of_image]
    objects = [each for each in known if not each["iscrowd"]]
    if not objects:
        raise DataError(f"{source.name}: none of the {len(sizes)} images in common has an annotated object")
    kinds: tuple[Kind, ...] = ("box", "mask") if masks else ("box",)
    compared = compare_proposals(sizes, known, found, kinds, config.resamples, config.seed)
    test = {
        "name": source.name,
        "fingerprint": identity_of(source, met.indices).digest,
        **facts_of_bad(batches.gathered_bad(), len(met.indices), source),
        "images": len(met.indices),
        "rows": len(sizes),
        "objects": len(objects),
        "crowds": len(known) - len(objects),
    }
    result = Result(
        protocol=CHECK_RESULT,
        settings={name: value for name, value in to_dict(config).items() if name != "workers"},
        metrics=compared.metrics,
        data={"test": test, "proposals": len(found)},
        encoder="",
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        grid={"precision": compared.curves},
        scores=compared.scores,
        described=METRICS,
    )
    bare = len(sizes) - len({each["image_id"] for each in objects})
    return result, _notes(met.file, len(found), bare, masks)


class _Met(NamedTuple):
    """The part of a file whose images the data have, and these images."""

    file: InstancesFile
    indices: Int64[np.ndarray, "n"]


def _meet(file: InstancesFile, source: Source) -> tuple[_Met, list[str]]:
    names = image_names(source)
    rows = find_names(file.files, names)
    found = [k for k, name in enumerate(file.files) if rows[name] >= 0]
    if not found:
        raise DataError(
            f"{file.path}: none of its {len(file.files)} images, such as {file.files[0]}, is in "
            f"{source.name}, which has {names[0]}"
        )
    part = replace(
        file,
        files=[file.files[k] for k in found],
        sizes=file.sizes[found],
        annotations=[file.annotations[k] for k in found],
        classes=AGNOSTIC,  # classes play no part
    )
    indices = np.unique([rows[name] for name in part.files])
    there = set(indices.tolist())
    notes = _missing([name for name in file.files if rows[name] < 0], f"{file.path} alone")
    notes += _missing([name for k, name in enumerate(names) if k not in there], f"{source.name} alone")
    return _Met(part, indices), notes


def _missing(names: Sequence[str], where: str) -> list[str]:
    if not names:
        return []
    such = ", ".join(names[:SUCH]) + ", ..." * (len(names) > SUCH)
    return [f"{len(names)} images are left out, which are in {where}: {such}"]


def _notes(file: InstancesFile, found: int, bare: int, masks: bool) -> list[str]:
    notes = []
    if bare:
        notes.append(f"{bare} images have no annotated object: what is found there is wrong, but for CorLoc")
    if found and not any("score" in each for of_image in file.annotations for each in of_image):
        notes.append("the file has no scores: objects count in its order")
    if not masks:
        notes.append("boxes alone are compared: one side has no masks")
    return notes
