"""Programs of torch.export: their answers are the network's, at any batch size, read back without foveola."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from foveola.config import UserError
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.predictor import PredictorConfig
from foveola.models.shape import ViTConfig
from foveola.tasks.classification import ClassificationConfig, ClassificationHead
from foveola.tasks.detection import DetectionConfig, DetectionHead
from foveola.tasks.segmentation import SegmentationConfig, SegmentationHead
from foveola.zoo.export import export

SHAPES = {
    "plain": {},
    "rotary": {"positions": "rope", "class_token": False, "norm": "rms", "registers": 4},
    "field": {"positions": "field", "field_size": (6, 6)},
    "windows": {"window": 2, "global_blocks": 1},
}


def encoder_of(shape: str, pool: str = "token") -> Encoder:
    torch.manual_seed(0)
    model = ViTConfig(width=24, depth=2, heads=2, patch_size=8, image_size=32, **SHAPES[shape])
    predictor = PredictorConfig(depth=1, heads=2) if pool == "predictor" else None
    return Encoder(EncoderConfig(model, TransformConfig(36, 32), pool=pool, predictor=predictor))


def pixels(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


@pytest.mark.parametrize(
    ("shape", "pool"),
    [("plain", "token"), ("field", "average"), ("windows", "token"), ("rotary", "predictor")],
)
def test_features_are_those_of_the_encoder(shape: str, pool: str, tmp_path: Path):
    encoder = encoder_of(shape, pool)
    path = export(encoder, tmp_path / "encoder.pt2", "program")
    run = torch.export.load(path).module()
    for count in (1, 5):
        features = encoder(encoder.normalise(pixels(count)))
        found = run(pixels(count))
        torch.testing.assert_close(found["embedding"], features.objects[:, 0], rtol=0, atol=2e-5)
        torch.testing.assert_close(found["patches"], features.patches, rtol=0, atol=2e-5)


def test_a_classifier_and_a_segmenter_give_their_logits(tmp_path: Path):
    names = ("a", "b", "c")
    for head in (
        ClassificationHead(ClassificationConfig(classes=names), encoder_of("plain").config.model),
        SegmentationHead(SegmentationConfig(classes=names), encoder_of("plain").config.model),
    ):
        encoder = encoder_of("plain")
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        encoder.head = head.eval()
        path = export(encoder, tmp_path / f"{head.config.name}.pt2", "program")
        about = {"foveola.json": ""}
        run = torch.export.load(path, extra_files=about).module()
        with torch.no_grad():
            wanted = head.logits(encoder.backbone, encoder.normalise(pixels(4)))
        torch.testing.assert_close(run(pixels(4))["logits"], wanted, rtol=1e-5, atol=1e-5)
        told = json.loads(about["foveola.json"])
        assert told["classes"] == list(names)
        assert told["gives"]["logits"] == ["batch", *wanted.shape[1:]]
    with pytest.warns(UserWarning, match="without the head for segmentation, as format=torch"):
        export(encoder, tmp_path / "file.pth", "torch")
    export(encoder, tmp_path / "silent.pth", "torch", head=False)  # warnings are errors here
    plain = export(encoder, tmp_path / "alone.pt2", "program", head=False)
    assert set(torch.export.load(plain).module()(pixels(1))) == {"embedding", "patches"}


def test_a_detector_gives_any_number_of_objects(tmp_path: Path):
    """As many, and the same, as `predict` finds in images that need no resizing; also none at all."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    encoder = encoder_of("plain")
    config = DetectionConfig(
        classes=("a", "b"), masks=True, channels=8, hidden=8, convolutions=1, score=0.3, detections=20
    )
    head = DetectionHead(config, encoder.config.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    encoder.head = head.eval()
    about = {"foveola.json": ""}
    path = export(encoder, tmp_path / "detector.pt2", "program")
    run = torch.export.load(path, extra_files=about).module()
    told, numbers = json.loads(about["foveola.json"]), set()
    assert told["classes"] == ["a", "b"]
    assert told["gives"]["masks"] == ["found", 28, 28]
    for rows, columns in ((32, 32), (32, 9), (13, 32)):
        view = pixels(1)  # what is beyond the image is anything
        (expected,) = encoder.predict([view[0, :, :rows, :columns].permute(1, 2, 0).numpy()])
        found = run(view, torch.tensor([rows, columns]))
        numbers.add(len(found["boxes"]))
        torch.testing.assert_close(found["boxes"], expected.boxes, rtol=0, atol=1e-4)
        torch.testing.assert_close(found["scores"], expected.scores, rtol=0, atol=1e-5)
        assert torch.equal(found["labels"], expected.labels)
        masks = paste_masks_in_image(found["masks"][:, None], found["boxes"], (rows, columns))[:, 0] > 0.5
        assert (masks == expected.masks).float().mean() > 0.999
    assert len(numbers) > 1
    assert min(numbers) > 2
    with torch.no_grad():
        dict(run.named_parameters())["encoder.head.regions.box_predictor.cls_score.bias"][0] = 100
    found = run(pixels(1), torch.tensor([32, 32]))
    assert {name: len(value) for name, value in found.items()} == dict.fromkeys(found, 0)


def test_what_cannot_be_a_program_is_one_line(tmp_path: Path):
    encoder = encoder_of("plain")
    with pytest.raises(UserError, match=r"out=.*\.pt2"):
        export(encoder, tmp_path / "encoder.pth", "program")

    class Several(nn.Module):
        config = type("Config", (), {"name": "detection"})

    encoder.head = Several()
    with pytest.raises(UserError, match="head=false exports its encoder"):
        export(encoder, tmp_path / "encoder.pt2", "program")
    assert not list(tmp_path.iterdir())
