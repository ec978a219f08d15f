"""From files and images to pixels: the same in Python as in evaluations, also as other libraries have it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import ConfigError, UserError, build
from foveola.data.sources import open_source
from foveola.evaluation.features.table import ExtractConfig, RowsCut
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.transform import evaluation_view, image_crop
from foveola.models.vit import ViTConfig

MODEL = ViTConfig(width=24, depth=1, heads=3, patch_size=4, image_size=16)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("squash", "resized"), [(True, 16), (True, 20), (False, 20)])
def test_images_as_pil_makes_them(interpolation, squash: bool, resized: int):
    settings = TransformConfig(resize=resized, crop=16, interpolation=interpolation, squash=squash)
    encoder = Encoder(EncoderConfig(model=MODEL, transform=settings))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    size = (resized, resized) if squash else (2 * resized, resized)
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    whole = np.asarray(Image.fromarray(pixels).resize(size, kernel))
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    cut = torch.from_numpy(whole[top : top + 16, left : left + 16].copy()).permute(2, 0, 1)
    (rows, columns), (upper, start) = image_crop(30, 60, settings)
    assert ((columns, rows), (start, upper)) == (size, (left, top))
    evaluated = evaluation_view(pixels, settings).pixels
    assert (evaluated.int() - cut.int()).abs().max() <= 1
    assert torch.equal(encoder.transform(pixels), encoder.normalise(evaluated[None])[0])


def test_other_kernels_are_refused():
    with pytest.raises(ConfigError, match="lanczos"):
        build(TransformConfig, {"interpolation": "lanczos"})


def odd_files(folder: Path) -> None:
    """One image in many kinds of files, of which several are read wrongly by a plain `Image.open`."""
    rng = np.random.default_rng(1)
    rgb = np.asarray(
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((45, 31)), np.uint8
    )
    image, grey = Image.fromarray(rgb), rgb[:, :, 0]
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        image.save(folder / f"turned-{orientation}.jpg", quality=95, exif=exif)
    image.save(folder / "turned.png", exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.gif")
    Image.fromarray(grey).save(folder / "grey.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.dstack((rgb, grey))).save(folder / "alpha.png")
    image.save(folder / "odd-names.jpeg?heads=2.webp", lossless=True)


def test_one_way_from_files_and_images_to_pixels(tmp_path: Path):
    """A path, its text, its bytes, PIL's image and an evaluation: bit for bit the same square."""
    odd_files(tmp_path)
    settings = TransformConfig(resize=20, crop=16)
    encoder = Encoder(EncoderConfig(model=MODEL, transform=settings))
    source = open_source(f"folder:{tmp_path}")
    cut = RowsCut(settings, MODEL.patch_size, ExtractConfig())
    assert len(source) == len(list(tmp_path.iterdir())) >= 14
    for index in range(len(source)):
        sample = source[index]
        path = tmp_path / sample.name
        evaluated = encoder.normalise(cut(sample, index).images)[0]
        with Image.open(path) as opened:
            for image in (path, str(path), path.read_bytes(), opened):
                assert torch.equal(encoder.transform(image), evaluated), (sample.name, type(image))
    turned = {encoder.transform(tmp_path / f"turned-{n}.jpg").numpy().tobytes() for n in range(1, 9)}
    assert len(turned) == 8


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path):
    encoder = Encoder(EncoderConfig(model=MODEL, transform=TransformConfig(resize=20, crop=16)))
    grey = np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert torch.equal(encoder.transform(tmp_path / "deep.png"), encoder.transform(grey))
    assert torch.equal(encoder.transform(grey.astype(np.uint16) * 257), encoder.transform(grey))


def test_a_range_as_in_data_strings(tmp_path: Path):
    """Trained with `range=`, encoded with `range=`: the same pixels; forgotten, it is said."""
    settings = TransformConfig(resize=20, crop=16)
    encoder = Encoder(EncoderConfig(model=MODEL, transform=settings))
    twelve = np.random.default_rng(0).integers(0, 4096, (24, 30)).astype(np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(twelve).save(path)
    for text in ("0-4095", "-100-3000", "container"):
        source = open_source(f"folder:{tmp_path}?range={text}")
        cut = RowsCut(settings, MODEL.patch_size, ExtractConfig())
        evaluated = encoder.normalise(cut(source[0], 0).images)[0]
        with Image.open(path) as opened:
            for image in (path, str(path), path.read_bytes(), twelve, opened):
                assert torch.equal(encoder.transform(image, range=text), evaluated), (text, type(image))
        assert torch.equal(encoder.transform(source[0].image), evaluated)
    for image in (path, path.read_bytes(), twelve):
        with pytest.warns(UserWarning, match="becomes dark: give the range of its values"):
            apart = (encoder.transform(image) - evaluated).abs().max()  # of the container, in 8 bits
        assert 0 < apart < 0.05
    plain = (twelve[:, :, None].repeat(3, 2) // 16).astype(np.uint8)
    apart = encoder.transform(plain, range="0-4095") - encoder.transform(plain)
    assert apart.abs().max() < 0.06  # noise, resized in 16 bits: 8 round and cut off between rows and columns
    assert apart.abs().mean() < 0.01
    floating = (twelve / 4095).astype(np.float32)
    assert torch.equal(encoder.transform(floating, range="0-1"), encoder.transform(twelve, range="0-4095"))
    with pytest.raises(UserError, match="range=0-4095: the data string of this image says how it is read"):
        encoder.transform(source[0].image, range="0-4095")
    with pytest.raises(UserError, match=r"range=9-3: expected a range such as 0-4095"):
        encoder.transform(twelve, range="9-3")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.jpg", r"missing\.jpg: No such file"),
        (b"", "a bytes: the file is empty"),
        (np.zeros((20, 20, 3), np.float32), "an ndarray is no image: expected a path, bytes, PIL or uint8"),
        (np.zeros((20, 20), np.float32), "an ndarray: floating-point .* have no known range"),
        (np.zeros((4, 20, 3), np.uint8), "an ndarray: 20x4 pixels is less than 8"),
        (torch.zeros(3, 20, 20), "a Tensor is no image"),
        (None, "None is no image"),
    ],
)
def test_what_is_no_image_is_said(image, message: str):
    encoder = Encoder(EncoderConfig(model=MODEL, transform=TransformConfig(resize=20, crop=16)))
    with pytest.raises(UserError, match=message):
        encoder.transform(image)
