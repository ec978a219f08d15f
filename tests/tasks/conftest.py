"""Labelled images that can be told apart at once, and the smallest run that learns to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ("blue", "green", "red")
SMALL: dict[str, Any] = {
    "device": "cpu",
    "batch_size": 6,
    "duration": "6 steps",
    "checkpoint_every": "2 steps",
    "log_every": 1,
    "keep": 10,
    "loader": {"workers": 0, "canvas": 32},
    "views": {"global_size": 32},
    "model": {"width": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32, "drop_path": 0.1},
}


def colored(folder: Path, each: int = 6, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """Noisy images of one colour, in a folder for each class."""
    rng = np.random.default_rng(seed)
    for channel, name in enumerate(reversed(classes)):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
            pixels[..., channel % 3] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The data string of 18 images of three classes."""
    return f"folder:{colored(tmp_path_factory.mktemp('colors') / 'train')}"


@pytest.fixture(scope="session")
def other_colors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Further images of the same classes."""
    return f"folder:{colored(tmp_path_factory.mktemp('others') / 'test', seed=1)}"


@pytest.fixture
def small() -> Callable[..., dict[str, Any]]:
    """Settings of the smallest fine-tuning, with some others."""

    def make(**others: Any) -> dict[str, Any]:
        return {**SMALL, **others}

    return make
