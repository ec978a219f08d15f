"""Figures of detections: agreement by hand, which images are shown, and what is drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import UserError
from foveola.data.scenes import Scenes
from foveola.drawing.boxes import DrawnObjects, color_of, paint_objects
from foveola.figures.detections import agreement
from foveola.figures.visualize import draw, visualize
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.shape import ViTConfig
from foveola.tasks.detection import DetectionConfig, DetectionHead
from foveola.tasks.task import Detections

SCENES = Scenes("test", size=48, count=12)


def drawn(*boxes: tuple[str, float, float, float, float]) -> DrawnObjects:
    return DrawnObjects(np.array([b[1:] for b in boxes], float).reshape(-1, 4), tuple(b[0] for b in boxes))


def test_agreement_by_hand() -> None:
    """Two of three are found, one of them twice; one has a wrong class, one is beside: 2 x 2 / (5 + 3)."""
    truth = drawn(("a", 0, 0, 10, 10), ("b", 20, 0, 30, 10), ("b", 40, 0, 50, 10))
    found = drawn(
        ("a", 0, 0, 10, 9),
        ("a", 1, 0, 10, 10),
        ("b", 20, 0, 30, 5),
        ("a", 40, 0, 50, 10),
        ("b", 46, 0, 56, 10),
    )
    assert agreement(found, truth) == 4 / 8
    assert agreement(truth, truth) == agreement(drawn(), drawn()) == 1
    assert agreement(drawn(), truth) == agreement(found, drawn()) == 0


def test_boxes_and_masks_are_drawn_in_the_colour_of_their_class() -> None:
    image, mask = np.full((40, 80, 3), 100, np.uint8), np.zeros((40, 80), bool)
    mask[20:30, 10:20] = True
    objects = DrawnObjects(np.array([[8.0, 18, 30, 38]]), ("cat",), [mask])
    found = paint_objects(image, objects)
    assert found.shape == (160, 320, 3)  # four times as large
    color = np.array(color_of("cat"))
    assert (found[18 * 4 + 40, 8 * 4] == color).all()
    assert (found[38 * 4 - 1, 80] == color).all()
    assert np.abs(found[25 * 4, 15 * 4].astype(float) - (0.6 * 100 + 0.4 * color)).max() <= 1
    assert (found[25 * 4, 25 * 4] == 100).all()
    assert (found[:, 32 * 4 :] == 100).all()


class Knowing(DetectionHead):
    """Finds the first object of an image, but of every third image none."""

    def predict(self, encoder: Encoder, images) -> list[Detections]:
        """Return the truth of scenes by their pixels."""
        answers = []
        for image in images:
            number = next(i for i in range(12) if np.array_equal(SCENES[i].image, image))
            objects = SCENES[number].objects
            kept = [] if number % 3 == 0 else list(range(len(objects)))
            boxes = torch.from_numpy(objects.boxes[kept] * 48).float().view(-1, 4)
            labels = torch.from_numpy(objects.labels[kept])
            answers.append(Detections(self.classes, boxes, labels, torch.full((len(kept),), 0.9)))
        return answers


def knowing() -> Encoder:
    model = ViTConfig(width=24, depth=1, heads=1, patch_size=16, image_size=64)
    encoder = Encoder(EncoderConfig(model, TransformConfig(64, 64)))
    config = DetectionConfig(classes=Scenes.classes, masks=False, channels=4, hidden=4, convolutions=0)
    encoder.head = Knowing(config, model)
    return encoder


def test_worst_and_best_images() -> None:
    worst = draw("detections", knowing(), SCENES, order="worst", among=12, count=4)
    assert [row.title for row in worst.rows] == [f"{k}: scenes/test/{k}" for k in (0, 3, 6, 9)]
    assert {row.captions[1] for row in worst.rows} == {"agreement 0%"}
    best = draw("detections", knowing(), SCENES, order="best", among=12, count=3)
    assert [row.title.split(":")[0] for row in best.rows] == ["1", "2", "4"]
    assert {row.captions[1] for row in best.rows} == {"agreement 100%"}
    assert best.rows[0].captions[0] == f"{len(SCENES[1].objects)} annotated"
    strict = draw("detections", knowing(), SCENES, images=[1], score=0.95)
    assert strict.rows[0].captions[1] == "agreement 0%"


def test_a_file_and_mistakes(tmp_path: Path) -> None:
    (path,) = visualize("detections", knowing(), SCENES, count=2, cell=64, out=tmp_path)
    with Image.open(path) as image:
        assert image.size[0] > 2 * 64
    plain = Encoder(EncoderConfig(ViTConfig(width=24, depth=1, heads=1), TransformConfig(224, 224)))
    with pytest.raises(UserError, match="no head"):
        draw("detections", plain, SCENES)
    with pytest.raises(UserError, match="order=worst chooses images"):
        draw("detections", knowing(), SCENES, order="worst", images=[1])
