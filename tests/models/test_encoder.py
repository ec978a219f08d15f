"""Encoder folders: round trip, transform, masks at inference, damage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import ConfigError, UserError
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig, load, patch_mask
from foveola.models.vit import ViTConfig

CONFIG = EncoderConfig(
    model=ViTConfig(width=24, depth=2, heads=3, patch_size=4, image_size=16, registers=2),
    transform=TransformConfig(resize=20, crop=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
    origin="a test",
)


def encoder(config: EncoderConfig = CONFIG) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return encoder().save(tmp_path / "encoder")


def test_round_trip(saved: Path):
    before, after = encoder(), load(saved)
    assert after.config == CONFIG
    assert after.fingerprint() == before.fingerprint()
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(before(images).patches, after(images).patches)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    # A run folder is loaded through its encoder.
    assert load(saved.parent).fingerprint() == before.fingerprint()
    assert load(str(saved)).fingerprint() == before.fingerprint()


def test_saving_again_replaces(saved: Path):
    other = encoder()
    with torch.no_grad():
        other.backbone.cls_token += 1
    other.save(saved)
    assert load(saved).fingerprint() == other.fingerprint() != encoder().fingerprint()


def test_it_is_frozen_and_never_drops():
    made = encoder(
        EncoderConfig(
            model=ViTConfig(width=24, depth=3, heads=3, patch_size=4, image_size=16, drop_path=0.9),
            transform=TransformConfig(resize=16, crop=16),
        )
    )
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(made(images).objects, made(images).objects)


def test_fingerprint_follows_weights_and_settings_but_not_the_origin():
    first = encoder().fingerprint()
    assert len(first) == 16
    assert encoder().fingerprint() == first
    assert encoder(EncoderConfig(CONFIG.model, CONFIG.transform, "elsewhere")).fingerprint() == first
    resized = TransformConfig(resize=24, crop=16, mean=CONFIG.transform.mean, std=CONFIG.transform.std)
    assert encoder(EncoderConfig(CONFIG.model, resized)).fingerprint() != first
    changed = encoder()
    with torch.no_grad():
        changed.backbone.norm.bias[3] += 1e-6
    assert changed.fingerprint() != first


@pytest.mark.parametrize("size", [(20, 20), (50, 30), (30, 50), (16, 90), (7, 11)], ids=str)
def test_transform_is_torchvisions(size: tuple[int, int]):
    from torchvision.transforms import functional as F

    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    made = encoder()
    ours = made.transform(array)
    picture = Image.fromarray(array)
    short = 20 / min(size)
    resized = F.resize(
        picture, [max(20, round(size[1] * short)), max(20, round(size[0] * short))], Image.Resampling.BICUBIC
    )
    cropped = F.center_crop(resized, [16, 16])
    expected = F.normalize(F.to_tensor(cropped), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    # An odd rest is split differently: torchvision rounds half to even.
    rests = {(resized.size[0] - 16) % 2, (resized.size[1] - 16) % 2}
    if rests == {0}:
        assert (ours - expected).abs().max() < 1e-5
    assert ours.shape == (3, 16, 16)
    assert torch.equal(ours, made.transform(picture))


def test_normalise_is_the_end_of_the_transform():
    made = encoder()
    pixels = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert torch.equal(made.transform(image), made.normalise(pixels[:, :, 2:18, 2:18])[0])


def test_gray_pictures_are_rgb():
    made = encoder()
    gray = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20))
    assert made.transform(gray).shape == (3, 16, 16)


def test_masks_at_inference():
    made = encoder()
    images = torch.randn(3, 3, 16, 16)
    plain = made(images)
    everything = made(images, torch.ones(3, 1, 16, dtype=torch.bool))
    nothing = made(images, torch.zeros(3, 2, 16, dtype=torch.bool))
    assert torch.equal(plain.objects, everything.objects)
    assert nothing.objects.shape == (3, 2, 24)
    assert torch.allclose(nothing.objects[:, 0], nothing.objects[:, 1], atol=1e-6)
    objects = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    together = made(images, objects)
    for b in range(3):
        alone = made(images[b : b + 1], objects[b : b + 1])
        assert torch.allclose(alone.objects[0], together.objects[b], atol=1e-5)
    assert not torch.allclose(together.objects[:, :1], plain.objects, atol=1e-3)


def test_patch_mask_takes_any_pixel_and_an_empty_one_everything():
    coverage = torch.zeros(3, 2, 2)
    coverage[0, 0, 1] = 1 / 256
    coverage[1, 1, 1] = 0.5 / 256
    coverage[2] = torch.tensor([[0.2, 0.6], [1.0, 0.0]])
    assert patch_mask(coverage).tolist() == [
        [False, True, False, False],
        [True] * 4,
        [True, True, True, False],
    ]
    assert patch_mask(coverage, 0.5)[2].tolist() == [False, True, True, False]
    assert patch_mask(coverage, 0.5)[0].all()


def test_gradient_free():
    assert not encoder()(torch.randn(1, 3, 16, 16)).objects.requires_grad


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ConfigError, match=r"transform\.crop=15 is not a multiple of the patch size 4"):
        Encoder(EncoderConfig(CONFIG.model, TransformConfig(resize=20, crop=15)))
    with pytest.raises(ValueError, match="crop=20 is larger than resize=16"):
        TransformConfig(resize=16, crop=20)


def refuse(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_damaged_folders_are_refused_in_one_line(saved: Path, tmp_path: Path):
    def copy() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(saved, tmp_path / "copy"))

    folder = copy()
    (folder / "model.safetensors").unlink()
    refuse(folder, "is no run and no encoder folder")
    folder = copy()
    (folder / "config.json").unlink()
    refuse(folder, "is no run and no encoder folder")
    for size in (0, 100):
        folder = copy()
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:size])
        refuse(folder, "is damaged")
    folder = copy()
    (folder / "config.json").write_text('{"model": ')
    refuse(folder, "is damaged")
    folder = copy()
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refuse(folder, "is damaged")
    for wrong in ("[]", "3", '{"model": 3}'):
        folder = copy()
        (folder / "config.json").write_text(wrong)
        refuse(folder, "config.json")
    for change, message in (
        ({"depth": 3}, r"lacks blocks\.2"),
        ({"depth": 1}, r"has an unknown blocks\.1"),
        ({"width": 48}, r"is \(.*\), expected \(.*\)"),
        ({"widht": 48}, "did you mean .*width"),
        ({"heads": 5}, "not a multiple of heads=5"),
    ):
        folder = copy()
        config = json.loads((folder / "config.json").read_text())
        config["model"] |= change
        (folder / "config.json").write_text(json.dumps(config))
        refuse(folder, message)
    refuse(tmp_path / "nowhere", "no model at")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "is no run and no encoder folder")


def test_damaged_files_are_refused_in_one_line(tmp_path: Path):
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(100)}, whole)
    for name, content in (
        ("zero.pth", b""),
        ("text.pth", b"not a checkpoint"),
        ("half.pth", whole.read_bytes()[:300]),
        ("zero.safetensors", b""),
        ("text.safetensors", b"not a checkpoint"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refuse(path, "is no readable checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    refuse(tmp_path / "list.pth", "holds a list")


class Evil:
    def __reduce__(self):
        return print, ("code from a file ran",)


def test_files_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    refuse(tmp_path / "evil.pth", "is no readable checkpoint")
    assert "ran" not in capsys.readouterr().out
