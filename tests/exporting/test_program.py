"""Programs of torch.export: their answers are the network's, at any batch size, read back without foveola."""

import json
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foveola.config import UserError
from foveola.exporting.export import export
from foveola.models import positions
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.predictor import PredictorConfig
from foveola.models.shape import ViTConfig
from foveola.tasks.classification import ClassificationConfig, ClassificationHead
from foveola.tasks.detection import DetectionConfig, DetectionHead
from foveola.tasks.segmentation import SegmentationConfig, SegmentationHead
from foveola.zoo.load import load

SHAPES: dict[str, dict[str, Any]] = {
    "DINO": {"position_offset": 0.1},
    "field": {"positions": "field", "field_interpolation": "bicubic", "field_alignment": "corners"},
    "rotary": {"positions": "rope", "class_token": False, "norm": "rms", "registers": 4},
    "windows": {"window": 2, "global_blocks": 1, "depth": 2},
}
OF_SHAPE = (("DINO", "token", True), ("field", "average", True), ("rotary", "predictor", False))
OF_SHAPE += (("windows", "token", False),)


def encoder_of(shape: str, pool: Any = "token") -> Encoder:
    torch.manual_seed(0)
    own: dict[str, Any] = {"width": 24, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 32} | SHAPES[
        shape
    ]
    predictor = PredictorConfig(depth=1, heads=2) if pool == "predictor" else None
    config = EncoderConfig(ViTConfig(**own), TransformConfig(36, 32), pool=pool, predictor=predictor)
    made = Encoder(config)
    with torch.no_grad():
        for parameter in made.parameters():  # larger weights than at the start: positions must matter
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Encoder, Path]]:
    """An encoder and its program; each is made once."""

    @cache
    def made(shape: str, pool: str, objects: bool) -> tuple[Encoder, Path]:
        encoder = encoder_of(shape, pool)
        return encoder, export(encoder, tmp_path_factory.mktemp(shape) / "encoder.pt2", objects=objects)

    return made


def pixels(count: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("shape", "pool", "objects"), OF_SHAPE)
def test_features_are_those_of_the_encoder_at_any_size(programs, shape: str, pool: str, objects: bool):
    """Tables of positions are resized in the program, by products; in the network by torch's interpolate.

    Objects are asked for in a pass of their own each.
    """
    encoder, path = programs(shape, pool, objects)
    about = {"foveola.json": ""}
    run = torch.export.load(path, extra_files=about).module()
    sizes = [(32, 32)] if shape == "windows" else [(32, 32), (16, 72), (48, 24)]
    for count, size in zip((5, 1, 2), sizes, strict=False):
        images = pixels(count, size)
        grid = size[0] // 8, size[1] // 8
        masks = torch.rand(count, 2, *grid, generator=torch.Generator().manual_seed(count)) < 0.3
        masks[0, 0] = False  # reads everything
        given = (images, masks) if objects else (images,)
        found, seen = run(*given), encoder.normalise(images)
        features = encoder(seen)
        close = partial(torch.testing.assert_close, rtol=0, atol=2e-5)
        close(found["embedding"], features.objects[:, 0])
        close(found["patches"], features.patches)
        for i, j in [(0, 0), (0, 1), (count - 1, 1)] if objects else []:
            mask = masks[i : i + 1, j : j + 1].flatten(2)
            close(found["objects"][i, j], encoder(seen[i : i + 1], mask, independent=False).objects[0, 0])
            assert torch.allclose(found["objects"][i, j], features.objects[i, 0], atol=1e-4) == (j == 0)
    told, fixed = json.loads(about["foveola.json"]), shape == "windows"
    assert told["gives"]["patches"][1] == (16 if fixed else "rows * columns")
    assert told["sizes"].startswith("32 x 32 pixels only: windows" if fixed else "multiples of 8 pixels, 16")
    assert told["transform"]["resize"] == 36
    back, seen = load(path), encoder.normalise(pixels(2))
    assert back.fingerprint() == encoder.fingerprint()
    assert torch.equal(back(seen).patches, encoder(seen).patches)


@pytest.mark.parametrize("grid", [(5, 5), (2, 9), (7, 3), (12, 6)])
@pytest.mark.parametrize(("antialias", "offset"), [(False, 0.0), (True, 0.0), (False, 0.1)])
def test_positions_of_any_grid_are_those_of_interpolate(grid: Any, antialias: bool, offset: float):
    """The products that a program has, for sizes that are known; of the table itself it is as it is."""
    table = torch.randn(1, 25, 6, generator=torch.Generator().manual_seed(0))
    made = positions._resampled(table, 5, grid, antialias, offset)
    wanted = positions.resize_positions(table, grid, antialias, offset=offset)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)  # rounding


def test_hostile_and_foreign_programs_are_one_line(programs, tmp_path: Path):
    encoder, path = programs(*OF_SHAPE[0])
    with zipfile.ZipFile(path) as archive:
        whole = {name: archive.read(name) for name in archive.namelist()}

    def rewritten(name: str, data: bytes | None) -> Path:
        with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
            for each, own in (whole | {name: data}).items():
                if own is not None:
                    archive.writestr(each, own)
        return tmp_path / "other.pt2"

    listed = "archive/data/weights/model_weights_config.json"
    assert load(rewritten("archive/models/model.json", b"{")).fingerprint() == encoder.fingerprint()
    for name, data, message in (
        ("archive/extra/foveola.json", None, "that foveola did not write"),
        ("archive/extra/foveola.json", b"{", "no whole program of foveola"),
        ("archive/extra/foveola.json", b"[]", "no whole program of foveola"),
        (listed, None, "no whole program of foveola"),
        ("archive/data/weights/weight_3", b"1", "no whole program of foveola"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(rewritten(name, data))
        assert "\n" not in str(error.value)
    huge, none = [{"as_int": 2**40}], [{"as_int": 0}]
    for change, message in (
        ({"use_pickle": True}, "not kept as plain numbers"),
        ({"tensor_meta": {"sizes": huge, "strides": none}}, "larger than what is there"),
        ({"path_name": "none"}, "no whole program of foveola"),
    ):
        entries = json.loads(whole[listed])
        entry = entries["config"]["encoder.backbone.norm.weight"]
        meta = entry["tensor_meta"] | change.get("tensor_meta", {})
        entry |= change | {"tensor_meta": meta}
        with pytest.raises(UserError, match=message):
            load(rewritten(listed, json.dumps(entries).encode()))
    packed = rewritten("archive/extra/foveola.json", b"{}").read_bytes()
    at = packed.rindex(b"archive/extra/foveola.json") - 46  # of its entry in the list at the end
    # A version of zip that nobody knows.
    (tmp_path / "other.pt2").write_bytes(packed[: at + 6] + b"\xff\0" + packed[at + 8 :])
    with pytest.raises(UserError, match=r"no whole program of foveola \(NotImplementedError: zip file"):
        load(tmp_path / "other.pt2")
    (tmp_path / "none.pt2").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"no program of torch\.export"):
        load(tmp_path / "none.pt2")
    with pytest.raises(UserError, match=r"says all of itself: load it without \?heads=2"):
        load(f"{path}?heads=2")


def test_a_classifier_and_a_segmenter_give_their_logits(tmp_path: Path):
    names, image = ("a", "b", "c"), pixels(1)[0].permute(1, 2, 0).numpy()
    for head in (
        ClassificationHead(ClassificationConfig(classes=names), encoder_of("DINO").config.model),
        SegmentationHead(SegmentationConfig(classes=names), encoder_of("DINO").config.model),
    ):
        encoder = encoder_of("DINO")
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
        assert told["gives"]["logits"] == ["batch", 3, "height", "width"][: wanted.ndim]
        large = pixels(2, (40, 56))
        with torch.no_grad():
            wanted = head.logits(encoder.backbone, encoder.normalise(large))
        torch.testing.assert_close(run(large)["logits"], wanted, rtol=1e-5, atol=1e-5)
    for out in ("file.pth", "file.safetensors", "segmentation.pt2"):  # they are read back with the head
        back = load(export(encoder, tmp_path / out) if out[:4] == "file" else tmp_path / out)
        assert back.fingerprint() == encoder.fingerprint()
        assert torch.equal(back.predict(image).classes, encoder.predict(image).classes)
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with pytest.warns(UserWarning, match="without the head for segmentation, as format=timm"):
        export(encoder, tmp_path / "folder")
    assert timm
    export(encoder, tmp_path / "silent", head=False)  # warnings are errors here


def test_a_detector_gives_any_number_of_objects(tmp_path: Path):
    """As many, and the same, as `predict` finds in images that need no resizing; also none at all."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    encoder = encoder_of("DINO")
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
    encoder = encoder_of("DINO")
    with pytest.raises(UserError, match=r"out=.*\.pt2"):
        export(encoder, tmp_path / "encoder.pth", "program")

    class Several(nn.Module):
        config = type("Config", (), {"name": "detection"})

    encoder.head = Several()
    with pytest.raises(UserError, match="head=false exports its encoder"):
        export(encoder, tmp_path / "encoder.pt2", "program")
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal, sys
from foveola import cli

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails as it does on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
sys.exit(cli.main(["export", sys.argv[1], f"out={sys.argv[2]}"]))
"""


def test_a_full_disk_is_said_in_one_line(forked: Callable[..., Any], tmp_path: Path):
    """Torch's writer of programs would end the process."""
    folder, out = encoder_of("DINO").save(tmp_path / "encoder"), tmp_path / "mine.pt2"
    with forked(FULL, [str(folder), str(out)]) as process:
        assert process.wait() == [2]
        (line,) = process.errors[0].read_text().splitlines()
    assert line.startswith(f"foveola: error: {out} cannot be written: {out}: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
