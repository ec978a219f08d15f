"""The numbers of every protocol and analysis for one small encoder with fixed weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.evaluation.attention.analysis import analyze_attention
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.protocol import PROTOCOLS, find_protocol
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

SCENES = "scenes:?size=48&count=120"
OBJECTS = {"rows": "objects", "view": "object"}
SETTINGS: dict[str, dict[str, Any]] = {
    "knn": {"k": (5, 10)},
    "linear": {"epochs": 5, "lr": (1e-3, 1e-2)},
    "logistic": {"c": (1e-2, 1.0)},
    "attentive": {"epochs": 3, "heads": (None, 2), "lr": (1e-3,)},
    "abmilp": {"epochs": 3, "warmup": 1},
    "probes": {"epochs": 2, "values": 2, "k": (5,)},
    "retrieval": {"objects": 60},
    "label_free": {},
    "localisation": {},
    "discovery": {"discover": {"image_size": 96, "tau": 0.98, "objects": 2}, "limit": 24, "resamples": 20},
}
PIXELS: dict[str, dict[str, Any]] = {
    "dense_retrieval": {"k": (3, 5), "memory": 300, "subsample": (1, 2)},
    "knn_segmentation": {"k": (1, 3)},
    "logistic_segmentation": {"c": (1e-3, 1.0)},
    "linear_segmentation": {"rates": (1e-3, 1e-2), "steps": 40, "train_batch": 4},
}
HEADS = {"classify", "detect", "segment"}  # measured where heads are tested: tests/tasks/


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """A ViT of 3 blocks whose weights are drawn by NumPy, so that no library's start changes them."""
    config = EncoderConfig(
        model=ViTConfig(width=32, depth=3, heads=2, patch_size=8, image_size=48),
        transform=TransformConfig(resize=56, crop=48),
    )
    made = Encoder(config)
    rng = np.random.default_rng(0)
    for _, weight in sorted(made.backbone.state_dict().items()):
        values = rng.normal(0, 0.2 if weight.ndim > 1 else 0.02, weight.shape)
        weight.copy_(torch.from_numpy(values + (weight.ndim == 1)))
    return made


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """CamVid's layout with areas of noisy colour, which is the class; the right edge is void."""
    folder: Path = tmp_path_factory.mktemp("camvid")
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 6)):
        for part in ("images", "labels"):
            (folder / split / part).mkdir(parents=True)
        for number in range(count):
            classes = np.repeat(np.repeat(rng.integers(0, 3, (4, 4)), 12, 0), 16, 1)
            image = np.clip(colours[classes] + rng.normal(0, 60, (*classes.shape, 3)), 0, 255)
            classes[:, -6:] = 11
            Image.fromarray(image.astype(np.uint8)).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(classes.astype(np.uint8)).save(folder / split / "labels" / f"{number}.png")
    return f"camvid:{folder}"


def test_every_protocol_is_here():
    assert PROTOCOLS.keys() == SETTINGS.keys() | PIXELS.keys() | HEADS


@pytest.mark.parametrize("name", [*SETTINGS, *PIXELS])
def test_metrics(name: str, encoder: Encoder, camvid: str, golden: Callable):
    settings = (SETTINGS | PIXELS)[name]
    data = SCENES
    if name in PIXELS:
        data = camvid
    elif "rows" in find_protocol(name).Config.__dataclass_fields__:
        settings = OBJECTS | settings
    train = data if find_protocol(name).train == "needed" else None
    found = evaluate(encoder, name, train=train, test=data, progress=False, workers=0, **settings)
    for metric in found.names():
        assert found.metric(metric) in find_protocol(name).metrics, f"{metric} is not declared"
    # Of pixels between two classes a few change sides with the rounding of another torch: 8e-4 of a mean IoU.
    relative = 2e-3 if name == "dense_retrieval" else 1e-5
    golden(f"protocol-{name}", {"metrics": found.metrics, "chosen": found.chosen}, relative=relative)


def test_attention_statistics(encoder: Encoder, golden: Callable, tmp_path: Path):
    analyze_attention({"small": encoder}, SCENES, out=tmp_path, limit=12, workers=0, progress=False)
    (file,) = tmp_path.rglob("*.json")
    tree = json.loads(file.read_text())
    (found,) = tree["encoders"]
    golden("attention", {key: found[key] for key in ("grid", "heads", "registers", "statistics")})
