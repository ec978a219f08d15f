"""The page on images of other channels and depth: shown as people see them, read as the encoder does."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import foveola
from foveola.data.sources import open_source
from foveola.explorer.session import Session
from foveola.explorer.sides import ExploreConfig, sides_of
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

SIDE, COUNT = 32, 6


def test_boxes_and_layers_are_of_the_true_pixels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(COUNT):
        np.save(tmp_path / f"{number}.npy", random.integers(0, 4096, (SIDE, SIDE, 5), np.uint16))
    torch.manual_seed(0)
    model = ViTConfig(width=16, depth=2, heads=2, patch_size=8, image_size=SIDE, channels=5)
    transform = TransformConfig(
        resize=SIDE, crop=SIDE, mean=(0.5,) * 5, std=(0.3,) * 5, range="0-4095", channels="5", show="pca"
    )
    encoder = Encoder(EncoderConfig(model=model, transform=transform))
    config: dict[str, Any] = {"batch_size": 4, "workers": 0, "patches": COUNT}
    sides, source = sides_of(
        [encoder], f"folder:{tmp_path}", config, ExploreConfig(**config), cache=tmp_path / "c", progress=False
    )
    session = Session(sides, source, "pca")
    box = [0.25, 0.25, 0.75, 1.0]
    for masked in (True, False):
        (answer,) = session.ask({"image": 1, "box": box, "masked": masked})
        assert len(answer["hits"]) == COUNT - 1, answer
    (answer,) = session.ask({"image": 1, "point": [0.4, 0.6], "find": "patches"})
    assert answer["hits"], answer
    # As foveola.search has it, of the file itself.
    index = sides[0].indices["images"]
    corners = tuple(SIDE * edge for edge in box)
    found = foveola.search(index, tmp_path / "1.npy", box=corners, model=encoder, top=COUNT)
    wanted = {hit["name"]: hit["similarity"] for hit in found.hits[0] if hit["name"] != "1.npy"}
    (answer,) = session.ask({"image": 1, "box": box})
    assert {hit["name"]: hit["similarity"] for hit in answer["hits"]} == {
        name: round(value, 6) for name, value in wanted.items()
    }
    # Another choice of what is shown changes what layers lie on, and nothing that the encoder reads.
    other = Session(sides, open_source(f"folder:{tmp_path}?channels=5&range=0-4095"))
    assert session.image(0) != other.image(0)
    for what in ("pca", "attention", "reads", "similarity"):
        made, else_ = (each.layer(0, 2, what, (0.3, 0.7), 0) for each in (session, other))
        assert made["image"].startswith("data:image/png;base64,")
        assert (made["image"] == else_["image"]) is (what in ("pca", "similarity")), what
        assert made["note"] == else_["note"]
