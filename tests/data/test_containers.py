"""The same values in files of many formats, in a folder, in shards and in parquet: the same pixels."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from foveola.data.sources import decode, open_source

imagecodecs = pytest.importorskip("imagecodecs")
pillow_heif = pytest.importorskip("pillow_heif")
pydicom = pytest.importorskip("pydicom")
rasterio = pytest.importorskip("rasterio")
tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(0)
TWELVE = RNG.integers(0, 4096, (40, 56), np.uint16)
EIGHT = RNG.integers(0, 4096, (40, 56, 8), np.uint16)
PHOTO = RNG.integers(0, 256, (40, 56, 3), np.uint8)


def dicom(path: Path, array: np.ndarray) -> None:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns = array.shape[-2:]
    if array.ndim == 3:
        data.NumberOfFrames = len(array)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = array.tobytes()
    data.save_as(path, enforce_file_format=True)


def scene(path: Path, bands: np.ndarray, driver: str = "GTiff", **options: Any) -> None:
    size = {"width": bands.shape[2], "height": bands.shape[1], "count": len(bands), "dtype": bands.dtype}
    place = rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)
    with rasterio.open(
        path, "w", driver=driver, crs="EPSG:32633", transform=place, **size, **options
    ) as file:
        file.write(bands)


LAST = np.moveaxis(EIGHT, 2, 0)
ALL = "channels=all&range=0-4095"
# Of each: the suffix, what writes a file, and the options of a data string.
GREY = {
    "png": (".png", lambda path: Image.fromarray(TWELVE).save(path), "range=0-4095"),
    "tiff": (".tif", lambda path: tifffile.imwrite(path, TWELVE, compression="zlib"), "range=0-4095"),
    "tiff of 32 bits": (".tif", lambda path: tifffile.imwrite(path, TWELVE.astype("u4")), "range=0-4095"),
    "float": (".tif", lambda path: tifffile.imwrite(path, TWELVE / np.float32(4095)), "range=0-1"),
    "npy": (".npy", lambda path: np.save(path, TWELVE), "range=0-4095"),
    "npz": (".npz", lambda path: np.savez_compressed(path, image=TWELVE), "range=0-4095"),
    "dicom": (".dcm", lambda path: dicom(path, TWELVE), "range=file"),
    "dicom in Hounsfield": (".dcm", lambda path: dicom(path, TWELVE), "range=0-4095"),
    "frames": (".dcm", lambda path: dicom(path, np.stack([TWELVE // 2, TWELVE])), "pages=2&range=file"),
    "stack": (".tif", lambda path: tifffile.imwrite(path, np.stack([TWELVE // 2, TWELVE])),
              "pages=2&range=0-4095"),
    "geotiff": (".tif", lambda path: scene(path, TWELVE[None], nodata=9999), "range=0-4095"),
    "jp2": (".jp2", lambda path: scene(path, TWELVE[None], "JP2OpenJPEG", REVERSIBLE="YES", QUALITY=100),
            "range=0-4095"),
    "jxl": (".jxl", lambda path: path.write_bytes(imagecodecs.jpegxl_encode(TWELVE, lossless=True)),
            "range=0-4095"),
}  # fmt: skip
CHANNELS = {
    "npy": (".npy", lambda path: np.save(path, EIGHT), ALL),
    "ome": (".ome.tif", lambda path: tifffile.imwrite(path, LAST, ome=True, tile=(16, 16), compression="zlib",
                                                      metadata={"axes": "CYX"}), ALL),
    "geotiff": (".tif", lambda path: scene(path, LAST, nodata=9999, tiled=True, blockxsize=16, blockysize=16,
                                           compress="deflate"), ALL),
}  # fmt: skip
COLOUR = {
    "png": (".png", lambda path: Image.fromarray(PHOTO).save(path), ""),
    "webp": (".webp", lambda path: Image.fromarray(PHOTO).save(path, lossless=True), ""),
    "heic": (".heic", lambda path: pillow_heif.from_pillow(Image.fromarray(PHOTO)).save(
        path, quality=-1, chroma=444, matrix_coefficients=0), ""),
    "jxl": (".jxl", lambda path: path.write_bytes(imagecodecs.jpegxl_encode(PHOTO, lossless=True)), ""),
    "jp2": (".jp2", lambda path: scene(path, np.moveaxis(PHOTO, 2, 0), "JP2OpenJPEG", REVERSIBLE="YES",
                                       QUALITY=100), ""),
    "tiff": (".tif", lambda path: tifffile.imwrite(path, PHOTO, photometric="rgb"), ""),
}  # fmt: skip
CASES = [(*each, want) for kinds, want in ((GREY, TWELVE), (CHANNELS, EIGHT), (COLOUR, PHOTO))
         for each in kinds.items()]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "want"), CASES, ids=[case[0] for case in CASES])
def test_pixels_are_those_of_the_values_wherever_they_lie(name, file, want, tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path / "cache"))
    suffix, write, options = file
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / f"a{suffix}"
    write(path)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(path, path.name)
    rows = pyarrow.table({"image": [{"bytes": path.read_bytes(), "path": path.name}]})
    parquet.write_table(rows, str(tmp_path / "0.parquet"))
    if want.dtype == np.uint16:
        want = np.rint(want * (65535 / 4095)).astype(np.uint16)
        want = want if want.ndim == 3 else np.repeat(want[:, :, None], 3, axis=2)
    for place in (f"folder:{tmp_path}/files", f"shards:{tmp_path}/0.tar", f"parquet:{tmp_path}/0.parquet"):
        source: Any = open_source(f"{place}?{options}")
        pixels = decode(source[0].image)
        assert (source[0].name, pixels.dtype) == (path.name, want.dtype)
        assert np.array_equal(pixels, want)
        parts: Any = open_source(f"{place}?{options}&tiles=16&overlap=4")
        assert len(parts) == 3 * 5
        assert parts[8].name == f"{path.name}#36,12"
        assert np.array_equal(decode(parts[8].image), want[12:28, 36:52])
