"""Frames of videos, by time: the frame that a player shows at that moment."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from foveola.data.decoding import Decoding
from foveola.data.formats import COLOURS, Header
from foveola.data.guard import check_pixels, extra, reading
from foveola.data.sample import BadImage
from foveola.data.values import CONTAINER, Values

MATROSKA = b"\x1a\x45\xdf\xa3"
STILLS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def container_of(head: bytes) -> str | None:
    """Return the kind of container that begins like this. No other is opened: playlists name any file."""
    if head[4:8] == b"ftyp" and head[8:12] not in STILLS:
        return "mov"
    if head.startswith(MATROSKA):
        return "matroska"
    return "avi" if head[:4] == b"RIFF" and head[8:12] == b"AVI " else None


def is_video(head: bytes) -> bool:
    """Return whether a file of this beginning is a video."""
    return container_of(head) is not None


def video_values(data: Path | bytes, decoding: Decoding) -> Values:
    """Return one of the frames that are taken, by `decoding.page`. Raises BadImage where it ends before."""
    if not decoding.moving:
        raise BadImage("a video; seconds=1 or every=30 in the data string makes images of its frames")
    with _opened(data) as stream:
        check_pixels(stream.width, stream.height, 3, 2)
        number = decoding.page if isinstance(decoding.page, int) else 0
        frame = _frame_at(stream, float(number * _step(stream, decoding)))
        turned = int(getattr(frame, "rotation", 0)) % 360
        deep = frame.format.name.startswith("gray") and frame.format.components[0].bits > 8
        array = frame.to_ndarray(format="gray16le" if deep else "rgb24")
        array = np.rot90(array, turned // 90)
        array = array[:, :, None] if array.ndim == 2 else array
    if decoding.window is not None:
        x0, y0, x1, y1 = decoding.window
        array = array[y0:y1, x0:x1]
    array = np.ascontiguousarray(array)
    return Values(array, 0.0, float(CONTAINER)) if deep else Values(array, names=COLOURS)


def video_header(data: Path | bytes, decoding: Decoding) -> Header:
    """Return the size of the frames as they are shown, and how many are taken: one for each step of time that
    begins before the end. The first frame is decoded for its rotation.
    """
    with _opened(data) as stream:
        check_pixels(stream.width, stream.height, 3, 2)
        frame = next(stream.container.decode(stream), None)
        if frame is None:
            raise BadImage("a video without a frame")
        sides = frame.width, frame.height
        sides = sides[::-1] if int(getattr(frame, "rotation", 0)) % 180 else sides
        count = 1
        if decoding.moving:
            # A thousandth of a second less: containers round.
            count = max(1, math.ceil((_length(stream) - Fraction(1, 1000)) / _step(stream, decoding)))
        return Header(*sides, pages=count, kind="video")


def _length(stream: Any) -> Fraction:
    """Seconds from the first frame to the end."""
    if stream.duration is not None and stream.time_base is not None:
        return Fraction(stream.duration) * stream.time_base
    if stream.container.duration is not None:
        return Fraction(stream.container.duration, 1_000_000)
    raise BadImage("a video that does not say how long it is")


def _step(stream: Any, decoding: Decoding) -> Fraction:
    """Seconds between two frames that are taken: said, or those of so many frames at the mean rate."""
    if decoding.seconds is not None:
        return decoding.seconds
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise BadImage("a video that does not say how many frames a second it has; seconds= does without")
    return Fraction(decoding.every or 1) / Fraction(rate)


@contextmanager
def _opened(data: Path | bytes) -> Iterator[Any]:
    av = extra("av", "video", "video")
    with reading("video"), io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        head = file.read(64)
        kind = container_of(head)
        if kind is None:
            raise BadImage("not a video of a known kind")
        file.seek(0)
        with av.open(file, format=kind) as container:
            if not container.streams.video:
                raise BadImage("a file without a stream of video")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            yield stream


def _frame_at(stream: Any, time: float) -> Any:
    """The last frame that begins no later than half a step of the rate after `time`."""
    container, base = stream.container, stream.time_base
    start = stream.start_time or 0
    rate = stream.average_rate or stream.guessed_rate
    latest = start + time / float(base) + (0.5 / float(rate * base) if rate else 0)
    found = None
    if time > 0:
        container.seek(max(int(start + time / float(base)), 0), stream=stream, backward=True)
    for frame in container.decode(stream):
        if frame.pts is not None and frame.pts > latest:
            if found is not None:
                return found
            break
        found = frame
    lasts = 0 if found is None else max(float(found.duration or 0), 1.5 / float(rate * base) if rate else 0)
    if found is None or (found.pts is not None and start + time / float(base) > found.pts + lasts):
        raise BadImage(f"a video that has no frame at {time:.3f} seconds")
    return found
