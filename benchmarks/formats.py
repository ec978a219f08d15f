"""What decoding costs in each format, against the library that reads it alone, on one core.

    python -m benchmarks.formats [--rounds 7] [--side 1024] [FORMAT ...]

Ours is what a worker calls: which library reads a file is found out from its bytes, its values go to their
range and channels (uint16 where a range is known, else uint8 RGB). The library alone gives the values as they
are stored. Both read the same file (a path where the library takes one) of textured noise, in turns, in one
run: the median of core seconds a file, with one thread each. Parts (`a part of 256`) are the cost of a tile
of such a file.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from foveola.data.decode import decode
from foveola.data.decoding import Decoding, ImageFile

TILE = 256
TWELVE, ALL = ((0.0, 4095.0),), "all"


class Case(NamedTuple):
    """A file, how it is meant, and what its library alone does."""

    path: Path
    reading: Decoding
    alone: Callable[[], Any]


def noise(side: int, channels: int, top: int = 255) -> np.ndarray:
    """Textured noise, as hard to compress as photographs are."""
    rng = np.random.default_rng(0)
    layers = [
        np.kron(rng.normal(0, 0.15, (side // cell, side // cell, channels)), np.ones((cell, cell, 1)))
        for cell in (4, 16, 64)
    ]
    pixels = ((0.5 + np.sum(layers, axis=0)).clip(0, 1) * top).astype(np.uint8 if top < 256 else np.uint16)
    return np.ascontiguousarray(pixels)


def photographs(root: Path, side: int) -> dict[str, Case]:
    import pillow_heif
    import simplejpeg
    from imagecodecs import jpegxl_decode, jpegxl_encode

    pixels, cases = noise(side, 3), {}
    for name, options in {"jpg": {"quality": 90}, "png": {}, "webp": {"quality": 85}, "avif": {}}.items():
        path = root / f"a.{name}"
        Image.fromarray(pixels).save(path, **options)
        alone = lambda path=path: np.asarray(Image.open(path).convert("RGB"))  # noqa: E731
        cases[f"{name.upper()}, Pillow"] = Case(path, Decoding(), alone)
    data = cases["JPG, Pillow"].path
    cases["JPG, simplejpeg"] = Case(data, Decoding(), lambda: simplejpeg.decode_jpeg(data.read_bytes()))
    heif = root / "a.heic"
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(heif, quality=85)
    cases["HEIC, pillow-heif"] = Case(heif, Decoding(), lambda: np.asarray(pillow_heif.open_heif(heif)))
    jxl = root / "a.jxl"
    jxl.write_bytes(jpegxl_encode(pixels, level=90, lossless=False))
    cases["JXL, imagecodecs"] = Case(jxl, Decoding(), lambda: jpegxl_decode(jxl.read_bytes(), numthreads=1))
    return cases


def science(root: Path, side: int) -> dict[str, Case]:
    import tifffile

    twelve, eight = noise(side, 1, 4095)[..., 0], noise(side, 8, 4095)
    one, many, npy, npz = (root / name for name in ("one.tif", "many.tif", "a.npy", "a.npz"))
    tifffile.imwrite(one, twelve, compression="deflate")
    tifffile.imwrite(
        many,
        eight,
        compression="deflate",
        tile=(TILE, TILE),
        photometric="minisblack",
        planarconfig="contig",
    )
    np.save(npy, eight)
    np.savez_compressed(npz, image=eight)
    known = Decoding(ranges=TWELVE)
    every = Decoding(ranges=TWELVE, channels=8)
    part = every.at((TILE, TILE, 2 * TILE, 2 * TILE))

    def tile() -> Any:
        with tifffile.TiffFile(many) as file:
            page: Any = file.pages[0]
            across = side // TILE
            file.filehandle.seek(page.dataoffsets[across + 1])
            return page.decode(file.filehandle.read(page.databytecounts[across + 1]), across + 1)

    return {
        "TIFF grey of 12 bits, tifffile": Case(one, known, lambda: tifffile.imread(one, maxworkers=1)),
        "TIFF of 8 channels, tifffile": Case(many, every, lambda: tifffile.imread(many, maxworkers=1)),
        "TIFF of 8 channels, a part of 256": Case(many, part, tile),
        "npy of 8 channels, NumPy": Case(npy, every, lambda: np.load(npy)),
        "npy of 8 channels, a part of 256": Case(
            npy, part, lambda: np.array(np.load(npy, mmap_mode="r")[TILE : 2 * TILE, TILE : 2 * TILE])
        ),
        "npz of 8 channels, NumPy": Case(npz, every, lambda: np.load(npz)["image"]),
    }


def medicine(root: Path, side: int) -> dict[str, Case]:
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

    twelve, cases = noise(side, 1, 4095)[..., 0], {}
    for name, syntax in (("DICOM, plain", None), ("DICOM, RLE", RLELossless)):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.Rows, data.Columns = twelve.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = twelve.tobytes()
        if syntax:
            data.compress(syntax)
        path = root / f"{len(cases)}.dcm"
        data.save_as(path, enforce_file_format=True)
        alone = lambda path=path: pydicom.pixels.pixel_array(path)  # noqa: E731
        cases[f"{name}, pydicom"] = Case(path, Decoding(deep=True), alone)
    return cases


def earth(root: Path, side: int) -> dict[str, Case]:
    import rasterio
    from rasterio.windows import Window

    bands = np.moveaxis(noise(side, 5, 4095), 2, 0)
    size: dict[str, Any] = {
        "width": side,
        "height": side,
        "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
    }
    geo, jp2 = root / "geo.tif", root / "a.jp2"
    size["crs"] = "EPSG:32633"
    with rasterio.open(geo, "w", driver="GTiff", count=5, dtype="uint16", nodata=0, compress="deflate",
                       tiled=True, blockxsize=TILE, blockysize=TILE, **size) as file:  # fmt: skip
        file.write(bands)
    with rasterio.open(jp2, "w", driver="JP2OpenJPEG", count=3, dtype="uint8", **size) as file:
        file.write(np.moveaxis(noise(side, 3), 2, 0))

    def alone(path: Path, window: Any = None) -> Callable[[], Any]:
        def read() -> Any:
            with rasterio.Env(GDAL_NUM_THREADS="1"), rasterio.open(path) as file:
                return file.read(window=window)

        return read

    every = Decoding(ranges=TWELVE, channels=5)
    part = every.at((TILE, TILE, 2 * TILE, 2 * TILE))
    return {
        "GeoTIFF of 5 bands, rasterio": Case(geo, every, alone(geo)),
        "GeoTIFF of 5 bands, a part of 256": Case(geo, part, alone(geo, Window(TILE, TILE, TILE, TILE))),
        "JPEG 2000, rasterio": Case(jp2, Decoding(), alone(jp2)),
    }


def slides(root: Path, side: int) -> dict[str, Case]:
    import openslide
    import tifffile

    path, pixels = root / "a.svs", noise(side, 3)
    about = (
        f"Aperio Image Library v11.2.1\r\n{side}x{side} [0,0 {side}x{side}] (256x256)|AppMag = 20|MPP = 0.5"
    )
    options: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, description=about, tile=(TILE, TILE), **options)
        file.write(pixels[::16, ::16], rowsperstrip=16, **options)
        file.write(pixels[::4, ::4], subfiletype=1, description=about, tile=(TILE, TILE), **options)

    def alone() -> Any:
        with openslide.OpenSlide(path) as slide:
            return np.asarray(slide.read_region((TILE, TILE), 0, (TILE, TILE)).convert("RGB"))

    return {
        "slide, a part of 256, OpenSlide": Case(
            path, Decoding(window=(TILE, TILE, 2 * TILE, 2 * TILE)), alone
        )
    }


def videos(root: Path, side: int) -> dict[str, Case]:
    import av

    path = root / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = side // 2, side // 2, "yuv420p"
        for shift in range(50):
            frame = np.roll(noise(side // 2, 3), shift, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

    def alone() -> Any:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            container.seek(int(1 / stream.time_base), stream=stream)
            return next(f for f in container.decode(stream) if f.time >= 1).to_ndarray(format="rgb24")

    from fractions import Fraction

    return {
        "a frame of a video of half the side, PyAV": Case(path, Decoding(seconds=Fraction(1), page=1), alone)
    }


KINDS = {each.__name__: each for each in (photographs, science, medicine, earth, slides, videos)}


def core_seconds(work: Callable[[], Any], least: float = 0.1) -> float:
    count, began = 0, time.process_time()
    while (took := time.process_time() - began) < least or not count:
        work()
        count += 1
    return took / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=1024)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{options.side} x {options.side} pixels, ms of a core, medians of {options.rounds} rounds")
    print("| | library alone | foveola | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds or KINDS:
            for name, case in KINDS[kind](Path(folder), options.side).items():
                ours = lambda case=case: decode(ImageFile(case.path, case.reading))  # noqa: E731
                both = np.array(
                    [[core_seconds(case.alone), core_seconds(ours)] for _ in range(options.rounds)]
                )
                alone, own = np.median(both, axis=0) * 1e3
                ratio = np.median(both[:, 1] / both[:, 0])
                print(f"| {name} | {alone:.2f} | {own:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
