"""Sheets of answers: scores by hand, which are worst and best, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.drawing.classes import palette
from foveola.figures.answers import answers_sheet, judged_images
from foveola.figures.visualize import visualize
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.shape import ViTConfig
from foveola.tasks.classification import ClassificationConfig, ClassificationHead
from foveola.tasks.task import Classes, Detections, LabelMap

SCENES = "scenes:?size=32&count=6&objects=1-3"


class Says(torch.nn.Module):
    """A head that gives answers that were written down."""

    def __init__(self, said: list) -> None:
        super().__init__()
        self.said, self.asked = said, 0
        self.config = type("Config", (), {"name": "classification", "several": False})

    def predict(self, encoder: Encoder, images: list) -> list:
        self.asked += len(images)
        return [self.said.pop(0) for _ in images]


@pytest.fixture
def encoder() -> Encoder:
    model = ViTConfig(width=12, depth=1, heads=2, patch_size=8, image_size=32)
    return Encoder(EncoderConfig(model, TransformConfig(32, 32)))


def test_a_classifier_is_scored_by_the_right_class(encoder: Encoder, tmp_path: Path):
    from tests.tasks.conftest import colored

    source = open_source(f"folder:{colored(tmp_path / 'colors', 1)}")  # blue, green, red
    rows = [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    again = [rows[1], rows[2], rows[0]]  # those that are shown are asked again, the worst first
    encoder.head = Says([Classes(("blue", "green", "red"), torch.tensor(row)) for row in rows + again])
    sheet = answers_sheet(encoder, source, range(3), worst=1, best=2)
    assert [row.title for row in sheet.rows] == ["worst", "best"]
    assert sheet.rows[0].captions == ["blue, not green (0.30)"]
    assert sheet.rows[1].captions == ["red (0.80)", "blue (0.70)"]
    assert [row.right for row in sheet.rows] == [[False], [True, True]]


def test_a_label_map_is_scored_by_its_labelled_pixels(encoder: Encoder):
    source = open_source(f"{SCENES}&background=class")
    truth = [source.label_map(i) for i in range(2)]
    wrong = truth[1].copy()
    wrong[:8] = (wrong[:8] + 1) % 2
    encoder.head = Says([LabelMap(source.classes, torch.from_numpy(each)) for each in (truth[0], wrong)])
    encoder.head.config = type("Config", (), {"name": "segmentation"})
    found = list(judged_images(encoder, source, range(2)))
    labelled = truth[1] != 255
    assert found[0].score == 1
    assert found[1].score == pytest.approx((wrong == truth[1])[labelled].mean())
    assert found[0].tiles[0].shape == found[0].tiles[1].shape == found[0].tiles[2].shape


def test_a_detector_is_scored_by_what_it_finds(encoder: Encoder):
    source = open_source(SCENES)
    objects = source[0].objects
    names, size = source.classes, 32
    boxes, labels = torch.from_numpy(objects.boxes) * size, torch.from_numpy(objects.labels)
    twice = torch.cat((boxes[:1], boxes[:1], boxes[:1] + 100)), labels[:1].repeat(3)
    said = Detections(names, *twice, torch.tensor([0.9, 0.8, 0.7]))
    unsure = Detections(names, boxes, labels, torch.full((len(boxes),), 0.4))
    encoder.head = Says([said, unsure])
    (first,), (second,) = (list(judged_images(encoder, source, [0])) for _ in range(2))
    assert first.score == pytest.approx(2 / (3 + len(boxes)))  # one hit
    assert second.score == 0


def test_a_head_for_several_classes_is_judged_by_all_of_them(encoder: Encoder):
    """Whatever else the images have: these have a label of their own as well."""
    source = open_source(SCENES)
    sample = source[0]
    assert sample.label is not None
    truth = sample.all_classes()
    scores = torch.tensor([0.9 if c in truth else 0.1 for c in range(len(source.classes))])
    missed = scores.clone()
    missed[min(truth)] = 0.2
    encoder.head = Says([Classes(source.classes, each) for each in (scores, missed)])
    encoder.head.config.several = True
    (first,), (second,) = (list(judged_images(encoder, source, [0])) for _ in range(2))
    assert first.score == 1
    assert second.score == pytest.approx(1 - 1 / len(source.classes))


def test_images_are_not_kept(encoder: Encoder):
    """A photo may have tens of megabytes: of 6 images, 2 are shown, and asked for again."""
    source = open_source(SCENES)
    row = Classes(source.classes, torch.arange(len(source.classes)) / 60)
    encoder.head = Says([row] * 8)
    answers_sheet(encoder, source, range(6), worst=1, best=1)
    assert encoder.head.asked == 8


def test_answers_that_nobody_knows_are_refused(encoder: Encoder):
    encoder.head = Says(["a poem"])
    with pytest.raises(UserError, match="cannot be judged here: a str"):
        list(judged_images(encoder, open_source(SCENES), [0]))


def test_colours_differ():
    colors = palette(60).astype(int)
    apart = np.abs(colors[:, None] - colors[None]).sum(axis=2)
    assert (apart[~np.eye(60, dtype=bool)] > 8).all()


def test_mistakes(encoder: Encoder, tmp_path: Path):
    with pytest.raises(UserError, match="no head"):
        visualize("answers", encoder, SCENES, out=tmp_path)
    encoder.head = ClassificationHead(ClassificationConfig(classes=("x",)), encoder.config.model)
    (tmp_path / "flat").mkdir()
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(UserError, match="none of 1 images"):
        visualize("answers", encoder, f"folder:{tmp_path}/flat", out=tmp_path)
    with pytest.raises(UserError, match="show nothing"):
        visualize("answers", encoder, SCENES, out=tmp_path, worst=0, best=0)
