"""`discovery`: a proposer whose answers are known, squares by hand, and what compare makes of two results."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from foveola.config import ConfigError, UserError
from foveola.data.sample import Objects, Sample
from foveola.evaluation.compare import compare
from foveola.evaluation.detection import discovery
from foveola.evaluation.evaluate import evaluate
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.proposals.proposal import Proposals

SIDE = 40
RIGHT = ((8, 8, 32, 32), (0, 20, 10, 40), (0, 0, 40, 40), (4, 4, 12, 12))  # the first object of each image


def pixels(number: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 50 * number, np.uint8)  # which tells the fake which image it is


def masked(box: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def objects_of(*boxes: tuple[int, ...]) -> Objects:
    corners = np.array(boxes, np.float32) / SIDE
    found = Objects.from_boxes(corners, masks=[masked(box) for box in boxes])
    assert found is not None
    return found


@dataclass
class Fake:
    """Finds the first object of the first `good` images, nothing in the last one, and a corner elsewhere."""

    good: int
    classes = ("object",)
    batch_size = 3

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake", "good": self.good}

    def propose(self, images: Any, /) -> list[Proposals]:
        assert len(images) <= 3
        found = []
        for image in images:
            number = int(image[0, 0, 0]) // 50
            boxes = [RIGHT[number]] if number < self.good else [(30, 0, 40, 10)]
            boxes = [] if number == 4 else boxes
            masks = np.array([masked(box) for box in boxes], bool).reshape(len(boxes), SIDE, SIDE)
            some = np.array(boxes, np.float32).reshape(-1, 4)
            scores = np.linspace(1, 0.5, len(boxes), dtype=np.float32)
            found.append(Proposals(some, scores, np.zeros(len(boxes), np.int64), masks))
        return found


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config = ViTConfig(width=32, depth=1, heads=2, patch_size=8, image_size=16)
    return Encoder(EncoderConfig(model=config, transform=TransformConfig(resize=16, crop=16)))


@pytest.fixture
def source(list_source):
    """Four images with an object, of which the second has another one, and one with a crowd alone."""
    every = [objects_of(box) for box in RIGHT]
    every[1] = objects_of(RIGHT[1], (30, 30, 40, 40))
    samples = [Sample(pixels(k), f"{k}.png", found) for k, found in enumerate(every)]
    return list_source([*samples, Sample(pixels(4), "4.png", None, crowds=objects_of((0, 0, 40, 40)))])


def measure(encoder: Encoder, source: Any, monkeypatch: pytest.MonkeyPatch, good: int, **more: Any) -> Any:
    monkeypatch.setattr(discovery, "discoverer", lambda *_: Fake(good))
    return evaluate(encoder, "discovery", test=source, progress=False, workers=0, **more)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_numbers_by_hand(encoder, source, monkeypatch, batch):
    found = measure(encoder, source, monkeypatch, 3, discover={"batch_size": batch})
    metrics = found.metrics
    for kind in ("box", "mask"):
        assert metrics[f"{kind}_corloc"] == 75
        assert metrics[f"{kind}_precision"] == 75
        assert metrics[f"{kind}_recall"] == pytest.approx(100 * 3 / 5)
        assert metrics[f"{kind}_ar1"] == pytest.approx(100 * 3 / 5)
    assert metrics["images_without"] == 20
    assert metrics["full_image_corloc"] == 25  # the third image alone
    # The side 24/40 = 0.6 of image 0 and all of image 2: a side of 34/40 has an IoU of 24^2/34^2 = 0.498 and
    # of 34^2/40^2 = 0.72. The least side that finds both is above 40 / sqrt(2) = 28.3.
    assert metrics["centred_box_corloc"] == 50
    side = found.chosen["centred_box"]["side"]
    assert 28.2 < 40 * side < 34
    facts = found.data["test"]
    assert (facts["rows"], facts["with_objects"], facts["objects"], facts["crowds"]) == (5, 4, 5, 1)
    assert facts["proposals"] == 4
    assert found.data["proposer"] == {"kind": "fake", "good": 3}
    kept = found.beside["proposals.json"]
    assert [each["bbox"] for each in kept] == [
        [8, 8, 24, 24],
        [0, 20, 10, 20],
        [0, 0, 40, 40],
        [30, 0, 10, 10],
    ]
    assert any("1 images have no annotated object" in note for note in found.notes)


def test_compare_reads_rows(encoder, source, monkeypatch, tmp_path):
    for good, batch in ((3, 3), (1, 1)):
        settings = {"discover": {"batch_size": batch}, "out": tmp_path / str(good)}
        measure(encoder, source, monkeypatch, good, **settings)
    (both,) = compare([tmp_path / "3", tmp_path / "1"])
    line = next(line for line in both.table().splitlines() if line.startswith("box_corloc"))
    assert "75.00" in line
    assert "25.00" in line
    assert "-50.00 [" in line
    alike = next(line for line in both.table().splitlines() if line.startswith("centred_box_corloc"))
    assert "0 [alike]" in alike


def test_refusals(encoder, source, monkeypatch, list_source):
    with pytest.raises(UserError, match=r"has no objects, which discovery needs"):
        measure(encoder, list_source([Sample(pixels(0), "0.png")]), monkeypatch, 1)
    crowds = list_source(
        [Sample(pixels(4), "4.png", crowds=objects_of((0, 0, 9, 9))), source[0]], classes=("a",)
    )
    with pytest.raises(UserError, match=r"has no object in 1 images"):
        measure(encoder, crowds, monkeypatch, 1, limit=1, seed=seed_of_first(len(crowds)))
    with pytest.raises(ConfigError, match=r"discover.k has no effect: it is for method=lost"):
        measure(encoder, source, monkeypatch, 1, discover={"k": 3})


def seed_of_first(count: int) -> int:
    """A seed by which the first image is drawn."""
    return next(seed for seed in range(99) if np.random.default_rng(seed).choice(count, 1)[0] == 0)


def test_what_features_find(encoder):
    """The whole way on built-in images: numbers are there, the same again, and of the limit alone."""
    settings = {"discover": {"image_size": 48, "method": "attention"}, "limit": 6, "resamples": 20}
    first, again = (
        evaluate(encoder, "discovery", test="scenes:?size=48&count=12", progress=False, workers=0, **settings)
        for _ in range(2)
    )
    assert first.metrics == again.metrics
    assert first.data["test"]["rows"] == 6
    assert first.metrics["box_best_iou"] > 0
    assert torch.tensor(list(first.metrics.values())).isfinite().all()
    assert first.settings["discover"]["method"] == "attention"
    assert "batch_size" not in first.settings["discover"]
