"""A sample to the members of a tar file, of which `source.py` makes the same sample again."""

import io
import json
import posixpath
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from foveola.data.arrays import ZIP_MAGIC
from foveola.data.decode import decode, resize_pixels
from foveola.data.decoding import Decoding, ImageFile, StoredFile
from foveola.data.dicom import is_dicom
from foveola.data.listing import SUFFIXES, printable
from foveola.data.readers import HEAD_BYTES, SLIDE, read_header, reader_of
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.shards.schema import described
from foveola.data.shards.tar import ABOUT_EXTENSION, LABEL_EXTENSION, MAP_EXTENSION
from foveola.data.slides import WITHIN

BEGINNINGS = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"II+\0": "tif",
    b"MM\0+": "tif",
    b"P5": "pgm",
    b"P6": "ppm",
    ZIP_MAGIC: "npz",
}
FORMATS_WRITTEN = {"jpeg": "jpg", "webp": "webp", "png": "png", "npz": "npz"}


def sample_key(name: str) -> str:
    """Return the key of a sample by the name of its image: without suffix, dots of the file name and what
    leads out of the folder.
    """
    parts = [
        part for part in posixpath.normpath(name.replace("\\", "/")).split("/") if part not in ("", ".", "..")
    ]
    *folders, base = parts or ["image"]
    stem, suffix = posixpath.splitext(base)
    base = stem if suffix.lower() in SUFFIXES else base
    base = base.replace(".", "_")
    return "/".join([*folders, base if not base.startswith("_") else f"x{base}"]).removeprefix("__")


def members_of(
    source: Any, index: int, key: str | None, form: str, quality: int, canvas: int | None
) -> dict[str, bytes]:
    """Return the files of a sample by their names, the image first. Raises BadImage and OSError for an image
    that cannot be read.
    """
    sample: Sample = source[index]
    name = printable(sample.name)
    key = sample_key(name) if key is None else key
    data, size, fitted = _image(sample, form, quality, canvas)
    suffix = posixpath.splitext(name)[1]
    extension = _extension(data, suffix)
    if f"{key}{suffix}" == name and form == "original" and suffix.lower() in SUFFIXES:
        extension = suffix[1:]
    image = f"{key}.{extension}"
    found = {image: data}
    if sample.label is not None:
        found[f"{key}.{LABEL_EXTENSION}"] = str(sample.label).encode()
    tree = described(sample, _drawn_on(sample, size), None if image == name else name)
    if tree:
        found[f"{key}.{ABOUT_EXTENSION}"] = json.dumps(tree).encode()
    if hasattr(source, "label_map"):
        labels = source.label_map(index)
        found[f"{key}.{MAP_EXTENSION}"] = _png(labels if fitted is None else _nearest(labels, fitted))
    return found


def _extension(data: bytes, suffix: str) -> str:
    """Return the extension for what the file is; that of its name, where only the name says it (DICOM)."""
    found = next((end for magic, end in BEGINNINGS.items() if data.startswith(magic)), None)
    found = None if is_dicom(data[:HEAD_BYTES]) else found
    if found is None and suffix.lower() in SUFFIXES:
        return suffix[1:]
    reader = None if found else reader_of(data, Decoding())
    if found is None and reader is None:
        raise BadImage("of a format that shards cannot hold; format=png writes its pixels")
    return found or (reader.suffixes[0][1:] if reader else "")


def _image(
    sample: Sample, form: str, quality: int, canvas: int | None
) -> tuple[bytes, tuple[int, int], tuple[int, int] | None]:
    """The file, the width and height of the image the right way up, and to which it was shrunk."""
    image, data = sample.image, None
    if form == "original" and isinstance(image, ImageFile):  # as its file says, which stays as it is
        image = image.data
    if isinstance(image, StoredFile | bytes):
        data = image.read_bytes() if isinstance(image, StoredFile) else image
    if data is not None and form == "original":
        if reader_of(data, Decoding()) is SLIDE:
            raise DataError(f"{sample.name}: {WITHIN}")
        try:
            return data, read_header(data).upright, None
        except BadImage:  # damaged: it stays what it is, and a run counts it as it would in its folder
            return data, (1, 1), None
    if data is not None and data.startswith(_beginning(form)):
        width, height = read_header(data).upright
        if canvas is None or min(width, height) <= canvas:
            return data, (width, height), None
    pixels = decode(data if data is not None else image)
    if form != "npz" and (pixels.dtype != np.uint8 or pixels.shape[2] != 3):
        raise DataError(
            "pack: images of more than 8 bits or other channels than RGB need format=npz (as their data "
            "string reads them) or original (their files)"
        )
    height, width = pixels.shape[:2]
    fitted = None
    if canvas is not None and min(width, height) > canvas:
        scale = canvas / min(width, height)
        fitted = max(round(width * scale), canvas), max(round(height * scale), canvas)
        pixels = _resized(pixels, fitted)
    return _encoded(pixels, form, quality), (width, height), fitted


def _beginning(form: str) -> bytes:
    end = FORMATS_WRITTEN.get(form, "png")
    return next(magic for magic, extension in BEGINNINGS.items() if extension == end)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    channels = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return resize_pixels(channels, size[1], size[0], "bicubic").permute(1, 2, 0).numpy()


def _encoded(pixels: np.ndarray, form: str, quality: int) -> bytes:
    if form == "npz":
        return _npz(pixels)
    if form == "jpeg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")
    if form == "webp":
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "WEBP", quality=quality)
        return file.getvalue()
    return _png(pixels)


def _npz(pixels: np.ndarray) -> bytes:
    if pixels.shape[0] < min(pixels.shape[1:]):
        raise BadImage("of fewer rows than channels, which an array does not tell apart")
    file = io.BytesIO()
    np.savez_compressed(file, image=pixels)
    return file.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class of the pixel under the centre of each."""
    x, y = (
        ((2 * np.arange(n) + 1) * side) // (2 * n) for n, side in zip(size, labels.shape[::-1], strict=True)
    )
    return labels[y[:, None], x]


def _drawn_on(sample: Sample, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of what masks were drawn on, which may be smaller than the image."""
    for objects in (sample.objects, sample.crowds):
        for mask in () if objects is None else objects.masks or ():
            if mask is not None:
                height, width = mask.shape if isinstance(mask, np.ndarray) else mask["size"]
                return int(width), int(height)
    return size
