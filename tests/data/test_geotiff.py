"""Scenes that rasterio writes: bands, names, nodata, parts; nothing beside the file is read."""

import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

from foveola.data import readers
from foveola.data.decode import decode
from foveola.data.decoding import Decoding, ImageFile
from foveola.data.geotiff import geo_values
from foveola.data.readers import read_header, reader_of, values_in
from foveola.data.sample import BadImage, DataError
from foveola.data.sources import open_source

rasterio = pytest.importorskip("rasterio")

RNG = np.random.default_rng(0)
BANDS = RNG.integers(10, 65536, (5, 100, 90), dtype=np.uint16)
NAMES = ("blue", "green", "red", "nir", "swir")
PART = (5, 7, 41, 60)


def scene(path, array, nodata=None, names=None, **options):
    options = {"driver": "GTiff", "crs": "EPSG:32633"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options |= {"nodata": nodata, "dtype": array.dtype, "transform": rasterio.Affine(10, 0, 0, 0, -10, 0)}
        options |= dict(zip(("count", "height", "width"), array.shape, strict=True))
        with rasterio.open(path, "w", **options) as file:
            file.write(array)
            if names:
                file.descriptions = names
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "deflate"},
        {"interleave": "band"},
        {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"},
    ],
)
def test_bands_are_those_written_and_parts_are_slices(tmp_path, options):
    path = scene(tmp_path / "a.tif", BANDS, names=None if "driver" in options else NAMES, **options)
    want = np.moveaxis(BANDS, 0, 2)
    for file in (path, path.read_bytes()):
        header = read_header(file)
        assert (header.width, header.height, header.channels, header.bits) == (90, 100, 5, 16)
        values = values_in(file, Decoding())
        assert np.array_equal(values.array, want)
        assert values.names == (() if "driver" in options else NAMES)
        assert values.missing is None
        assert np.array_equal(values_in(file, Decoding(window=PART)).array, want[7:60, 5:41])
    with pytest.raises(BadImage, match="the part"):
        values_in(path, Decoding(window=(80, 0, 100, 10)))


def test_nodata_is_missing_where_all_bands_have_it(tmp_path):
    array = BANDS.copy()
    array[:, 20:30] = 9
    array[2, 50:60] = 9  # one band alone: water may be as dark
    path = scene(tmp_path / "a.tif", array, nodata=9, names=NAMES)
    rows = np.zeros((100, 90), bool)
    rows[20:30] = True
    missing = values_in(path, Decoding()).missing
    assert missing is not None
    assert np.array_equal(missing, rows)
    reading = Decoding(ranges=((0, 65535),), channels=("nir", "red"), deep=True)
    pixels = decode(ImageFile(path, reading))
    assert np.array_equal(pixels, np.where(rows[..., None], 0, np.moveaxis(array[[3, 2]], 0, 2)))
    floats = RNG.random((2, 100, 90)).astype(np.float32)
    floats[0, 3, 4] = np.nan
    path = scene(tmp_path / "b.tif", floats, nodata=-9999)
    pixels = decode(ImageFile(path, Decoding(ranges=((0, 1),), channels=2)))
    assert (pixels[3, 4] == 0).all()
    want = np.rint(np.moveaxis(floats.astype(np.float64), 0, 2) * 65535)
    want[3, 4] = 0
    assert np.array_equal(pixels, want)


def test_scale_and_offset_are_the_files_own(tmp_path):
    path = scene(tmp_path / "a.tif", BANDS, nodata=0)
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (0.5,) * 5, (1.0,) * 5
    assert np.array_equal(values_in(path, Decoding()).array, np.moveaxis(BANDS, 0, 2) * 0.5 + 1)


def test_plain_colours_are_read_as_they_were(tmp_path):
    colours = RNG.integers(0, 256, (3, 100, 90), dtype=np.uint8)
    path = scene(tmp_path / "a.tif", colours, photometric="RGB")
    assert reader_of(path, Decoding()) is None
    assert np.array_equal(decode(path), np.moveaxis(colours, 0, 2))
    part = decode(ImageFile(path, Decoding(window=PART)))
    assert np.array_equal(part, np.moveaxis(colours, 0, 2)[7:60, 5:41])


def test_nothing_else_is_read(tmp_path):
    secret = scene(tmp_path / "secret.tif", BANDS)
    (tmp_path / "a.tif").write_text(
        '<VRTDataset rasterXSize="90" rasterYSize="100"><VRTRasterBand dataType="UInt16" band="1">'
        f"<SimpleSource><SourceFilename>{secret}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(BadImage, match="not an image of a known kind"):
        decode(ImageFile(tmp_path / "a.tif", Decoding(channels="all")))
    beside = scene(tmp_path / "b.tif", BANDS)
    (tmp_path / "b.tif.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><NoDataValue>5.0E+01</NoDataValue></PAMRasterBand></PAMDataset>'
    )
    assert values_in(beside, Decoding()).missing is None
    for end in (200, 600):
        with pytest.raises(BadImage):
            values_in(beside.read_bytes()[:end], Decoding())


def test_looks_at_large_scenes_decode_parts_of_them_alone(tmp_path, monkeypatch):
    low = (BANDS // 20).astype(np.uint16)
    scene(tmp_path / "a.tif", low, tiled=True, blockxsize=32, blockysize=32, compress="deflate")
    monkeypatch.setattr(readers, "LARGE_IMAGE", 90 * 100 - 1)
    monkeypatch.setattr(readers, "SEEN_SIDE", 16)

    def in_parts(path, decoding):
        assert decoding.window is not None
        return geo_values(path, decoding)

    monkeypatch.setattr(readers, "SCENE", replace(readers.SCENE, values=in_parts))
    data = f"folder:{tmp_path}?channels=all&tiles=32"
    source = open_source(data)
    assert (source.channels, decode(source[0].image).shape) == (5, (32, 32, 5))
    assert "add range=0-4095" in source.notes[0]
    corners = [(y * 84 // 3, x * 74 // 3) for y in range(4) for x in range(4)]
    seen = np.concatenate([low[:, y : y + 16, x : x + 16].reshape(5, -1) for y, x in corners], axis=1)
    found = open_source(f"{data}&range=percentile:1-99").reading.ranges
    np.testing.assert_allclose(found, np.percentile(seen, (1, 99), axis=1).T, rtol=1e-4)
    assert len(open_source(f"{data}&range=0-4095")) == len(source) == 4 * 3


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    path = scene(tmp_path / "a.tif", BANDS, nodata=9)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(DataError, match=r"GeoTIFF needs rasterio .*; pip install 'foveola\[geo\]'"):
        decode(path)
