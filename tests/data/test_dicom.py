"""DICOM files that pydicom writes: rescale, window, photometric interpretation, frames, compression."""

import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from foveola.data.decode import decode
from foveola.data.decoding import Decoding, ImageFile
from foveola.data.readers import read_header, values_in
from foveola.data.sample import BadImage, DataError
from foveola.data.sources import open_source

pydicom = pytest.importorskip("pydicom")

RNG = np.random.default_rng(0)
TWELVE = RNG.integers(0, 4096, (5, 50, 60)).astype(np.uint16)
PHOTO = RNG.integers(0, 256, (4, 50, 60, 3), dtype=np.uint8)
PART = (5, 7, 41, 40)


def dicom(
    array: np.ndarray, kind: str = "MONOCHROME2", stored: int = 12, frames: bool = False, **tags
) -> bytes:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns = array.shape[1:3] if frames else array.shape[:2]
    if frames:
        data.NumberOfFrames = len(array)
    data.SamplesPerPixel = 1 if kind.startswith("MONO") else 3
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = kind
    data.BitsAllocated = 8 * array.dtype.itemsize
    data.BitsStored = min(stored, data.BitsAllocated)
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(array.dtype.kind == "i")
    compress = tags.pop("compress", None)
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = array.tobytes()
    if compress:
        data.compress(compress)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("syntax", [None, "RLELossless"])
def test_twelve_bits_are_the_same_pixels_in_dicom_and_png(syntax):
    compress = syntax and getattr(pydicom.uid, syntax)
    data = dicom(TWELVE[0], compress=compress)
    for deep in (False, True):
        reading = Decoding(ranges=((0, 4095),), deep=deep)
        assert np.array_equal(decode(ImageFile(data, reading)), decode(ImageFile(png(TWELVE[0]), reading)))
    known = ImageFile(png(TWELVE[0]), Decoding(ranges=((0, 4095),)))
    assert np.array_equal(decode(ImageFile(data, Decoding(deep=True))), decode(known))  # as the file says


def test_rescale_and_window_are_those_of_the_standard():
    """C.11.2.1.2 of PS3.3: of a window of centre c and width w, black ends at c - 0.5 - (w - 1) / 2."""
    data = dicom(
        TWELVE[0].view(np.int16),
        stored=16,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=40,
        WindowWidth=400,
    )
    values = values_in(data, Decoding())
    assert np.array_equal(values.array[:, :, 0], TWELVE[0].astype(int) - 1024)
    assert (values.low, values.high) == (40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2)
    want = np.rint(np.clip((TWELVE[0] - 1024.0 + 160) / 399, 0, 1) * 255)
    assert np.array_equal(decode(data)[:, :, 0], want)
    exact = values_in(dicom(TWELVE[0], WindowCenter=[100, 7], WindowWidth=[50, 8],
                            VOILUTFunction="LINEAR_EXACT"), Decoding())  # fmt: skip
    assert (exact.low, exact.high) == (75, 125)
    half = values_in(dicom(TWELVE[0], RescaleSlope=0.5, RescaleIntercept=-1), Decoding())
    assert np.array_equal(half.array[:, :, 0], TWELVE[0] * 0.5 - 1)
    assert (half.low, half.high) == (-1, 4095 / 2 - 1)
    with pytest.raises(BadImage, match="SIGMOID, which is no range"):
        decode(dicom(TWELVE[0], WindowCenter=1, WindowWidth=2, VOILUTFunction="SIGMOID"))


def test_windows_and_bits_of_eight_bit_files():
    eight = (TWELVE[0] // 16).astype(np.uint8)
    want = (np.clip(eight.astype(int), 50, 135) - 50) * 3
    window = {"WindowCenter": 92.5, "WindowWidth": 85, "VOILUTFunction": "LINEAR_EXACT"}
    assert np.array_equal(decode(dicom(eight, stored=8, **window))[:, :, 0], want)
    assert np.array_equal(decode(dicom(eight, stored=8))[:, :, 0], eight)
    assert np.array_equal(decode(dicom(eight & 1, stored=1))[:, :, 0], (eight & 1) * 255)


def test_stored_bits_that_values_hardly_use_are_said(tmp_path):
    for k in range(2):
        (tmp_path / f"{k}.dcm").write_bytes(dicom(TWELVE[k], stored=16))
    (note,) = open_source(f"folder:{tmp_path}").notes
    assert re.search(
        r"2 of 2 .* from 0 to 65535, .* from \d+ to \d+ use 6% of it: add range=\d+-\d+ or", note
    )
    for query in ("range=file", "range=0-4095"):
        assert not open_source(f"folder:{tmp_path}?{query}").notes
    (tmp_path / "0.dcm").write_bytes(dicom(TWELVE[0], stored=16, WindowCenter=1000, WindowWidth=401))
    (tmp_path / "1.dcm").write_bytes(dicom(TWELVE[1], stored=12))
    assert not open_source(f"folder:{tmp_path}").notes


def test_what_begins_like_a_tiff_may_be_dicom(tmp_path):
    path = tmp_path / "a.dcm"
    path.write_bytes(b"II*\0" + dicom(TWELVE[0])[4:])  # the first 128 bytes are anybody's (PS3.10, 7.1)
    want = decode(dicom(TWELVE[0]))
    assert np.array_equal(decode(path), want)
    assert np.array_equal(decode(path.read_bytes()), want)


def test_monochrome1_is_turned_over_and_padding_is_missing():
    turned = dicom(TWELVE[0], "MONOCHROME1", WindowCenter=1000, WindowWidth=401)
    plain = dicom(TWELVE[0], WindowCenter=1000, WindowWidth=401)
    assert np.array_equal(decode(turned), 255 - decode(plain))
    padded = np.where(TWELVE[0] < 1000, 3, TWELVE[0]).astype(np.uint16)
    missing = values_in(dicom(padded, PixelPaddingValue=3), Decoding()).missing
    assert missing is not None
    assert np.array_equal(missing, padded == 3)
    assert (decode(dicom(padded, "MONOCHROME1", PixelPaddingValue=3))[padded == 3] == 0).all()


def test_frames(tmp_path):
    data = dicom(TWELVE, frames=True)
    assert read_header(data).pages == 5
    with pytest.raises(BadImage, match="a DICOM file of 5 frames; pages=first"):
        decode(data)
    for k in (0, 3):
        assert np.array_equal(values_in(data, Decoding(page=k)).array[:, :, 0], TWELVE[k])
    everything = values_in(data, Decoding(page="channels", window=PART)).array
    assert np.array_equal(everything, np.moveaxis(TWELVE, 0, 2)[7:40, 5:41])
    with pytest.raises(BadImage, match=r"has 5 frame\(s\), and frame 6 is asked for"):
        values_in(data, Decoding(page=5))
    (tmp_path / "IM0001").write_bytes(data)  # without a suffix, as on a disk of a hospital
    (tmp_path / "README").write_text("x")
    source = open_source(f"folder:{tmp_path}?pages=each")
    assert [source[k].name for k in range(len(source))] == [f"IM0001#{k}" for k in range(1, 6)]
    want = decode(ImageFile(png(TWELVE[2]), Decoding(ranges=((0, 4095),))))
    assert np.array_equal(decode(source[2].image), want)


def test_colours():
    for kind, stored, tolerance in (("RGB", PHOTO, 0), ("YBR_FULL", None, 3)):
        if stored is None:
            stored = pydicom.pixels.convert_color_space(PHOTO, "RGB", "YBR_FULL")
        data = dicom(stored, kind, 8, frames=True)
        got = values_in(data, Decoding(page=2, window=PART)).array.astype(int)
        assert np.abs(got - PHOTO[2, 7:40, 5:41]).max() <= tolerance


@pytest.mark.parametrize(
    ("syntax", "missing", "kind", "why"),
    [
        ("MPEG2MPML", None, BadImage, "^a DICOM file of MPEG2 Main Profile / Main Level, which is not read$"),
        (
            "HTJ2KLossless",
            ["pylibjpeg - requires more"],
            DataError,
            "decodes them: pylibjpeg - requires more$",
        ),
        (
            "JPEGLSLossless",
            ["gdcm - requires gdcm"],
            DataError,
            r"decodes them: pip install 'foveola\[dicom\]'$",
        ),
    ],
)
def test_a_compression_that_cannot_be_decoded_is_not_called_damage(syntax, missing, kind, why, monkeypatch):
    found = pydicom.dcmread(io.BytesIO(dicom(TWELVE[0], compress=pydicom.uid.RLELossless)))
    found.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    file = io.BytesIO()
    found.save_as(file)
    if missing:
        decoder = type(pydicom.pixels.get_decoder(pydicom.uid.JPEGLSLossless))
        monkeypatch.setattr(decoder, "is_available", property(lambda self: False))
        monkeypatch.setattr(decoder, "missing_dependencies", property(lambda self: missing))
    with pytest.raises(kind, match=why) as caught:
        decode(file.getvalue())
    assert type(caught.value) is kind


def test_files_that_are_damaged_or_ask_for_too_much():
    data = dicom(TWELVE[0])
    for end in (140, 300, len(data) - 500):
        with pytest.raises(BadImage):
            decode(data[:end])
    with pytest.raises(BadImage, match="60000x60000 pixels"):
        decode(dicom(TWELVE[0], Rows=60000, Columns=60000))
    report = pydicom.dcmread(io.BytesIO(data))
    del report.PixelData, report.Rows
    report.Modality = "SR"
    file = io.BytesIO()
    report.save_as(file)
    with pytest.raises(BadImage, match=r"without an image \(SR\)"):
        decode(file.getvalue())


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom(TWELVE[0]))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"DICOM needs pydicom .*; pip install 'foveola\[dicom\]'"):
        open_source(f"folder:{tmp_path}")
