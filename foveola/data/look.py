"""A first look at some images of a source: what their files hold, against its options and annotations.

What is found becomes a note of the source, or an error where it concerns most of them: training for a day on
black images, or on boxes beside their objects, costs more than a look at a few headers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from foveola.data.annotations import PixelBoxes
from foveola.data.decoding import RGB, Decoding, ImageFile, why_not_shown
from foveola.data.fit import views_of
from foveola.data.formats import DAMAGED, Header
from foveola.data.given import GivenObjects
from foveola.data.hub import HubImages
from foveola.data.layouts import ImageFiles
from foveola.data.measure import percentile_ranges
from foveola.data.readers import SLIDE, read_header, reader_of, values_seen
from foveola.data.sample import BadImage, DataError
from foveola.data.shards.source import ShardImages
from foveola.data.slides import WITHIN
from foveola.data.values import CONTAINER, chosen_channels

LOOKS = 64  # images
DEEP_LOOKS = 16  # of these, whose values are read
NARROW = 1 / 4  # fraction of a range below which its use is worth a word

Looked = ImageFiles | HubImages | GivenObjects | ShardImages


@dataclass
class Looks:
    """What a look has found."""

    images: int = 0
    deep: int = 0
    low: float = np.inf
    high: float = -np.inf
    floating: bool = False
    stated: int = 0  # deep ones, whose files say their range
    declared: tuple[float, float] = (np.inf, -np.inf)  # from black to white, by all of these
    used: tuple[float, float] = (np.inf, -np.inf)  # by their values
    stored: int = 0  # annotations that fit only the pixels as stored, of images that EXIF turns
    upright: int = 0  # only the image the right way up
    unclear: int = 0  # both
    boxes: int = 0  # in pixels of their image
    beyond: int = 0  # of these, that end more than a pixel outside it
    annotated: int = 0
    misfits: list[str] = field(default_factory=list)


def look(source: Looked) -> None:
    """Look at `LOOKS` images of a source and add notes to it. Raises DataError for what cannot be meant."""
    seen = Looks()
    if source.reading.channels == "all":
        _count_channels(source)
    if (why := why_not_shown(source.reading.shown, source.reading.count)) is not None:
        more = "" if source.reading.channels else "; channels=all reads all that files have"
        raise DataError(f"{source.name}: {why}{more}")
    for index in np.unique(np.linspace(0, len(source) - 1, min(LOOKS, len(source))).astype(int)).tolist():
        _look_at(source, index, seen)
    source.drawn(seen.stored > seen.upright)
    _judge_annotations(source, seen)
    if source.reading.page is not None:
        _check_use(
            source,
            "pages=first" if source.reading.page == 0 else "pages=",
            "no image is a TIFF of several pages",
            _has_pages,
        )
    if source.reading.ranged:
        if not seen.deep:
            _check_use(source, "range=", "no image has more than 8 bits", _is_deep)
        if source.reading.percentiles is not None:
            ranges = percentile_ranges(source, source.reading.percentiles)
            source.read_as(replace(source.reading, ranges=ranges))
    elif seen.stated and not np.isfinite(seen.high):
        if not source.reading.deep:  # else range=file says that it is meant
            _note_narrow(source, seen)
        source.read_as(replace(source.reading, deep=True))
    elif np.isfinite(seen.high) and (seen.floating or seen.high <= CONTAINER // 2):
        top = 2 ** max(int(seen.high).bit_length(), 8) - 1
        proposal = f"{seen.low:g}-{seen.high:g}" if seen.floating or seen.low < 0 else f"0-{top}"
        _note(
            source,
            f"{source.name}: {seen.deep} of {seen.images} images looked at have more than 8 bits, with "
            f"values from {seen.low:g} to {seen.high:g}: add range={proposal}"
            + ("" if seen.floating else ", or range=container if they are meant to be dark"),
        )


def _note_narrow(source: Looked, seen: Looks) -> None:
    """Files of 16 stored bits and no window often hold 12, which would be nearly one grey."""
    (low, high), (least, most) = seen.used, seen.declared
    if 0 < high - low <= NARROW * (most - least):
        _note(
            source,
            f"{source.name}: {seen.stated} of {seen.images} images looked at state a range from {least:g} to "
            f"{most:g}, and their values from {low:g} to {high:g} use {(high - low) / (most - least):.0%} of "
            f"it: add range={low:g}-{high:g} or range=percentile:0.5-99.5, or range=file if that is meant",
        )


def _count_channels(source: Looked) -> None:
    """Take as many channels as the first image has that can be read."""
    why = ""
    for index in range(min(LOOKS, len(source))):
        try:
            image = source[index].image
            assert isinstance(image, ImageFile)
            count = chosen_channels(values_seen(image.data, image.reading), image.reading).array.shape[2]
        except (OSError, DataError) as error:
            why = why or f", such as the first: {error}"
            continue
        source.read_as(replace(source.reading, channels=None if count == RGB else count))
        return
    raise DataError(f"{source.name}: channels=all, and none of the first images can be read{why}")


def _look_at(source: Looked, index: int, seen: Looks) -> None:
    try:
        data = source.data(index)
        if isinstance(data, bytes) and reader_of(data, Decoding()) is SLIDE:
            raise DataError(f"{source.name}: {WITHIN}")
        header = read_header(data)
        if header.bits > 8:
            _look_at_depth(data, source.reading, seen)
    except (OSError, BadImage):
        return  # whoever decodes it will say why
    seen.images += 1
    size = source.annotation_size(index)
    if size is not None and header.orientation != 1:
        _vote(size, header, seen)
    if isinstance(source.reader, PixelBoxes) and source.reader.size is None:
        boxes, _ = source.reader.table.of(int(source.rows[index]))
        seen.boxes += len(boxes)
        seen.beyond += int((boxes > np.array(header.upright * 2) + 1).any(1).sum())
        seen.unclear += bool(len(boxes)) and header.orientation != 1
    if source.has_objects:
        try:
            seen.annotated += source[index].objects is not None
        except DataError as error:
            seen.annotated += 1
            seen.misfits.append(str(error))


def _look_at_depth(data: bytes | Path, reading: Decoding, seen: Looks) -> None:
    seen.deep += 1
    if seen.deep > DEEP_LOOKS:
        return
    try:
        values = values_seen(data, reading)
    except DAMAGED as error:
        raise BadImage(str(error)) from error
    if values.high is not None:  # the file says it
        seen.stated += 1
        seen.declared = min(seen.declared[0], values.low or 0), max(seen.declared[1], values.high)
        there = values.array if values.missing is None else values.array[~values.missing]
        if there.size:
            seen.used = min(seen.used[0], float(there.min())), max(seen.used[1], float(there.max()))
        return
    known = values.array[np.isfinite(values.array)]
    if known.size:
        seen.low, seen.high = min(seen.low, float(known.min())), max(seen.high, float(known.max()))
        seen.floating = seen.floating or known.dtype.kind == "f"


def _vote(size: tuple[int, int], header: Header, seen: Looks) -> None:
    stored, upright = views_of(size, header)
    seen.stored += stored and not upright
    seen.upright += upright and not stored
    seen.unclear += stored and upright


def _judge_annotations(source: Looked, seen: Looks) -> None:
    if seen.misfits:
        count = (
            f"{len(seen.misfits)} of {seen.annotated} annotated images looked at do not fit their annotations"
        )
        what = f"{source.name}: {count}, such as {seen.misfits[0]}"
        if 2 * len(seen.misfits) > seen.annotated:
            raise DataError(what)
        _note(source, f"{what}; such images count as unreadable")
    if seen.beyond:
        _note(
            source,
            f"{source.name}: {seen.beyond} of {seen.boxes} boxes looked at end beyond their image and are "
            "cut off there",
        )
    if seen.unclear:
        how = "pixels as they are stored" if source.raw else "images the right way up"
        others = ", as those of others are" if seen.stored or seen.upright else ""
        _note(
            source,
            f"{source.name}: EXIF turns {seen.unclear} of {seen.images} images looked at whose annotations "
            f"may have been drawn before or after that; they are taken as drawn on {how}{others}",
        )


def _note(source: Looked, text: str) -> None:
    images = source.source if isinstance(source, GivenObjects) else source
    images.notes += (text,)


def _check_use(source: Looked, key: str, why: str, has: Callable[[bytes | Path], bool]) -> None:
    """A key has an effect on one image at least."""
    if not any(_is(source, index, has) for index in range(len(source))):
        raise DataError(f"{source.name}: {key} changes nothing, as {why}")


def _is(source: Looked, index: int, has: Callable[[bytes | Path], bool]) -> bool:
    try:
        return has(source.data(index))
    except (*DAMAGED, BadImage):
        return False


def _is_deep(data: bytes | Path) -> bool:
    return read_header(data).bits > 8


def _has_pages(data: bytes | Path) -> bool:
    return read_header(data).pages > 1
