"""Image files with classes and boxes, and an encoder on them that is small enough for every test."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

COUNT = 20


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> str:
    """A data string: 20 images of two classes, 48 x 40 pixels, noise with bright boxes, one to three each."""
    folder, lines = tmp_path_factory.mktemp("photos"), ["name,x0,y0,x1,y1,label"]
    for i in range(COUNT):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        name = f"{('cats', 'dogs')[i % 2]}/{i:02d}.png"
        for j in range(1 + i % 3):
            x0, y0 = 6 + 12 * j, 4 + int(rng.integers(0, 16))
            pixels[y0 : y0 + 14, x0 : x0 + 10] = rng.integers(0, 256, 3)
            lines.append(f"{name},{x0},{y0},{x0 + 10},{y0 + 14},{('eye', 'ear')[j % 2]}")
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    table = tmp_path_factory.mktemp("boxes") / "boxes.csv"
    table.write_text("\n".join(lines) + "\n")
    return f"folder:{folder}?boxes={table}"


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """An encoder folder: 4 x 4 patches of 32-pixel crops."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Encoder(
            EncoderConfig(
                model=ViTConfig(width=24, depth=3, heads=2, patch_size=8, image_size=32),
                transform=TransformConfig(resize=36, crop=32),
            )
        )
        for block in made.backbone.blocks:  # larger weights than at the start: masks must matter
            block.attn.qkv.weight.mul_(8)
    return made.save(tmp_path_factory.mktemp("model"))
