"""Sources and encoders small enough to compute by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from foveola.data.sample import BadImage, Objects, Sample
from foveola.evaluation.paired import unpacked
from foveola.evaluation.protocol import declared
from foveola.evaluation.segmentation.iou import mean_iou
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig


@dataclass
class ListSource:
    """Samples given one by one."""

    samples: list[Sample]
    name: str = "list:"
    classes: tuple[str, ...] | None = None

    @property
    def has_objects(self) -> bool:
        return any(sample.objects is not None for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@dataclass
class PixelListSource:
    """Images [H, W, 3] and maps of classes [H, W], given one by one."""

    images: list
    maps: list
    classes: tuple[str, ...] = ("a", "b", "c")
    name: str = "maps:"
    has_objects: bool = False
    notes: tuple[str, ...] = ()
    broken: frozenset = frozenset()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise BadImage("damaged")
        return Sample(self.images[index], f"image-{index}")

    def label_map(self, index: int) -> np.ndarray:
        return self.maps[index]


@pytest.fixture
def pixel_source() -> type[PixelListSource]:
    return PixelListSource


@pytest.fixture
def list_source() -> type[ListSource]:
    return ListSource


@pytest.fixture
def check_scores() -> Callable[..., None]:
    """check_scores(result, metrics): every share with an interval has the score of each row, of which it is
    the mean; `metrics` are what the protocol declares, which a `Result` knows itself."""

    def check(result: Any, metrics: Any = None) -> None:
        about = result.declarations if metrics is None else metrics
        shares = [
            n for n in result.metrics if declared(about, "", n).compared and f"{n}_low" in result.metrics
        ]
        assert shares
        for name in shares:
            values, _ = unpacked(result.scores[name])
            if result.scores[name]["kind"] == "areas":
                mean = np.mean([mean_iou(run.sum(dim=0).numpy()) for run in values])
            else:
                mean = 100 * values.double().mean().item()
            assert mean == pytest.approx(result.metrics[name], abs=1e-4), name
            assert result.metrics[f"{name}_low"] < result.metrics[f"{name}_high"], name

    return check


@pytest.fixture
def encoder() -> Encoder:
    """A small random ViT on 32-pixel crops of images whose shorter side is made 40: 4 x 4 patches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Encoder(
            EncoderConfig(
                model=ViTConfig(width=32, depth=3, heads=2, patch_size=8, image_size=32),
                transform=TransformConfig(resize=40, crop=32),
            )
        )
        for block in made.backbone.blocks:  # larger weights than at the start: masks must matter
            block.attn.qkv.weight.mul_(8)
    return made


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """make_sample(seed, boxes, height, width): noise, and boxes in pixels."""

    def make(
        seed: int,
        boxes: list[tuple[float, float, float, float]] | None = None,
        height: int = 60,
        width: int = 80,
        label: int | None = None,
        labels: list[int] | None = None,
    ) -> Sample:
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        objects = None
        if boxes is not None:
            unit = np.array(boxes, np.float32) / np.array([width, height, width, height], np.float32)
            objects = Objects(
                boxes=unit,
                areas=(unit[:, 2:] - unit[:, :2]).prod(axis=1),
                labels=None if labels is None else np.array(labels, np.int64),
            )
        return Sample(image=image, name=f"image-{seed}", objects=objects, label=label)

    return make


@pytest.fixture
def shades(list_source, make_sample) -> Callable[..., Any]:
    """shades(first, count): noise with a box of one brightness; its class is the brightness."""

    def make(first: int, count: int, **kwargs):
        samples = []
        for i in range(first, first + count):
            sample = make_sample(i, [(24, 14, 56, 46)], label=i % 3)
            image = np.asarray(sample.image).copy()
            image[8:52, 16:64] = 20 + 112 * (i % 3)
            samples.append(Sample(image, sample.name, sample.objects, i % 3))
        return list_source(samples, name=f"shades{first}:", **kwargs)

    return make
