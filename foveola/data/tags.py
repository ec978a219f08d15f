"""Which library reads a TIFF: its tags say whether it is a slide, a scene of the earth, a stack, or plain."""

import io
import re
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from PIL import TiffImagePlugin

from foveola.data.decoding import Decoding
from foveola.data.formats import bits_of, gives_all_bits, open_image
from foveola.data.guard import silence
from foveola.data.sample import BadImage

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PHOTOMETRIC, DESCRIPTION, EXTRA, COMPRESSION, SOFTWARE, XMP = 262, 270, 338, 259, 305, 700  # tags
GEO = (33550, 33922, 34264, 34735, 42112, 42113)  # where it lies, and what GDAL says
NODATA, NDPI = 42113, 65420
IMAGEJ_STACK = re.compile(r"^ImageJ=.*^images=(?!1$)\d+$", re.MULTILINE | re.DOTALL)
MOST_PAGES = 2**20  # that are looked for; a file without end has more
GREY_OR_RGB, YCBCR, JPEG = (0, 1, 2, 3), 6, 7


def library_of(data: Path | bytes, decoding: Decoding) -> Literal["pil", "tifffile", "rasterio", "slide"]:
    """Return what reads a TIFF. The same file is read by the same library, whatever is installed; parts of
    one are read by a library that does not decode it whole.
    """
    with ExitStack() as stack:
        file: Any = io.BytesIO(data) if isinstance(data, bytes) else stack.enter_context(data.open("rb"))
        tags = _tags(file)
        if decoding.level is not None or decoding.mpp is not None or _is_slide(tags):
            return "slide"
        _check_whole(file)
        plain = _pil_reads(file) if decoding.page in (None, 0) else False
    if any(tag in tags for tag in GEO) and (NODATA in tags or not plain or decoding.window is not None):
        return "rasterio"
    text = str(tags.get(DESCRIPTION, ""))
    if not plain or IMAGEJ_STACK.search(text) or _is_ome_stack(text):
        return "tifffile"
    return "tifffile" if decoding.window is not None and _is_simple(tags) else "pil"


def _tags(file: Any) -> Mapping[int, Any]:
    """The tags of the first directory; none of a file that is damaged there."""
    file.seek(0)
    head = file.read(16)
    try:
        big = head[2:3] == b"+" or head[3:4] == b"+"
        directory = TiffImagePlugin.ImageFileDirectory_v2(head[: 16 if big else 8])
        file.seek(directory.next)
        directory.load(file)
        return {tag: directory[tag] for tag in (*GEO, NDPI, PHOTOMETRIC, DESCRIPTION, EXTRA, COMPRESSION,
                                                SOFTWARE, XMP) if tag in directory}  # fmt: skip
    except Exception:  # whatever PIL's reader of tags stumbles over
        return {}


def _check_whole(file: Any) -> None:
    """Raise BadImage where a page is said to lie beyond the end: libraries read those before it, as if there
    were no others.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(16).ljust(16, b"\0")
    order, big = ("<" if head[:2] == b"II" else ">"), b"+" in head[2:4]
    counted, pointer = (
        struct.Struct(order + ("Q" if big else "H")),
        struct.Struct(order + ("Q" if big else "I")),
    )
    (at,) = pointer.unpack_from(head, 8 if big else 4)
    seen: set[int] = set()
    while at and at not in seen and len(seen) < MOST_PAGES:
        end = at + counted.size
        if end <= size:
            file.seek(at)
            end += (20 if big else 12) * counted.unpack(file.read(counted.size))[0]
        if end > size and not seen:  # whoever reads it will say what it is
            return
        if end > size:
            raise BadImage(
                f"a TIFF that is cut off: page {len(seen) + 1} begins at {at}, and the file ends at {size}"
            )
        seen.add(at)
        if end + pointer.size > size:
            return
        file.seek(end)
        (at,) = pointer.unpack(file.read(pointer.size))


def _is_slide(tags: Mapping[int, Any]) -> bool:
    """Whether a scanner of slides wrote it: Aperio, Hamamatsu, Leica, Philips, Ventana."""
    text = str(tags.get(DESCRIPTION, ""))
    return (
        text.startswith("Aperio")
        or NDPI in tags
        or "www.leica-microsystems.com/scn" in text
        or str(tags.get(SOFTWARE, "")).startswith("Philips")
        or b"iScan" in _bytes(tags.get(XMP, b""))
    )


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


def _is_ome_stack(text: str) -> bool:
    """Whether OME's XML says that there is more than one plane; what it says is read elsewhere."""
    if "<OME" not in text[:4000]:
        return False
    return "BinaryOnly" in text or any(int(n) > 1 for n in re.findall(r'Size[CZT]="(\d{1,9})"', text))


def _is_simple(tags: Mapping[int, Any]) -> bool:
    """Whether values are colours as they are stored, without what PIL turns into RGB in its own way."""
    extra = tags.get(EXTRA, ())
    extra = tuple(extra) if isinstance(extra, tuple) else (extra,)
    kind = tags.get(PHOTOMETRIC, 1)
    known = kind in GREY_OR_RGB or (kind == YCBCR and tags.get(COMPRESSION, 1) == JPEG)
    return known and extra in ((), (2,))


def _pil_reads(file: Any) -> bool:
    file.seek(0)
    silence("PIL.TiffImagePlugin")  # what it does not read is no error
    try:
        image = open_image(file, ("TIFF",))
        inverse = bits_of(image) > 8 and image.tag_v2.get(PHOTOMETRIC) == 0  # type: ignore[attr-defined]
        return gives_all_bits(image) and not inverse  # of more than 8 bits PIL leaves white as 0
    except BadImage:
        return False
