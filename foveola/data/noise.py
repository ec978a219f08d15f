"""Objects made wrong on purpose: how much do boxes and masks that are not quite right cost?

What is wrong of an image is a function of (seed, image) alone: the same in every epoch, worker and process,
as the mistakes of a detector are. Each kind of noise has random numbers of its own, so that one does not
change the draws of another, and more jitter moves an edge further the same way.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64

from foveola.config import key
from foveola.data.sample import BadImage, DataError, Objects, full_mask

NOISE = 3  # tells these random numbers from others of the same seed (data/loader.py)
SWAPPED, MISSING, RANDOM, JITTER, SPURIOUS = range(5)
TRIES = 20  # other images that are asked for their objects, where some cannot be read
LONGEST = 2.0  # width / height of a random box is at most this, or 1 / this


@dataclass(frozen=True)
class NoiseConfig:
    """What is made wrong about the objects that images are trained on; all is off at 0.

    In this order: the objects of another image, objects that are missing, random boxes in place of objects,
    boxes that are moved, boxes where nothing is.
    """

    jitter: float = key(
        0.0,
        "each edge of a box moves by at most this fraction of its side, uniformly; masks move along",
        at_least=0,
        at_most=1,
    )
    missing: float = key(0.0, "probability that an object is left out", at_least=0, at_most=1)
    spurious: float = key(
        0.0, "random boxes added to an image, on average (Poisson)", at_least=0, at_most=1000
    )
    swapped: float = key(
        0.0, "probability that an image has the objects of another image of the set", at_least=0, at_most=1
    )
    random: float = key(
        0.0, "probability that a random box stands in place of an object", at_least=0, at_most=1
    )
    random_area: tuple[float, float] = key(
        (0.05, 0.5), "fraction of the image that a random box covers, uniform in this range"
    )

    def __post_init__(self) -> None:
        low, high = self.random_area
        if not 0 < low <= high <= 1:
            raise ValueError("random_area: needs 0 < low <= high <= 1")

    @property
    def active(self) -> bool:
        """Whether anything is made wrong at all."""
        return any((self.jitter, self.missing, self.spurious, self.swapped, self.random))

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        no_boxes = not (self.random or self.spurious)
        return {"random_area": "random=0, spurious=0: there are no random boxes"} if no_boxes else {}


def check_noise(source: Any, config: NoiseConfig | None) -> None:
    """Raise DataError where a source has no objects that could be made wrong."""
    if config is not None and config.active and not source.has_objects:
        raise DataError(f"{source.name}: has no objects to make wrong: loader.objects_noise=null")


def make_noisy(
    objects: Objects | None, source: Any, index: int, seed: int, config: NoiseConfig
) -> Objects | None:
    """Return the objects of image `index` of `source` with their mistakes; None where none is left.

    A mask moves with its box: what was at a fraction of the old box is at that fraction of the new one, by
    the nearest pixel; what leaves the image is cut off. Random boxes have no class (-1). Where objects have
    scores, those of random boxes are drawn from the image's.
    """

    def draws(kind: int) -> np.random.Generator:
        return np.random.default_rng([seed, NOISE, kind, index])

    swapping = draws(SWAPPED)
    if swapping.random() < config.swapped and len(source) > 1:
        objects = _of_another(source, index, swapping)
    count = 0 if objects is None else len(objects)
    missing, replaced, spurious = draws(MISSING), draws(RANDOM), draws(SPURIOUS)
    stays = missing.random(count) >= config.missing
    is_random = replaced.random(count) < config.random
    others = _random_boxes(count, config.random_area, replaced)
    shifts = config.jitter * draws(JITTER).uniform(-1, 1, (count, 4))
    added = _random_boxes(int(spurious.poisson(config.spurious)), config.random_area, spurious)
    if objects is None:
        return Objects.from_boxes(added, labels=np.full(len(added), -1)) if len(added) else None
    old = objects.boxes.astype(np.float64)
    boxes = np.where(is_random[:, None], others, _shifted(old, shifts))
    masks: list[Any] = list(objects.masks or [None] * count)
    areas = objects.areas.astype(np.float64)
    for i in range(count):
        if is_random[i]:
            masks[i], areas[i] = None, np.prod(boxes[i, 2:] - boxes[i, :2])
        elif config.jitter:
            masks[i], areas[i] = _with_box(masks[i], old[i], boxes[i])
    labels = None if objects.labels is None else np.where(is_random, -1, objects.labels)[stays]
    scores = None if objects.scores is None else objects.scores[stays]
    if len(added):
        areas = np.concatenate([areas[stays], np.prod(added[:, 2:] - added[:, :2], axis=1)])
        labels = None if labels is None else np.concatenate([labels, np.full(len(added), -1)])
        if scores is not None and objects.scores is not None:
            scores = np.concatenate([scores, spurious.choice(objects.scores, len(added))])
    else:
        areas = areas[stays]
    return Objects.from_boxes(
        np.concatenate([boxes[stays], added]),
        labels=labels,
        masks=[mask for mask, stay in zip(masks, stays, strict=True) if stay] + [None] * len(added),
        areas=areas,
        scores=scores,
    )


def _of_another(source: Any, index: int, rng: np.random.Generator) -> Objects | None:
    """The objects of another image, drawn uniformly among those that can be read."""
    for _ in range(TRIES):
        other = (index + 1 + int(rng.integers(len(source) - 1))) % len(source)
        try:
            return source[other].objects
        except (BadImage, OSError):
            continue
    return None


def _random_boxes(
    count: int, area: tuple[float, float], rng: np.random.Generator
) -> Float64[np.ndarray, "{count} 4"]:
    """Boxes anywhere in the unit square, of a fraction of its area that is uniform in a range.

    width / height is log-uniform in [1/2, 2], narrowed to what fits.
    """
    fraction, ratio, left, top = rng.random((4, count))
    fraction = area[0] + (area[1] - area[0]) * fraction
    largest = np.log(np.minimum(LONGEST, 1 / fraction))
    stretch = np.exp(largest * (2 * ratio - 1) / 2)
    width, height = np.sqrt(fraction) * stretch, np.sqrt(fraction) / stretch
    x, y = left * (1 - width), top * (1 - height)
    return np.stack([x, y, x + width, y + height], axis=1).clip(0, 1)


def _shifted(
    boxes: Float64[np.ndarray, "K 4"], shifts: Float64[np.ndarray, "K 4"]
) -> Float64[np.ndarray, "K 4"]:
    """Boxes whose edges moved by fractions of their sides; edges that passed each other are put in order."""
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    corners = (boxes + shifts * sides).reshape(-1, 2, 2)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _with_box(
    mask: Any, old: Float64[np.ndarray, "4"], new: Float64[np.ndarray, "4"]
) -> tuple[Bool[np.ndarray, "H W"] | None, float]:
    """A mask that moves and scales with its box, and the area; None, the box, where nothing of it is left."""
    inside = new.clip(0, 1)
    if mask is None:
        return None, float(np.prod(inside[2:] - inside[:2]))
    full = full_mask(mask)
    rows = _origins(full.shape[0], old[[1, 3]], new[[1, 3]])
    columns = _origins(full.shape[1], old[[0, 2]], new[[0, 2]])
    moved = np.pad(full, 1)[rows[:, None] + 1, columns + 1]  # beyond the image there is nothing
    return (moved, float(moved.mean())) if moved.any() else _with_box(None, old, new)


def _origins(size: int, old: Float[np.ndarray, "2"], new: Float[np.ndarray, "2"]) -> np.ndarray:
    """Where in an axis of `size` pixels each came from when `old` became `new`; -1 or `size`: from beyond."""
    centres = (np.arange(size) + 0.5) / size
    origin = old[0] + (centres - new[0]) * ((old[1] - old[0]) / max(new[1] - new[0], 1e-9))
    return np.floor(origin * size).clip(-1, size).astype(np.int64)
