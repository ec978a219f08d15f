"""Any picture file to the right pixels, and pixels to the canvas, against PIL."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.decode import Scratch, decode, picture_size, to_canvas
from foveola.data.sample import BadImage


def photo(height=40, width=60, seed=0):
    """Smooth colours, so that JPEG keeps them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
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
    assert picture_size(data) == (60, 40)


@pytest.mark.parametrize(
    "block", [b"", b"MM\0*\0\0\0\xff", b"II*\0\x08\0\0\0\xff\xff", b"II*\0\x08\0\0\0", b"rubbish"]
)
def test_broken_exif_is_no_broken_picture(block):
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
    picture = Image.fromarray(pixels).quantize(64)
    assert np.array_equal(decode(encoded(picture)), np.asarray(picture.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    got = decode(encoded(Image.fromarray(levels)))
    assert got.shape == (20, 30, 3)
    assert np.abs(got - levels[:, :, None] / 257).max() <= 0.5 + 1e-9


def test_transparent_parts_become_white():
    pixels = np.dstack([photo(), np.zeros((40, 60), np.uint8)])
    pixels[:20, :, 3] = 255
    pixels[30:, :, 3] = 128
    got = decode(encoded(Image.fromarray(pixels))).astype(float)
    assert np.array_equal(got[:20], pixels[:20, :, :3])
    assert (got[20:30] == 255).all()
    assert np.abs(got[30:] - (pixels[30:, :, :3] * (128 / 255) + 127)).max() <= 1.01


def test_transparent_palette_becomes_white():
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    got = decode(encoded(picture, transparency=7))
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
    [(b"", "empty"), (b"no picture at all, only words", "known kind"), (b"\xff\xd8", "known kind")],
)
def test_no_picture_is_bad(data, reason):
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
    path = tmp_path / "picture.jpg"
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


def test_a_picture_that_fits_on_the_canvas_keeps_its_pixels():
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
