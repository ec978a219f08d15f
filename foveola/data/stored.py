"""What the file of an image says of itself: format, channels, depth, pages, profile, where its values lie."""

import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from foveola.data.decoding import RGB, Decoding, ImageFile, StoredFile, channels_of, source_depth
from foveola.data.formats import ALPHA, channel_names, open_image
from foveola.data.levels import ImageLevels, levels_of, levels_of_rows, levels_row, levels_together
from foveola.data.readers import contents, read_header, reader_of, values_in
from foveola.data.sample import BadImage, DataError
from foveola.data.sources import notes_of

QUICK = 16  # images whose values are looked at before a run


def in_memory(image: Any) -> Any:
    """Return the image of a sample, with the bytes of its file in place of the path."""
    if isinstance(image, ImageFile):
        return replace(image, data=in_memory(image.data))
    return contents(image) if isinstance(image, StoredFile | bytes) else image


def part_of(image: Any) -> bytes:
    """Return what tells one part of a file from others."""
    reading = image.reading if isinstance(image, ImageFile) else Decoding()
    return b"" if reading.window is None and reading.page is None else f"{reading}".encode()


def stored_facts(image: Any, pixels: UInt8[np.ndarray, "H W 3"] | None) -> dict[str, Any]:
    """Return what the file of an image says of itself, and its levels, as fields of `ImageFacts`.

    `pixels` are those that are shown. Raises BadImage and OSError.
    """
    reading = image.reading if isinstance(image, ImageFile) else Decoding()
    image = image.data if isinstance(image, ImageFile) else image
    if isinstance(image, np.ndarray):
        return {"channels": image.shape[2], "levels": levels_of_rows(image.reshape(-1, image.shape[2]))}
    image = image if isinstance(image, Path) else in_memory(image)  # what lies in a shard
    header = read_header(image, reading)
    found: dict[str, Any] = {
        "channels": header.channels,
        "bits": header.bits,
        "turned": header.orientation != 1,
        "pages": header.pages,
    }
    if header.bits > 8 or pixels is None or reading.channels is not None:
        with suppress(BadImage):  # it is decoded to 8 bits, but of its values nothing is known
            values = values_in(image, reading)
            found["channels"] = values.array.shape[2]
            found["levels"] = levels_of(values, reading, header.bits)
    else:
        count = 1 if header.channels < 3 else 3
        found["levels"] = levels_of_rows(pixels[..., :count].reshape(-1, count))
    reader = reader_of(image, reading)
    if reader is not None:
        return found | {"format": reader.suffixes[0][1:].upper()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_image(image.read_bytes() if isinstance(image, Path) else image)
        return found | {
            "format": opened.format or "",
            "channels": {"P": 3, "PA": 4}.get(opened.mode, len(opened.getbands())),
            "bits": 1 if opened.mode == "1" else found["bits"],
            "profile": _profile(opened),
            "transparent": ALPHA in channel_names(opened),
        }


def first_look(source: Any) -> tuple[str, ...]:
    """Return the notes of a source, and where the values of some images lie, by channel, of others than RGB
    of 8 bits.
    """
    if channels_of(source) == RGB and source_depth(source) == 8:
        return notes_of(source)
    found: list[ImageLevels] = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(QUICK, len(source))).astype(int)).tolist():
        with suppress(DataError, OSError):
            levels = stored_facts(source[index].image, None).get("levels")
            found += [] if levels is None else [levels]
    levels = levels_together(found)[1]
    line = (f"values of channels (0.5 %, 50 %, 99.5 %): {levels_row(levels)}",) if levels else ()
    return (*notes_of(source), *line)


def _profile(image: Image.Image) -> str:
    """The name of the colour profile of a file where it is not sRGB; empty without one."""
    raw = image.info.get("icc_profile")
    if not raw:
        return ""
    from io import BytesIO

    from PIL import ImageCms

    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(raw))).strip()
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return "damaged"
    return "" if "srgb" in name.lower().replace(" ", "") or "gray" in name.lower() else name[:60] or "unnamed"
