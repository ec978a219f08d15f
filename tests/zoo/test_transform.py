"""Preprocessing of other libraries: both sides resized alike, bilinear; the same in evaluations."""

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import ConfigError, build
from foveola.evaluation.rows import picture_crop, resize
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

MODEL = ViTConfig(width=24, depth=1, heads=3, patch_size=4, image_size=16)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("squash", "resized"), [(True, 16), (True, 20), (False, 20)])
def test_pictures_as_pil_makes_them(interpolation, squash: bool, resized: int):
    settings = TransformConfig(resize=resized, crop=16, interpolation=interpolation, squash=squash)
    encoder = Encoder(EncoderConfig(model=MODEL, transform=settings))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    size = (resized, resized) if squash else (2 * resized, resized)
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    whole = np.asarray(Image.fromarray(pixels).resize(size, kernel))
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    cut = torch.from_numpy(whole[top : top + 16, left : left + 16].copy()).permute(2, 0, 1)
    assert torch.equal(encoder.transform(pixels), encoder.normalise(cut[None])[0])

    (rows, columns), (upper, start) = picture_crop(30, 60, settings)
    assert ((columns, rows), (start, upper)) == (size, (left, top))
    evaluated = resize(pixels, rows, columns, interpolation)[:, upper : upper + 16, start : start + 16]
    assert (evaluated.int() - cut.int()).abs().max() <= 1


def test_other_kernels_are_refused():
    with pytest.raises(ConfigError, match="lanczos"):
        build(TransformConfig, {"interpolation": "lanczos"})
