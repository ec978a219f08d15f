"""Which images and which points of them are shown, from what a user typed."""

from collections.abc import Sequence
from typing import Any

from foveola.config import UserError
from foveola.data.sample import BadImage, Sample
from foveola.data.sources import Source

SEARCHED = 2000  # images after another in which one of its class is looked for


def image_numbers(source: Source, count: int, images: tuple[int, ...] | int | str | None = None) -> list[int]:
    """Return indices of images in a source: those named, or `count` of them evenly from the first on."""
    total = len(source)
    if images is None:
        count = min(count, total)
        return [i * total // count for i in range(count)]
    words = images.split(",") if isinstance(images, str) else images
    words = [words] if isinstance(words, int) else words
    try:
        chosen = [int(word) for word in words]
    except ValueError:
        raise UserError(f"images={images!r}: expected indices such as '0,5,9'") from None
    for index in chosen:
        if not 0 <= index < total:
            raise UserError(f"images: there is no {index}, the last of {source.name} is {total - 1}")
    if not chosen:
        raise UserError("images: expected at least one index, such as 0")
    return chosen


def points_of(points: Any) -> list[tuple[float, float]]:
    """Parse `"0.2,0.3;0.5,0.5"`, one pair or a list of pairs. Raises UserError outside the unit square."""
    if isinstance(points, str):
        points = [pair.split(",") for pair in points.split(";")]
    try:
        if points and not isinstance(points[0], list | tuple):
            points = [points]
        pairs = [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError):
        raise UserError(f"points={points!r}: expected x,y pairs such as '0.2,0.3;0.5,0.5'") from None
    for x, y in pairs:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(f"points: {x:g},{y:g} is not in the unit square, from 0,0 (top left) to 1,1")
    if not pairs:
        raise UserError("points: expected at least one pair, such as '0.5,0.5'")
    return pairs


def samples_of(source: Source, chosen: Sequence[int]) -> list[Sample]:
    """Return the samples at these indices. Raises UserError for one that cannot be had."""
    samples = []
    for index in chosen:
        try:
            samples.append(source[index])
        except BadImage as error:
            raise UserError(f"{source.name}, image {index}: {error}") from error
    return samples


def pairs_of(
    source: Source, count: int, images: tuple[int, ...] | int | str | None = None
) -> list[tuple[Sample, Sample]]:
    """Return images named two by two; or evenly spaced ones, each with the next one of its class (or the
    next).
    """
    if images is not None:
        chosen = image_numbers(source, 0, images)
        if len(chosen) % 2:
            raise UserError(f"images: correspondences are of pairs, but {len(chosen)} are named")
        samples = samples_of(source, chosen)
        return list(zip(samples[::2], samples[1::2], strict=True))
    pairs = []
    for start in image_numbers(source, count):
        (first,) = samples_of(source, [start])
        after = [(start + step) % len(source) for step in range(1, min(len(source), SEARCHED + 1))]
        if not after:
            raise UserError(f"correspondences need two images; {source.name} has one")
        same = (i for i in after if first.label is not None and source[i].label == first.label)
        pairs.append((first, *samples_of(source, [next(same, after[0])])))
    return pairs
