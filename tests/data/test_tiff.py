"""TIFF files that other programs write: values exact, parts equal to slices, pages, names, damage."""

import io

import numpy as np
import pytest
from PIL import Image

from foveola.data.decode import decode
from foveola.data.decoding import Decoding, ImageFile
from foveola.data.readers import read_header, reader_of, values_in
from foveola.data.sample import BadImage

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

RNG = np.random.default_rng(0)
PART = (5, 7, 41, 60)
WORDS = RNG.integers(0, 65536, (6, 100, 90), dtype=np.uint16)
TWELVE = WORDS[:3] >> 4


def written(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 0, 2)


CASES = {
    "many channels, BigTIFF, tiles": (
        channels_last(WORDS[:5]),
        {"bigtiff": True, "planarconfig": "contig", "tile": (64, 64), "compression": "zstd"},
    ),
    "float in strips": (WORDS[0] / np.float32(7), {"compression": "zlib", "rowsperstrip": 9}),
    "double": (WORDS[0] / 7, {}),
    "half": ((WORDS[0] % 2048).astype(np.float16), {"tile": (32, 16)}),
    "signed": (WORDS[0].view(np.int16), {"byteorder": ">"}),
    "colours of 16 bits": (channels_last(WORDS[:3]), {"photometric": "rgb", "predictor": 2,
                                                      "compression": "lzw"}),
    "planes of 16 bits": (WORDS[:3], {"photometric": "rgb", "planarconfig": "separate", "tile": (32, 32),
                                      "compression": "lzw"}),
    "12 bits packed, colour": (channels_last(TWELVE), {"photometric": "rgb", "bitspersample": 12}),
    "white is 0, 16 bits": (WORDS[0], {"photometric": "miniswhite"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_written_and_parts_are_slices(case, tmp_path):
    array, options = CASES[case]
    options = {"photometric": "minisblack"} | options
    (tmp_path / "a.tif").write_bytes(written(array, **options))
    want = channels_last(array) if options.get("planarconfig") == "separate" else array
    want = 65535 - want if options["photometric"] == "miniswhite" else want
    want = want.reshape(100, 90, -1)
    for file in (tmp_path / "a.tif", (tmp_path / "a.tif").read_bytes()):
        header = read_header(file)
        assert (header.width, header.height, header.channels) == (90, 100, want.shape[2])
        assert np.array_equal(values_in(file, Decoding()).array, want)
        x0, y0, x1, y1 = PART
        assert np.array_equal(values_in(file, Decoding(window=PART)).array, want[y0:y1, x0:x1])
    high = 4095 if "12 bits" in case else None
    assert values_in(file, Decoding()).high == high


@pytest.mark.parametrize("compression", [None, "deflate", "jpeg"])
def test_what_pil_reads_is_what_it_was_and_parts_are_the_same(compression):
    grain = RNG.integers(90, 140, (100, 90, 3), dtype=np.uint8)
    subsampled = {"subsampling": (2, 2)} if compression == "jpeg" else {}
    data = written(grain, photometric="rgb", tile=(32, 16), compression=compression, **subsampled)
    assert reader_of(data, Decoding()) is None
    with Image.open(io.BytesIO(data)) as image:
        whole = np.array(image)
    assert np.array_equal(decode(data), whole)
    x0, y0, x1, y1 = PART
    assert reader_of(data, Decoding(window=PART)) is not None
    assert np.array_equal(decode(ImageFile(data, Decoding(window=PART))), whole[y0:y1, x0:x1])


def test_only_the_tiles_of_a_part_are_read(tmp_path):
    """All other tiles are overwritten."""
    grain = RNG.integers(0, 255, (256, 256, 3), dtype=np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, grain, photometric="rgb", tile=(64, 64), compression="deflate")
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        others = [i for i in range(16) if i not in (5, 6)]
        spans = [(page.dataoffsets[i], page.databytecounts[i]) for i in others]
    data = bytearray(path.read_bytes())
    for start, size in spans:
        data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    got = values_in(path, Decoding(window=(64, 70, 190, 120))).array
    assert np.array_equal(got, grain[70:120, 64:190])
    with pytest.raises(BadImage, match="damaged TIFF"):
        values_in(path, Decoding(window=(60, 70, 190, 120)))


STACKS = {
    "pages": (WORDS[:4], {}, lambda k: WORDS[k][..., None], 4),
    "compressed pages": (WORDS[:4], {"compression": "zlib", "tile": (32, 32)},
                         lambda k: WORDS[k][..., None], 4),
    "ImageJ": (WORDS.reshape(3, 2, 100, 90), {"imagej": True, "metadata": {"axes": "ZCYX"}},
               lambda k: channels_last(WORDS.reshape(3, 2, 100, 90)[k]), 3),
    "OME": (WORDS.reshape(2, 3, 100, 90), {"ome": True, "metadata": {"axes": "ZCYX"}},
            lambda k: channels_last(WORDS.reshape(2, 3, 100, 90)[k]), 2),
    "OME, channels first": (WORDS.reshape(3, 2, 100, 90), {"ome": True, "metadata": {"axes": "CZYX"}},
                            lambda k: channels_last(WORDS.reshape(3, 2, 100, 90)[:, k]), 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", STACKS)
def test_pages_of_stacks(kind):
    array, options, page, count = STACKS[kind]
    data = written(array, photometric="minisblack", **options)
    assert read_header(data, Decoding(page="each")).pages == count
    with pytest.raises(BadImage, match=r"a TIFF of \d pages; pages=first .* pages=each"):
        decode(data)
    for k in range(count):
        assert np.array_equal(values_in(data, Decoding(page=k)).array, page(k))
        got = values_in(data, Decoding(page=k, window=PART)).array
        assert np.array_equal(got, page(k)[7:60, 5:41])
    every = np.concatenate([page(k) for k in range(count)], axis=2)
    assert np.array_equal(values_in(data, Decoding(page="channels")).array, every)
    with pytest.raises(BadImage, match=rf"has {count} page\(s\), and page {count + 1} is asked for"):
        values_in(data, Decoding(page=count))


def test_channels_of_ome_have_names():
    names = ["DAPI", "FITC", "Cy3", "Cy5", "BF"]
    data = written(WORDS[:5], ome=True, metadata={"axes": "CYX", "Channel": {"Name": names}})
    values = values_in(data, Decoding())
    assert values.names == tuple(names)
    reading = Decoding(ranges=((0, 65535),), channels=("Cy5", "DAPI"), deep=True)
    assert np.array_equal(decode(ImageFile(data, reading)), channels_last(WORDS[[3, 0]]))


def test_orientation_turns_parts_as_it_turns_the_whole():
    for orientation in (3, 6, 8):
        data = written(WORDS[0], tile=(32, 32), extratags=[(274, 3, 1, orientation, True)])
        turned = {3: np.rot90(WORDS[0], 2), 6: np.rot90(WORDS[0], -1), 8: np.rot90(WORDS[0])}[orientation]
        assert read_header(data).upright == turned.shape[::-1]
        assert np.array_equal(values_in(data, Decoding()).array[:, :, 0], turned)
        part = values_in(data, Decoding(window=(3, 4, 50, 60))).array[:, :, 0]
        assert np.array_equal(part, turned[4:60, 3:50])


def test_metadata_that_refer_to_other_files_or_hide_anything():
    xml = '<?xml version="1.0"?>{}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{}</OME>'
    companion = xml.format("", '<BinaryOnly MetadataFile="/etc/passwd" UUID="urn:uuid:1"/>')
    bomb = xml.format('<!DOCTYPE x [<!ENTITY a "aaaaaaaa">]>', '<Pixels SizeC="2" SizeZ="1" SizeT="1"/>')
    for text, why in ((companion, "in a companion file"), (bomb, "with a document type")):
        with pytest.raises(BadImage, match=why):
            values_in(written(WORDS[0], description=text, metadata=None), Decoding())


@pytest.mark.parametrize(
    "options", [{}, {"bigtiff": True}, {"byteorder": ">"}, {"bigtiff": True, "byteorder": ">"}]
)
@pytest.mark.parametrize("kind", ["PIL", "tifffile"])
def test_a_stack_that_is_cut_off_behind_a_page_is_no_stack_of_fewer(kind, options, tmp_path):
    file = io.BytesIO()
    grey = (WORDS[:3] >> 8).astype(np.uint8) if kind == "PIL" else WORDS[:3] / np.float64(7)
    with tifffile.TiffWriter(file, **options) as stack:
        for page in grey:
            stack.write(page, metadata=None, contiguous=False)
    data = file.getvalue()
    with tifffile.TiffFile(io.BytesIO(data)) as whole:
        starts = [page.offset for page in whole.pages]
    assert read_header(data).pages == 3
    for end, page in ((starts[1], 2), (starts[1] + 20, 2), (starts[2], 3)):
        (tmp_path / "a.tif").write_bytes(data[:end])
        for each in (data[:end], tmp_path / "a.tif"):
            for read in (read_header, values_in):
                for chosen in (None, 0, "channels", "each"):
                    with pytest.raises(BadImage, match=f"cut off: page {page} begins at .* ends at {end}$"):
                        read(each, Decoding(page=chosen))


def test_files_that_are_damaged_or_ask_for_too_much(tmp_path):
    data = written(channels_last(WORDS[:5]), photometric="minisblack", compression="zlib", tile=(32, 32))
    for end in (20, 300, len(data) // 2):
        with pytest.raises(BadImage):
            decode(ImageFile(data[:end], Decoding(channels=5)))
    path = tmp_path / "huge.tif"  # it says that one strip of a byte holds all
    tifffile.imwrite(path, iter([b"x"]), shape=(60_000, 60_000, 3), dtype="uint8", photometric="rgb",
                     rowsperstrip=60_000, compression="deflate", bigtiff=True)  # fmt: skip
    with pytest.raises(BadImage, match=r"60000x60000 pixels .* tiles=512"):
        decode(path)
    with pytest.raises(BadImage, match="tiles of 60000x60000"):
        decode(ImageFile(path, Decoding(window=PART)))
