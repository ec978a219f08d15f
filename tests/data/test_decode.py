"""Any image file to the right pixels, and pixels to the canvas, against PIL."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.decode import Scratch, decode, pixels_of, to_canvas
from foveola.data.decoding import Decoding, ImageFile
from foveola.data.readers import read_header
from foveola.data.sample import BadImage, DataError
from foveola.data.values import Values, to_pixels


def photo(height=40, width=60, seed=0):
    """Smooth colours, so that JPEG keeps them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(pixels, orientation):
    """How a camera held that way stores pixels: what EXIF says is undone (TIFF 6.0, tag 274)."""
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }
    return np.ascontiguousarray(stored[orientation])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind):
    pixels = photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(oriented(pixels, orientation)), kind, exif=exif, **options)
    got = decode(data)
    assert got.shape == pixels.shape
    assert np.abs(got.astype(int) - pixels).mean() < 2
    assert read_header(data).upright == (60, 40)
    assert read_header(data).orientation == orientation


@pytest.mark.parametrize(
    "block", [b"", b"MM\0*\0\0\0\xff", b"II*\0\x08\0\0\0\xff\xff", b"II*\0\x08\0\0\0", b"rubbish"]
)
def test_broken_exif_is_no_broken_image(block):
    data = encoded(Image.fromarray(photo()), "JPEG", exif=b"Exif\0\0" + block)
    assert decode(data).shape == (40, 60, 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_as_pil_decodes_it(options):
    data = encoded(Image.fromarray(photo(123, 77)), "JPEG", **options)
    want = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(decode(data).astype(int) - want).max() <= 1


def test_scratch_memory_changes_nothing():
    scratch = Scratch()
    for shape in ((77, 40), (20, 30), (123, 77)):
        data = encoded(Image.fromarray(photo(*shape)), "JPEG")
        assert np.array_equal(decode(data, scratch), decode(data))
        assert decode(data) is not decode(data)


def test_gray():
    gray = photo()[:, :, 0]
    for kind, tolerance in (("PNG", 0), ("JPEG", 12)):
        got = decode(encoded(Image.fromarray(gray), kind))
        assert np.abs(got.astype(int) - gray[:, :, None]).max() <= tolerance


def test_cmyk():
    pixels = photo()
    data = encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(data).astype(int) - pixels).mean() < 4


def test_palette():
    pixels = photo()
    image = Image.fromarray(pixels).quantize(64)
    assert np.array_equal(decode(encoded(image)), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    got = decode(encoded(Image.fromarray(levels)))
    assert got.shape == (20, 30, 3)
    assert np.abs(got - levels[:, :, None] / 257).max() <= 0.5 + 1e-9


def png16(values):
    """A PNG of 16 bits a channel, by its specification: PIL cannot write colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    kind = {2: 0, 3: {3: 2, 4: 6}.get(values.shape[-1], 0)}[values.ndim]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(values, order="<", kind=1):
    """An uncompressed TIFF 6.0 of any number of channels; `kind` 1: unsigned, 2: signed, 3: float."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = [8 * values.dtype.itemsize] * channels
    tags = {256: [width], 257: [height], 258: bits, 259: [1], 262: [2 if channels >= 3 else 1], 273: [0]}
    tags |= {277: [channels], 278: [height], 279: [len(data)], 339: [kind] * channels}
    after = 8 + 2 + 12 * len(tags) + 4
    spare = sum(2 * len(v) for v in tags.values() if len(v) > 2)
    tags[273] = [after + spare]
    entries, more = b"", b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if tag in (273, 279):
            packed = struct.pack(f"{order}I", *numbers)
        if len(packed) > 4:
            more, packed = more + packed, struct.pack(f"{order}I", after + len(more))
        entries += struct.pack(f"{order}HHI", tag, 4 if tag in (273, 279) else 3, len(numbers))
        entries += packed.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return start + entries + b"\0\0\0\0" + more + data


TWELVE = np.random.default_rng(0).integers(0, 4096, (20, 30, 3)).astype(np.uint16)
FULL = Decoding(ranges=((0, 4095),))


@pytest.mark.parametrize("write", [png16, tiff, lambda v: tiff(v, ">")])
def test_a_range_of_sixteen_bits(write):
    want = np.rint(TWELVE * (65535 / 4095))
    assert np.array_equal(decode(ImageFile(write(TWELVE), FULL)), want)
    grey = decode(ImageFile(write(np.ascontiguousarray(TWELVE[:, :, 0])), FULL))
    assert np.array_equal(grey, want[:, :, :1].repeat(3, 2))


def test_a_range_changes_with_neither_container_nor_eight_bits():
    """12 bits in 16 give what the same image scaled to 8 gives; images of 8 bits stay as they are."""
    scaled = np.rint(TWELVE * (255 / 4095)).astype(np.uint8)
    plain = encoded(Image.fromarray(scaled))
    assert np.array_equal(decode(ImageFile(plain, FULL)), scaled * np.uint16(257))
    assert np.abs(decode(ImageFile(png16(TWELVE), FULL)) / 257 - decode(plain)).max() <= 0.5
    assert decode(png16(TWELVE)).max() <= 16  # without a range: nearly black


def test_what_lies_beyond_a_range_is_cut_off():
    values = np.array([[-2000, -1000, 1000, 3000, 9000] * 4] * 10, np.int16)
    got = decode(ImageFile(tiff(values, kind=2), Decoding(ranges=((-1000, 3000),))))
    assert got[0, :5, 0].tolist() == [0, 0, 32768, 65535, 65535]
    with pytest.raises(BadImage, match="values beyond 16 bits; give their range"):
        decode(tiff(values, kind=2))
    whole = Decoding(ranges=((0, 65535),))  # all of the container, and values of 32 bits
    wide = np.array([[-5, 0, 7, 65535, 70000] * 4] * 10, np.int32)
    assert to_pixels(Values(wide[:, :, None]), whole)[0, :5, 0].tolist() == [0, 0, 7, 65535, 65535]
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    assert np.array_equal(to_pixels(Values(every), Decoding())[..., 0], np.rint(every[..., 0] / 257))
    assert np.array_equal(to_pixels(Values(every), whole)[..., 0], every[..., 0])


def test_alpha_of_sixteen_bits_with_a_range():
    alpha = np.full((20, 30, 1), 65535, np.uint16)
    alpha[:10] = 0
    got = decode(ImageFile(png16(np.dstack([TWELVE, alpha])), FULL))
    assert (got[:10] == 65535).all()
    assert np.array_equal(got[10:], np.rint(TWELVE * (65535 / 4095))[10:])


def test_floating_point_needs_a_range():
    values = np.linspace(0, 1, 200, dtype=np.float32).reshape(10, 20)
    data = tiff(values, kind=3)
    with pytest.raises(BadImage, match="no known range; give one"):
        decode(data)
    with pytest.raises(BadImage, match="no known range; give one"):
        decode(ImageFile(data, Decoding(container=True)))
    assert np.array_equal(
        decode(ImageFile(data, Decoding(ranges=((0, 1),))))[:, :, 0], np.rint(values * 65535.0)
    )
    values[0, 0] = np.nan
    with pytest.raises(BadImage, match="not finite"):
        decode(ImageFile(tiff(values, kind=3), Decoding(ranges=((0, 1),))))


def test_a_pgm_that_states_its_range_needs_none():
    grey = TWELVE[:, :, 0]
    data = b"P5 30 20 4095\n" + grey.astype(">u2").tobytes()
    want = np.rint(grey * (255 / 4095))
    assert np.abs(decode(data)[:, :, 0] - want).max() <= 1
    assert np.array_equal(decode(ImageFile(data, FULL))[:, :, 0], np.rint(grey * (65535 / 4095)))


def test_colour_of_sixteen_bits_that_pil_has_opened(tmp_path):
    """PIL has dropped the lower bytes: with a range, which needs them, the file itself is asked for."""
    data = png16(TWELVE)
    with (
        Image.open(io.BytesIO(data)) as opened,
        pytest.raises(DataError, match="keeps the upper bytes alone"),
    ):
        pixels_of(opened, "0-4095")
    assert np.array_equal(pixels_of(data, "0-4095"), decode(ImageFile(data, Decoding(ranges=((0, 4095),)))))


def test_pages():
    pages = [Image.fromarray(photo(seed=seed)) for seed in range(3)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(BadImage, match="a TIFF of 3 pages; pages=first"):
        decode(data)
    assert np.array_equal(decode(ImageFile(data, Decoding(page=0))), photo())
    animation = encoded(pages[0], "GIF", save_all=True, append_images=pages[1:])
    assert decode(animation).shape == (40, 60, 3)  # of an animation the first frame


@pytest.mark.parametrize(("channels", "dtype"), [(5, np.uint8), (2, np.uint8), (5, np.uint16)])
def test_other_numbers_of_channels_have_a_reason_that_is_true(channels, dtype):
    with pytest.raises(BadImage, match=rf"{channels} channels, where grey or RGB is expected; channels=all"):
        decode(tiff(np.zeros((20, 30, channels), dtype)))


@pytest.mark.parametrize("stray", [b"\0" * 7, b"\0" * 3000, b"abc" * 5])
def test_bytes_before_the_end_of_a_jpeg_are_no_damage(stray):
    data = encoded(Image.fromarray(photo()), "JPEG")
    assert np.array_equal(decode(data[:-2] + stray + data[-2:]), decode(data))


def test_many_unread_bytes_before_the_end_of_a_jpeg_are_damage():
    data = encoded(Image.fromarray(photo()), "JPEG")
    stray = bytes(np.random.default_rng(0).integers(0, 255, 200, np.uint8))
    with pytest.raises(BadImage, match="extraneous bytes"):
        decode(data[:-2] + stray + data[-2:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_read_the_same_everywhere(kind):
    """A block that two programs wrote twice counts; a damaged one costs neither the image nor its place."""
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    for written, turned in ((b"Exif\0\0Exif\0\0" + block, True), (b"Exif\0\0not a TIFF block", False)):
        data = encoded(Image.fromarray(photo()), kind, exif=written)
        assert decode(data).shape[:2] == ((60, 40) if turned else (40, 60))
        assert read_header(data).upright == ((40, 60) if turned else (60, 40))


def test_only_promised_formats_are_opened(monkeypatch):
    """What begins like PostScript would start Ghostscript, whatever its name."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started")
    )
    eps = encoded(Image.fromarray(photo()), "EPS")
    Image.init()  # as another library may have done: all plugins are known
    with pytest.raises(BadImage, match="known kind"):
        decode(eps)


def test_nothing_else_opens_image_files():
    root = Path(__file__).resolve().parents[2] / "foveola"
    code = re.compile(r"^(?!.*['\"].*Image\.open).*\bImage\.open\(", re.MULTILINE)
    assert [p.name for p in root.rglob("*.py") if code.search(p.read_text())] == ["formats.py"]


def test_transparent_parts_become_white():
    pixels = np.dstack([photo(), np.zeros((40, 60), np.uint8)])
    pixels[:20, :, 3] = 255
    pixels[30:, :, 3] = 128
    got = decode(encoded(Image.fromarray(pixels))).astype(float)
    assert np.array_equal(got[:20], pixels[:20, :, :3])
    assert (got[20:30] == 255).all()
    assert np.abs(got[30:] - (pixels[30:, :, :3] * (128 / 255) + 127)).max() <= 1.01


def test_transparent_palette_becomes_white():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    got = decode(encoded(image, transparency=7))
    assert (got[0, 7] == 255).all()
    assert (got[0, 8] == 8).all()


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "TIFF"])
def test_other_kinds(kind):
    assert np.abs(decode(encoded(Image.fromarray(photo()), kind)).astype(int) - photo()).mean() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_truncated_is_bad(kind, share):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), kind)
    with pytest.raises(BadImage, match=r"^[^\n]+$"):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"no image at all, only words", "known kind"), (b"\xff\xd8", "known kind")],
)
def test_no_image_is_bad(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_a_header_that_asks_for_too_much_is_bad():
    data = bytearray(encoded(Image.fromarray(photo()), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(BadImage, match="65535x65535 pixels"):
        decode(bytes(data))


def test_missing_file_is_bad(tmp_path: Path):
    with pytest.raises(BadImage, match="No such file"):
        decode(tmp_path / "gone.jpg")


def test_tiny_is_bad():
    with pytest.raises(BadImage, match="60x7 pixels"):
        decode(encoded(Image.fromarray(photo()[:7])))


def test_a_file_is_judged_by_its_content(tmp_path: Path):
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(Image.fromarray(photo()), "PNG"))
    assert np.array_equal(decode(path), photo())


@pytest.mark.parametrize(
    ("shape", "size", "stored"),
    [
        ((375, 500), 224, (224, 224)),
        ((500, 375), 400, (400, 375)),
        ((40, 400), 64, (40, 64)),
        ((64, 64), 64, (64, 64)),
    ],
)
def test_canvas_is_pils_antialiased_bicubic_of_the_sides_that_are_too_long(shape, size, stored):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    image = to_canvas(pixels, size)
    assert image.shape == (3, *stored)
    want = np.asarray(Image.fromarray(pixels).resize(stored[::-1], Image.Resampling.BICUBIC))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - want).max() <= 1


def test_a_image_that_fits_on_the_canvas_keeps_its_pixels():
    pixels = photo(32, 24)
    pixels.setflags(write=False)
    for size in (32, 512):
        assert np.array_equal(to_canvas(pixels, size).permute(1, 2, 0).numpy(), pixels)


def test_real_photos(data_folder: Path):
    """Every photo decodes as PIL decodes it."""
    import zipfile

    with zipfile.ZipFile(data_folder / "photos.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith("JPEG")][:40]
        for name in names:
            data = archive.read(name)
            want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
            assert np.abs(decode(data) - want).max() <= 1, name
