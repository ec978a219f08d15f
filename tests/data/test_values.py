"""From what files hold to pixels: channels, ranges, pages, arrays; the container never counts."""

import io

import numpy as np
import pytest
from PIL import Image

from foveola.data.decode import decode
from foveola.data.decoding import Decoding, ImageFile, channels_of, source_depth
from foveola.data.sample import BadImage, DataError
from foveola.data.sources import open_source
from foveola.data.values import Values, to_pixels

RNG = np.random.default_rng(0)
FIVE = RNG.integers(0, 4096, (20, 24, 5)).astype(np.uint16)
DEEP = Decoding(ranges=((0, 4095),), channels=5, deep=True)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def read(data: bytes, **how) -> np.ndarray:
    return decode(ImageFile(data, Decoding(**how)))


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int16", "int32", "uint32", "float32", "float64"])
def test_pixels_are_shares_of_the_range_in_any_container(dtype):
    want = np.rint(FIVE.astype(np.float64) / 4095 * 65535).astype(np.uint16)
    assert np.array_equal(decode(ImageFile(npy(FIVE.astype(dtype)), DEEP)), want)
    first = np.ascontiguousarray(FIVE.astype(dtype).transpose(2, 0, 1))
    assert np.array_equal(decode(ImageFile(npy(first), DEEP)), want)  # channels first
    assert np.array_equal(decode(ImageFile(npy(np.asfortranarray(FIVE.astype(dtype))), DEEP)), want)


def test_a_range_of_each_channel():
    ranges = tuple((10.0 * c, 1000.0 + c) for c in range(5))
    got = read(npy(FIVE), ranges=ranges, channels=5, deep=True)
    for c, (low, high) in enumerate(ranges):
        want = np.rint(np.clip((FIVE[:, :, c] - low) / (high - low), 0, 1) * 65535)
        assert np.abs(got[:, :, c].astype(int) - want).max() <= 1  # halves are rounded by either
    with pytest.raises(BadImage, match=r"2 ranges of values, where it has 5 channel\(s\)"):
        read(npy(FIVE), ranges=((0, 1), (0, 2)), channels=5)


def test_chosen_channels():
    everything = read(npy(FIVE), channels="all", ranges=((0, 4095),))
    assert everything.shape[2] == 5
    assert np.array_equal(
        read(npy(FIVE), channels=(4, 3, 2), ranges=((0, 4095),)), everything[:, :, [3, 2, 1]]
    )
    with pytest.raises(BadImage, match="5 channels, where grey or RGB is expected; channels=all, or chosen"):
        decode(npy(FIVE))
    with pytest.raises(BadImage, match=r"5 channel\(s\), where channels=4 says 4"):
        read(npy(FIVE), channels=4)
    with pytest.raises(BadImage, match="channel 6 is asked for, of 5"):
        read(npy(FIVE), channels=(6, 1))
    with pytest.raises(BadImage, match="channel 'red' is asked for: channels of this file have no names"):
        read(npy(FIVE), channels=("red",))


def test_channels_of_files_that_pil_reads():
    rgba = RNG.integers(0, 256, (20, 24, 4)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "PNG")
    assert np.array_equal(read(file.getvalue(), channels="all"), rgba)
    assert np.array_equal(read(file.getvalue(), channels=("alpha", "R")), rgba[:, :, [3, 0]])
    assert decode(file.getvalue()).shape == (20, 24, 3)
    grey = io.BytesIO()
    Image.fromarray(rgba[:, :, 0]).save(grey, "JPEG")
    one = read(grey.getvalue(), channels=1)
    assert one.shape == (20, 24, 1)
    assert np.array_equal(one.repeat(3, 2), decode(grey.getvalue()))
    assert np.array_equal(read(grey.getvalue(), deep=True), decode(grey.getvalue()) * np.uint16(257))


def test_pages_as_channels():
    pages = [Image.fromarray(np.ascontiguousarray(FIVE[:, :, c])) for c in range(5)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    data = file.getvalue()
    assert np.array_equal(read(data, page="channels", channels="all", deep=True, container=True), FIVE)
    assert np.array_equal(read(data, page=3, channels=1, deep=True, container=True)[:, :, 0], FIVE[:, :, 3])
    with pytest.raises(BadImage, match="a TIFF of 5 pages"):
        read(data, channels=1)
    with pytest.raises(BadImage, match=r"has 5 page\(s\), and page 9 is asked for"):
        read(data, page=8)


def test_8_bits_fill_16():
    bytes_ = RNG.integers(0, 256, (20, 24, 3)).astype(np.uint8)
    deep = to_pixels(Values(bytes_), Decoding(channels=3, container=True, deep=True))
    assert deep.dtype == np.uint16
    assert np.array_equal(deep, bytes_ * np.uint16(257))


def test_windows_are_parts_of_the_whole():
    whole = read(npy(FIVE), channels=5, container=True, deep=True)
    part = read(npy(FIVE), channels=5, container=True, deep=True, window=(3, 5, 13, 17))
    assert np.array_equal(part, whole[5:17, 3:13])


def test_what_a_file_says_of_its_range_and_of_what_is_missing():
    array = np.arange(80, dtype=np.float32).reshape(8, 10, 1)
    array[0, 0] = np.nan
    missing = np.isnan(array[:, :, 0])
    said = Values(array, low=-100.0, high=100.0, missing=missing)  # what is missing is black, not 0
    got = to_pixels(said, Decoding(channels=1))
    assert got[0, 0, 0] == 0
    assert got[7, 9, 0] == round(179 * 1.275)
    assert np.array_equal(to_pixels(said, Decoding(channels=1, ranges=((0, 200),), deep=True))[1, 0], [3277])
    with pytest.raises(BadImage, match="not finite"):
        to_pixels(Values(array, 0.0, 1.0), Decoding(channels=1))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (npy(FIVE)[:-1], "ends before its values do"),
        (npy(FIVE)[:40], "a damaged .npy file"),
        (npy(np.array([[{}]])), "an array of object, where numbers are expected"),
        (npy(np.zeros((2, 3, 4, 5))), r"an array of shape \(2, 3, 4, 5\); expected"),
        (npy(np.zeros((9, 9), np.complex64)), "an array of complex64"),
        (npy(np.zeros((9, 9), np.float32)), "floating-point values have no known range"),
    ],
)
def test_arrays_that_are_no_images(data, why):
    with pytest.raises(BadImage, match=why):
        decode(data)


def test_a_source_says_its_channels(tmp_path):
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", FIVE)
    source = open_source(f"folder:{tmp_path}?channels=all&range=0-4095")
    assert channels_of(source) == 5
    assert decode(source[0].image).shape == (20, 24, 5)
    assert channels_of(open_source(f"folder:{tmp_path}?channels=2,&range=0-4095")) == 1
    assert channels_of(open_source("scenes:")) == 3
    assert source_depth(open_source("scenes:")) == 8
    for text in ("x", "0", "1,0", ",2"):
        with pytest.raises(DataError, match="channels"):
            open_source(f"folder:{tmp_path}?channels={text}&range=0-4095")
