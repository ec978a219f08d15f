"""HEIC, AVIF, JPEG XL and packed arrays, written by other libraries."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, features

from foveola.data.decode import decode
from foveola.data.decoding import Decoding, ImageFile
from foveola.data.readers import read_header, values_in
from foveola.data.sample import BadImage, DataError

RNG = np.random.default_rng(0)
SMOOTH = np.kron(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
PART = (5, 7, 41, 60)


def heic(array: np.ndarray) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    kind = "RGB;16" if array.itemsize > 1 else "RGB"
    file = io.BytesIO()
    image = pillow_heif.from_bytes(kind, array.shape[1::-1], array.tobytes())
    image.save(file, quality=-1, chroma=444)
    return file.getvalue()


def avif(array: np.ndarray) -> bytes:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    file = io.BytesIO()
    Image.fromarray(array).save(file, "AVIF", quality=100, subsampling="4:4:4")
    return file.getvalue()


def jxl(array: np.ndarray, **options) -> bytes:
    return pytest.importorskip("imagecodecs").jpegxl_encode(array, lossless=True, **options)


@pytest.mark.parametrize(("write", "tolerance"), [(heic, 6), (avif, 6), (jxl, 0)])
def test_colours_of_8_bits(write, tolerance):
    data = write(SMOOTH)
    assert read_header(data).upright == (96, 80)
    got = decode(data)
    assert np.abs(got.astype(int) - SMOOTH).max() <= tolerance
    assert np.array_equal(decode(ImageFile(data, Decoding(window=PART))), got[7:60, 5:41])
    for end in (30, len(data) // 2):
        with pytest.raises(BadImage):
            decode(data[:end])


def test_deep_values_are_kept():
    words = RNG.integers(0, 65536, (40, 50, 3), dtype=np.uint16)
    assert np.array_equal(values_in(jxl(words), Decoding()).array, words)
    assert np.array_equal(
        values_in(jxl(words[..., 0], usecontainer=True), Decoding()).array[..., 0], words[..., 0]
    )
    assert read_header(jxl(words)).bits == 16
    values = values_in(heic(SMOOTH.astype(np.uint16) * 257), Decoding())
    assert (values.array.dtype, values.low, values.high) == (np.uint16, 0, 65535)
    assert np.abs(values.array / 257.0 - SMOOTH).max() < 6


@pytest.mark.parametrize("shape", [(8, 8), (100, 300), (1000, 17), (512, 512), (90, 160), (300, 200)])
def test_sizes_in_headers_of_jpeg_xl(shape):
    header = read_header(jxl(np.zeros(shape, np.uint8)))
    assert (header.height, header.width, header.bits) == (*shape, 8)


@pytest.mark.parametrize(
    ("write", "module", "extra"), [(heic, "pillow_heif", "heif"), (jxl, "imagecodecs", "jxl")]
)
def test_without_the_library_the_extra_is_named(write, module, extra, monkeypatch):
    data = write(SMOOTH)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs {module} .*; pip install 'foveola\[{extra}\]'"):
        decode(data)


def test_packed_arrays(tmp_path):
    words = RNG.integers(0, 65536, (40, 50, 3), dtype=np.uint16)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, image=words, labels=np.arange(4))
    assert np.array_equal(values_in(path, Decoding()).array, words)
    np.savez(path, words)
    assert np.array_equal(values_in(path, Decoding(window=(3, 4, 20, 30))).array, words[4:30, 3:20])
    assert read_header(path).channels == 3
    np.savez(path, a=words, b=words)
    with pytest.raises(BadImage, match="the arrays a, b, where one, or one called 'image'"):
        decode(path)
    np.savez(path, np.zeros((30_000, 1), np.uint8))
    data = path.read_bytes()
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2])
