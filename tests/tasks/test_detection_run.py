"""Runs that learn to detect, from scenes to numbers: learning, measuring, going on, and mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.evaluation.detection.average_precision import SUMMARY
from foveola.evaluation.evaluate import evaluate
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.shape import ViTConfig
from foveola.models.vit import VisionTransformer
from foveola.schedules import Progress
from foveola.tasks.detection import DetectionConfig, DetectionHead
from foveola.tasks.task import Detections
from foveola.training import checkpoint
from foveola.training.finetune import finetune
from foveola.training.planned import without_details
from foveola.training.recipe import resolve
from foveola.zoo.load import load

SCENES = "scenes:?size=64&count=2&objects=2-3"
QUICK: dict[str, Any] = {
    "device": "cpu",
    "batch_size": 2,
    "checkpoint_every": "2 steps",
    "log_every": 1,
    "keep": 10,
    "loader": {"workers": 0},
    "model": {"depth": 2},
    "method": {"channels": 32, "hidden": 64, "proposals": 32},
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sees two scenes, always the same way, until it knows them."""
    always = {"rescale": {"range": [1.0, 1.0]}, "flip": 0.0}
    settings = QUICK | {
        "data": SCENES,
        "duration": "60 steps",
        "checkpoint_every": "60 steps",
        "views": always,
    }
    settings["optimizer"] = {"lr": {"value": 4.0e-3}}
    out = tmp_path_factory.mktemp("detect") / "run"
    return finetune("vitdet-small", out=str(out), **settings).folder


def test_it_learns_what_it_sees(learned: Path) -> None:
    source = open_source(SCENES, "train")
    result = evaluate(learned, "detect", test=source, workers=0, progress=False, resamples=20)
    assert result.metrics["box_ap50"] > 95
    assert result.metrics["mask_ap50"] > 95
    low, high = result.interval("box_ap")
    assert low <= result.metrics["box_ap"] <= high
    assert result.data["test"]["objects"] == sum(len(source[i].objects) for i in range(2))
    shown = without_details([name for name in result.names() if result.metric(name).compared])
    assert {"box_ap", "mask_ap", "box_ap50", "box_ar1"} <= set(shown)
    assert not any("class" in name for name in shown)  # in the log of a run: COCO has 80
    lines = result.table()
    assert "mask AP" in lines
    assert all(
        name in lines for name in {source.classes[k] for i in range(2) for k in source[i].objects.labels}
    )
    kept = json.loads((learned / "results" / "detect" / "detections.json").read_text())
    assert kept == result.beside["detections.json"]
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == kept[0].keys()


def test_a_kept_detector_answers(learned: Path) -> None:
    sample = open_source(SCENES, "train")[0]
    found = load(learned).predict(sample.image)
    assert isinstance(found, Detections)
    truth = sample.objects.boxes * 64
    best = found.boxes[0].numpy()
    inner = np.minimum(best[2:], truth[:, 2:]) - np.maximum(best[:2], truth[:, :2])
    shared = inner.clip(0).prod(1)
    union = (best[2:] - best[:2]).prod() + (truth[:, 2:] - truth[:, :2]).prod(1) - shared
    match = int((shared / union).argmax())
    assert (shared / union)[match] > 0.5
    assert found.names[found.labels[0]] == open_source(SCENES).classes[sample.objects.labels[match]]
    covered, mask = sample.objects.masks[match], found.masks[0].numpy()
    assert (covered & mask).sum() / (covered | mask).sum() > 0.5


def test_an_interrupted_run_ends_as_if_it_never_was(tmp_path: Path) -> None:
    settings = QUICK | {"data": SCENES, "duration": "4 steps", "model": {"depth": 2, "drop_path": 0.2}}

    class Stop:
        def on_checkpoint(self, step: int, folder: Path) -> None:
            if step == 2:
                raise UserError("enough")

    finetune("vitdet-small", out=str(tmp_path / "whole"), **settings)
    with pytest.raises(UserError, match="enough"):
        finetune("vitdet-small", out=str(tmp_path / "cut"), callbacks=[Stop()], **settings)
    finetune("vitdet-small", out=str(tmp_path / "cut"), **settings)
    whole, cut = (
        checkpoint.read_checkpoint(tmp_path / name / "checkpoints" / "step-00000004")["trainer"]["method"]
        for name in ("whole", "cut")
    )
    drawn = [
        (tmp_path / name / "figures" / "detections-00000004.png").read_bytes() for name in ("whole", "cut")
    ]
    assert drawn[0] == drawn[1]
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Six images with boxes, polygons, RLE and crowds; ids as odd as COCO's."""
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    images, annotations = [], []
    for k in range(6):
        height, width = int(rng.integers(60, 140)), int(rng.integers(60, 140))
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / f"{k}.png")
        images.append({"id": 1000 - 7 * k, "file_name": f"{k}.png", "width": width, "height": height})
        for _ in range(k):
            x, y = round(rng.uniform(0, width - 20), 2), round(rng.uniform(0, height - 20), 2)
            w, h = round(rng.uniform(8, width - x), 2), round(rng.uniform(8, height - y), 2)
            ring = [x, y, x + w, y, x + w, y + h, x + w / 3, y + h]
            crowd = rng.random() < 0.25
            mask: Any = [ring]
            if crowd:
                whole = np.zeros(height * width, np.uint8)
                whole[: len(whole) // 3] = 1
                ends = np.flatnonzero(np.diff(whole)) + 1
                mask = {"size": [height, width], "counts": np.diff([0, 0, *ends, len(whole)]).tolist()}
            category = int(rng.choice([3, 18, 44]))
            annotations.append(
                {"id": len(annotations) + 5, "image_id": images[-1]["id"], "category_id": category,
                 "bbox": [x, y, w, h], "area": w * h * 2 / 3, "iscrowd": int(crowd), "segmentation": mask}
            )  # fmt: skip
    names = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 44, "name": "bottle"}]
    tree = {"images": images, "annotations": annotations, "categories": names}
    (folder / "truth.json").write_text(json.dumps(tree))
    return f"coco:{folder}?annotations={folder / 'truth.json'}", tree


class Guessing(DetectionHead):
    """Answers near the truth, of images that it knows by their size."""

    known: dict[tuple[int, int], list[tuple[list[float], str]]]

    def predict(self, encoder: Encoder, images: Any) -> list[Detections]:
        """Return boxes moved by some pixels, and their inner half as masks."""
        answers = []
        for image in images:
            rng, size = np.random.default_rng(0), image.shape[:2]
            boxes, labels, masks, scores = [], [], [], []
            for k, ((x, y, w, h), name) in enumerate(self.known.get(size, [])):
                move = rng.normal(0, 2, 4)
                if name not in self.classes:
                    continue
                scores.append(0.9 - 0.1 * k)
                box = np.array([x, y, x + w, y + h]) + move
                boxes.append(box.clip(0, (size[1], size[0], size[1], size[0])))
                labels.append(self.classes.index(name))
                mask = torch.zeros(size, dtype=torch.bool)
                mask[round(y) : round(y + h), round(x) : round(x + w)] = True
                masks.append(mask)
            count = len(boxes)
            answers.append(
                Detections(
                    self.classes,
                    torch.tensor(np.array(boxes)).float().view(-1, 4),
                    torch.tensor(labels, dtype=torch.int64),
                    torch.tensor(scores, dtype=torch.float32),
                    torch.stack(masks) if count else torch.zeros(0, *size, dtype=torch.bool),
                )
            )
        return answers


def guessing(tree: dict, classes: tuple[str, ...]) -> Encoder:
    model = ViTConfig(width=24, depth=1, heads=1, patch_size=16, image_size=64)
    config = DetectionConfig(classes=classes, masks=True, channels=4, hidden=4, convolutions=0)
    encoder = Encoder(EncoderConfig(model, TransformConfig(64, 64)), VisionTransformer(model))
    head = Guessing(config, model)
    names = {category["id"]: category["name"] for category in tree["categories"]}
    head.known = {
        (image["height"], image["width"]): [
            (each["bbox"], names[each["category_id"]])
            for each in tree["annotations"]
            if each["image_id"] == image["id"]
        ]
        for image in tree["images"]
    }
    encoder.head = head
    return encoder


@pytest.mark.parametrize("classes", [("bottle", "car", "dog"), ("dog", "car", "unicorn", "bottle")])
def test_numbers_are_those_of_pycocotools_on_the_files(coco, classes, tmp_path) -> None:
    """Whatever the order of the classes of the head, and with ids that are no indices."""
    data, tree = coco
    result = evaluate(
        guessing(tree, classes), "detect", test=data, out=tmp_path, workers=0, progress=False, resamples=0
    )
    written = tmp_path / "results" / "detect" / "detections.json"
    results = json.loads(written.read_text())
    assert {each["category_id"] for each in results} == {3, 18, 44}
    true = COCO(data.split("annotations=")[1])
    for kind, named, left in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        own = [{k: v for k, v in each.items() if k != left} for each in results]
        measured = COCOeval(true, true.loadRes(own), named)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
        for name, value in zip(SUMMARY, measured.stats.tolist(), strict=True):
            if value > -1:
                assert result.metrics[f"{kind}_{name}"] == pytest.approx(100 * value, abs=1e-9)
        assert 5 < result.metrics[f"{kind}_ap"] < 95
    facts = result.data["test"]
    assert facts["crowds"] == sum(each["iscrowd"] for each in tree["annotations"]) > 0
    assert facts["rows"] == 6
    assert any("1 classes that test lacks" in note for note in result.notes) == ("unicorn" in classes)


def test_objects_of_unknown_classes_are_missed(coco) -> None:
    data, tree = coco
    both = evaluate(guessing(tree, ("bottle", "car", "dog")), "detect", test=data, workers=0, progress=False)
    less = evaluate(guessing(tree, ("car", "dog")), "detect", test=data, workers=0, progress=False)
    assert less.metrics["box_ap_class_bottle"] == 0
    assert less.metrics["box_ap_class_car"] == both.metrics["box_ap_class_car"]
    expected = np.mean([less.metrics[f"box_ap_class_{name}"] for name in ("bottle", "car", "dog")])
    assert less.metrics["box_ap"] == pytest.approx(expected)
    assert any("1 of 3 classes" in note and "bottle" in note for note in less.notes)
    with pytest.raises(UserError, match="has none of the classes"):
        evaluate(guessing(tree, ("cat",)), "detect", test=data, workers=0, progress=False)


RANKS = """
import sys, torch
from foveola import distributed
distributed.start("cpu")
from foveola.evaluation.evaluate import evaluate
from foveola.data.sources import open_source
result = evaluate(sys.argv[1], "detect", test=open_source(sys.argv[2], "train"), workers=0, progress=False,
                  resamples=5, out=sys.argv[3], device="cpu")
print(sorted(result.metrics.items()), len(result.beside["detections.json"]))
distributed.stop()
"""


def test_several_processes_find_what_one_finds(learned: Path, run_ranks, tmp_path: Path) -> None:
    result = evaluate(
        learned, "detect", test=open_source(SCENES, "train"), workers=0, progress=False, resamples=5,
        out=tmp_path / "one", device="cpu",
    )  # fmt: skip
    expected = f"{sorted(result.metrics.items())} {len(result.beside['detections.json'])}\n"
    assert run_ranks(RANKS, ranks=2, words=[str(learned), SCENES, str(tmp_path / "two")]) == [expected] * 2


# -- mistakes and recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": "folder"}, "has no objects"),
        ({"data": "boxes", "method": {"masks": True}}, "method.masks=true: the objects of .* are boxes"),
        ({"views": {"global_count": 2}}, "views.global_count=1"),
        ({"views": {"global_size": 72}}, "views.global_size=72 is not a multiple of 32"),
        ({"method": {"classes": ["a"]}}, "leave it out"),
        ({"model": {"window": 4, "global_blocks": 3}}, "global_blocks=3 of depth=2"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    settings = QUICK | {"data": SCENES, "duration": "2 steps"} | change
    for name in ("method", "model"):
        settings[name] = QUICK[name] | change.get(name, {})
    if settings["data"] in ("folder", "boxes"):
        settings["data"] = f"folder:{with_boxes(tmp_path / 'images', settings['data'] == 'boxes')}"
    with pytest.raises(UserError, match=error) as caught:
        finetune("vitdet-small", out=str(tmp_path / "run"), **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def with_boxes(folder: Path, boxes: bool) -> str:
    """Two classes of images, with a table of boxes where asked for."""
    lines = []
    for name in ("left", "right"):
        (folder / name).mkdir(parents=True)
        for k in range(3):
            pixels = np.full((48, 64, 3), 60, np.uint8)
            x = 4 if name == "left" else 34
            pixels[10:40, x : x + 24] = (200, 40, 40)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
            lines.append(f"{name}/{k}.png,{x},10,{x + 24},40")
    if not boxes:
        return str(folder)
    (folder / "boxes.csv").write_text("image,x0,y0,x1,y1\n" + "\n".join(lines) + "\n")
    return f"{folder}?boxes={folder / 'boxes.csv'}"


def test_boxes_alone_train_box_heads_alone(tmp_path: Path) -> None:
    data = f"folder:{with_boxes(tmp_path / 'images', True)}"
    run = finetune("vitdet-small", out=str(tmp_path / "run"), **QUICK | {"data": data, "duration": "2 steps"})
    log = (run.folder / "log.txt").read_text()
    assert "box heads train alone" in log
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert not any("loss/mask" in line for line in lines)
    result = evaluate(run.folder, "detect", test=data, workers=0, progress=False)
    assert "mask_ap" not in result.metrics
    assert any("boxes alone are measured" in note for note in result.notes)


@pytest.mark.parametrize(
    ("recipe", "rate"),
    [
        ("vitdet-vitb16-coco", 3e-4),
        ("vitdet-vits16-coco", 1e-4),
        ("vitdet-vits16-coco-50ep", 1e-4),
        ("vitdet-vitb16-coco-50ep", 3e-4),
    ],
)
def test_recipes_are_as_published(recipe: str, rate: float) -> None:
    """Position field paper, B.2: the rate falls at 19,667 and 21,306 of 22,128 steps; 50 epochs alike."""
    config = resolve(recipe)
    total = 22128 if "50" not in recipe else 92200
    assert config.duration == f"{total} steps"
    drops = (19667, 21306) if total == 22128 else (round(0.8888 * total), round(0.96285 * total))
    steps = {
        250: rate,
        drops[0] - 1: rate,
        drops[0]: rate / 10,
        drops[1] - 1: rate / 10,
        drops[1]: rate / 100,
    }
    for step, expected in steps.items():
        assert config.optimizer.lr.at(Progress(step, total, 1848, 64)) == pytest.approx(expected)
    assert config.optimizer.lr.at(Progress(0, total, 1848, 64)) == pytest.approx(rate / 1000)
    assert config.views.rescale.range == (0.1, 2.0)
    assert (config.views.global_size, config.batch_size, config.model.window) == (1024, 64, None)
    assert config.encoder().transform.crop == 1024


def test_a_field_of_positions_is_read_as_a_whole(tmp_path: Path) -> None:
    """A view is the whole field, as it is the whole of a table, whatever of its image it shows."""
    model = QUICK["model"] | {"positions": "field", "field_size": [8, 8], "position_init": "random"}
    settings = QUICK | {"data": SCENES, "duration": "1 steps", "model": model}
    run = finetune("vitdet-small", out=str(tmp_path / "run"), **settings)
    encoder = load(run.folder)
    pixels = torch.zeros(1, 3, 64, 64)
    grid = encoder.backbone.positions((16, 16))
    assert grid.shape == (1, 256, 96)
    assert len(encoder.predict(np.zeros((40, 64, 3), np.uint8)).boxes) >= 0
    assert encoder.backbone(pixels).patches.shape == (1, 256, 96)


def test_a_dry_run_at_1024_pixels_says_memory() -> None:
    from foveola.training.dryrun import dry_run

    config = resolve(
        "vitdet-vits16-coco",
        {
            "data": SCENES,
            "batch_size": 1,
            "device": "cpu",
            "precision": "fp32",
            "optimizer.lr.warmup": "0 steps",
            "model": {"width": 16, "depth": 1, "heads": 2},
            "method": {"channels": 4, "hidden": 4, "convolutions": 0},
        },
    )
    text = dry_run(config)
    assert "GiB at most in this process" in text
    assert "student 4,097" in text
    assert "losses proposal" in text


def test_a_window_of_the_encoder_is_kept(tmp_path: Path) -> None:
    model = QUICK["model"] | {"window": 8, "global_blocks": 1}
    settings = QUICK | {"data": SCENES, "duration": "1 steps", "model": model}
    run = finetune("vitdet-small", out=str(tmp_path / "run"), **settings)
    encoder = load(run.folder)
    assert [block.attn.window for block in encoder.backbone.blocks] == [8, None]
    plain = Encoder(replace(encoder.config, model=replace(encoder.config.model, window=None)))
    plain.backbone.load_state_dict(encoder.backbone.state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(encoder(pixels).patches, plain(pixels).patches)
