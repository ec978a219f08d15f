"""Detectors as proposers: torchvision's and our own against themselves asked directly; classes, mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from jaxtyping import UInt8
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from foveola.config import ConfigError, UserError, build
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.proposals.detect import Detector, DetectorConfig, detector
from foveola.proposals.found import FoundInImage, OpenedDetector, chosen, weights_identity
from foveola.proposals.torchvision_models import of_module
from foveola.tasks.detection import DetectionConfig, DetectionHead
from foveola.zoo.load import load

CPU = torch.device("cpu")
SSD = "ssdlite320_mobilenet_v3_large"
COCO = torchvision.models.get_model_weights(SSD).DEFAULT.meta["categories"]


def noise(*sizes: tuple[int, int]) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Images of these rows and columns."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


class Bright(nn.Module):
    """Finds the bright rectangle of an image, as torchvision's detectors answer, and the left half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.score_thresh = 0.0

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        answers = []
        for image in images:
            assert image.dtype == torch.float32
            rows, columns = (image.amin(0) > 0.9).nonzero(as_tuple=True)
            x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            boxes = torch.stack([torch.stack([x0, y0, x1, y1]), torch.stack([x0, y0, (x0 + x1) // 2, y1])])
            boxes = boxes.float() * self.scale
            scores, labels = torch.tensor([0.6, 0.9]), torch.tensor([3, 1])
            masks = torch.zeros(2, 1, *image.shape[1:])
            for mask, (left, top, right, low) in zip(masks, boxes.long().tolist(), strict=True):
                mask[:, top:low, left:right] = 0.7
            keep = scores > self.score_thresh
            parts = {"boxes": boxes, "scores": scores, "labels": labels, "masks": masks}
            answers.append({name: part[keep] for name, part in parts.items()})
        return answers


def bright(settings: dict[str, Any]) -> Detector:
    opened = of_module(Bright(), ("__background__", "cat", "N/A", "dog"), CPU)
    return Detector(opened, build(DetectorConfig, settings), "torchvision:bright")


def lit(height: int, width: int, box: tuple[int, int, int, int]) -> UInt8[np.ndarray, "_ _ 3"]:
    image = np.full((height, width, 3), 30, np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def test_boxes_and_masks_are_in_pixels_of_each_image() -> None:
    wide, tall = (10, 4, 30, 12), (2, 40, 8, 90)
    images = [lit(20, 64, wide), lit(100, 10, tall), lit(20, 64, (0, 0, 64, 20))]
    found = bright({}).propose(images)
    assert [each.boxes.tolist() for each in found] == [
        [[10, 4, 20, 12], [10, 4, 30, 12]],
        [[2, 40, 5, 90], [2, 40, 8, 90]],
        [[0, 0, 32, 20], [0, 0, 64, 20]],
    ]
    for image, each in zip(images, found, strict=True):
        np.testing.assert_allclose(each.scores, [0.9, 0.6], rtol=1e-6)  # best first
        assert each.labels.tolist() == [0, 1]
        assert each.masks is not None
        assert (each.masks[1] == (image[..., 0] == 255)).all()


@pytest.mark.parametrize(
    ("settings", "classes", "labels", "scores"),
    [
        ({}, ("cat", "dog"), [0, 1], [0.9, 0.6]),
        ({"score": 0.7}, ("cat", "dog"), [0], [0.9]),
        ({"classes": ["dog"]}, ("dog",), [0], [0.6]),
        ({"classes": ["dog", "cat"]}, ("dog", "cat"), [1, 0], [0.9, 0.6]),
        ({"agnostic": True}, ("object",), [0, 0], [0.9, 0.6]),
        ({"agnostic": True, "classes": ["dog"]}, ("object",), [0], [0.6]),
    ],
)
def test_classes_and_scores_are_chosen(settings: Any, classes: Any, labels: Any, scores: Any) -> None:
    proposer = bright(settings)
    (found,) = proposer.propose([lit(20, 64, (10, 4, 30, 12))])
    assert proposer.classes == classes
    assert found.labels.tolist() == labels
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6)


def test_images_of_several_sizes_do_not_meet_in_a_batch() -> None:
    """Padding to the largest changes what many detectors see."""
    batches = []

    def find(images: Any, score: float) -> list[FoundInImage]:
        batches.append([image.shape[:2] for image in images])
        none = FoundInImage(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        one = FoundInImage(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
        return [one if image[0, 0, 0] else none for image in images]

    images = [np.full((*size, 3), size[0] % 2, np.uint8) for size in ((4, 9), (5, 9), (4, 9), (5, 9))]
    for one_size, expected in (
        (False, [[(4, 9)] * 2, [(5, 9)] * 2]),
        (True, [[image.shape[:2] for image in images]]),
    ):
        batches.clear()
        proposer = Detector(OpenedDetector(("a",), find, "", one_size=one_size), DetectorConfig(), "m")
        assert [len(each) for each in proposer.propose(images)] == [0, 1, 0, 1]
        assert batches == expected
    assert proposer.propose([]) == []


def test_what_is_no_proposal_is_left_out() -> None:
    """Boxes beyond the image or without area, masks without pixels; numbers that are none are said."""
    boxes = torch.tensor([[-5.0, -5, 3, 40], [12, 0, 15, 4], [3, 3, 3, 6], [1, 1, 2, 2], [0, 0, 2, 2]])
    masks = torch.ones(5, 8, 10, dtype=torch.bool)
    masks[3] = False
    answer = [
        FoundInImage(boxes, torch.tensor([0.6, 0.9, 0.9, 0.9, 0.6]), torch.zeros(5, dtype=torch.int64), masks)
    ]
    proposer = Detector(OpenedDetector(("a",), lambda images, score: answer, ""), DetectorConfig(), "m")
    (found,) = proposer.propose(noise((8, 10)))
    assert found.boxes.tolist() == [[0, 0, 3, 8], [0, 0, 2, 2]]  # equal scores keep their order
    answer[0] = FoundInImage(boxes / 0, torch.ones(5), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(UserError, match="m gives numbers that are not finite"):
        proposer.propose(noise((8, 10)))


def test_a_mask_rcnn_answers_as_asked_directly() -> None:
    torch.manual_seed(0)
    backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU())
    backbone.out_channels = 8
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2)
    masks = torchvision.ops.MultiScaleRoIAlign(["0"], 6, 2)
    model = MaskRCNN(
        backbone,
        4,
        min_size=64,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=pool,
        mask_roi_pool=masks,
        box_score_thresh=0.3,
        box_detections_per_img=8,
        rpn_post_nms_top_n_test=20,
    )
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 30
    model.eval()
    images = noise((48, 80), (90, 40), (48, 80))
    direct = [model([torch.from_numpy(image).permute(2, 0, 1) / 255])[0] for image in images]
    proposer = Detector(
        of_module(model, ("__background__", "a", "b", "c"), CPU), DetectorConfig(score=0.3), "m"
    )
    for image, found, theirs in zip(images, proposer.propose(images), direct, strict=True):
        masks = theirs["masks"][:, 0] > 0.5
        kept = masks.flatten(1).any(dim=1)
        assert 0 < len(found) == kept.sum()
        np.testing.assert_allclose(found.boxes, theirs["boxes"][kept].detach(), atol=1e-3)
        np.testing.assert_allclose(found.scores, theirs["scores"][kept].detach(), atol=1e-5)
        np.testing.assert_array_equal(found.labels, theirs["labels"][kept] - 1)
        assert found.masks is not None
        assert found.masks.shape == (len(found), *image.shape[:2])
        np.testing.assert_array_equal(found.masks, masks[kept])


@pytest.fixture(scope="module")
def ssd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """torchvision's folder of weights, with random ones of its smallest detector by their name."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(SSD, weights=None, weights_backbone=None, num_classes=91)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # it finds something
    folder = tmp_path_factory.mktemp("hub")
    (folder / "checkpoints").mkdir()
    url = torchvision.models.get_model_weights(SSD).DEFAULT.url
    torch.save(model.state_dict(), folder / "checkpoints" / Path(url).name)
    return folder, model.eval()


def test_names_of_torchvision_bring_their_weights(ssd, monkeypatch) -> None:
    folder, model = ssd
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))
    proposer = detector(f"torchvision:{SSD}", DetectorConfig(score=0.1))
    assert proposer.classes == tuple(name for name in COCO if name not in ("__background__", "N/A"))
    (image,) = noise((60, 90))
    (found,) = proposer.propose([image])
    model.score_thresh = 0.1
    with torch.no_grad():
        (theirs,) = model([torch.from_numpy(image).permute(2, 0, 1) / 255])
    kept = [row for row, label in enumerate(theirs["labels"].tolist()) if COCO[label] != "N/A"]
    assert kept
    np.testing.assert_allclose(found.boxes, theirs["boxes"][kept].numpy(), atol=1e-4)
    assert [proposer.classes[label] for label in found.labels] == [
        COCO[theirs["labels"][row]] for row in kept
    ]


def test_files_of_torchvision(ssd, tmp_path: Path) -> None:
    """Weights for COCO and for own classes, as torchvision's training script keeps them; others."""
    folder, model = ssd
    (official,) = (folder / "checkpoints").iterdir()
    file = tmp_path / "mine.pth"
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, file)
    proposer = detector(f"torchvision:{SSD}?weights={file}", DetectorConfig())
    assert proposer.describe() == {
        "kind": "detect",
        "model": f"torchvision:{SSD}?weights={file}",
        "weights": proposer.opened.identity,
        "score": 0.5,
        "classes": None,
        "agnostic": False,
        "names": None,
    }
    small = torchvision.models.get_model(SSD, weights=None, weights_backbone=None, num_classes=3)
    torch.save(small.state_dict(), file)
    named = detector(f"torchvision:{SSD}?weights={file}", DetectorConfig(names=("ant", "bee")))
    assert named.classes == ("ant", "bee")
    for config, weights, error in (
        ({}, file, "expected .* for 91 outputs, background included; names= lists its classes"),
        ({}, official, "is torchvision's own: put it into .*checkpoints and load .*weights=COCO_V1"),
        ({}, "COCO_V2", "weights=COCO_V2: expected a file, or one of COCO_V1, DEFAULT"),
        ({"names": ["ant"]}, "COCO_V1", "names has no effect"),
    ):
        with pytest.raises(UserError, match=error):
            detector(f"torchvision:{SSD}?weights={weights}", build(DetectorConfig, config))
    state = small.state_dict()
    name, _ = state.popitem()
    torch.save(state, file)
    with pytest.raises(UserError, match=f"lacks {name}"):
        detector(f"torchvision:{SSD}?weights={file}", DetectorConfig(names=("ant", "bee")))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder folder with a head for detection that finds something."""
    torch.manual_seed(0)
    shape = ViTConfig(width=32, depth=2, heads=2, patch_size=16, image_size=64)
    config = DetectionConfig(
        classes=("a", "b"), masks=True, channels=16, hidden=24, convolutions=1, score=0.01
    )
    encoder = Encoder(
        EncoderConfig(model=shape, transform=TransformConfig(resize=64, crop=64)), VisionTransformer(shape)
    )
    encoder.head = DetectionHead(config, shape)
    return encoder.save(tmp_path_factory.mktemp("own"))


def test_a_run_of_foveola_answers_as_predict_does(own: Path) -> None:
    images = noise((40, 70), (64, 30))
    proposer = detector(str(own), DetectorConfig(score=0.3))
    for found, theirs in zip(proposer.propose(images), load(own).predict(images), strict=True):
        kept = theirs.scores > 0.3
        assert 0 < kept.sum() == len(found)
        np.testing.assert_allclose(found.boxes, theirs.boxes[kept], rtol=1e-6)
        assert found.labels.tolist() == theirs.labels[kept].tolist()
        np.testing.assert_array_equal(found.masks, theirs.masks[kept])
    assert proposer.describe()["weights"] == load(own).fingerprint()
    with pytest.raises(ConfigError, match=r"score=0.001: the head of .* gives detections from 0.01 on"):
        detector(str(own), DetectorConfig(score=0.001))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    shape = ViTConfig(width=32, depth=1, heads=2, patch_size=16, image_size=64)
    plain = Encoder(EncoderConfig(model=shape), VisionTransformer(shape)).save(tmp_path / "plain")
    for model, error in (
        ("torchvision:maskrcnn_resnet50_fnp_v2", "did you mean 'maskrcnn_resnet50_fpn_v2'"),
        ("torchvision:", "expected one of fasterrcnn_mobilenet"),
        (f"torchvision:{SSD}?wieghts=a", "unknown option 'wieghts'; known: weights"),
        ("timm:vit_tiny", "is an encoder without a detector: expected torchvision:"),
        (str(plain), "has no head: `foveola finetune vitdet-small` trains one"),
        (str(tmp_path / "none"), "no detector at .*: expected torchvision:, hf:, onnx:, or a run of foveola"),
    ):
        with pytest.raises(UserError, match=error) as caught:
            detector(model, DetectorConfig())
        assert "\n" not in str(caught.value)


def test_an_identity_is_of_the_weights() -> None:
    state = {"a": torch.arange(3), "b": torch.zeros(2, 2)}
    same = {"b": torch.zeros(2, 2), "a": torch.arange(3)}
    others = [
        state | {"b": torch.zeros(2, 2) + 1e-6},
        {"a": torch.arange(3), "c": torch.zeros(2, 2)},
        state | {"b": torch.zeros(4)},
    ]
    assert weights_identity(state) == weights_identity(same)
    assert len({weights_identity(each) for each in (state, *others)}) == 4


def test_classes_are_met_by_name() -> None:
    assert chosen(("N/A", "a", "b", "a"), None, False, "m").index.tolist() == [-1, 0, 1, 0]
    for wanted, error in (
        (("cta",), "classes: m knows no 'cta'; did you mean 'cat'"),
        (("zebra",), "it knows cat, dog"),
        (("cat", "cat"), "expected different names of classes"),
        ((), "got none"),
    ):
        with pytest.raises(ConfigError, match=error):
            chosen(("cat", "dog"), wanted, False, "m")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(UserError, match=r"pip install 'foveola\[detection\]'"):
        detector(f"torchvision:{SSD}", DetectorConfig())


def test_weights_that_cannot_be_fetched(ssd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        UserError, match=r"cannot be fetched \(no route to host\).* put https://.* into .*checkpoints"
    ):
        detector(f"torchvision:{SSD}", DetectorConfig())
