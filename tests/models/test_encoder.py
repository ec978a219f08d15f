"""Encoder folders: round trip, transform, masks at inference, damage."""

import dataclasses
import json
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import ConfigError, UserError, build
from foveola.evaluation.features.table import object_tokens
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig, patch_mask
from foveola.models.transform import image_crop
from foveola.models.vit import ViTConfig
from foveola.zoo.load import load

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


@pytest.mark.parametrize("size", [(20, 20), (50, 30), (30, 50), (16, 90), (9, 11), (67, 41)], ids=str)
def test_transform_is_torchvisions(size: tuple[int, int]):
    from torchvision.transforms import functional as F

    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    made = encoder()
    ours = made.transform(array)
    image = Image.fromarray(array)
    cropped = F.center_crop(F.resize(image, 20, Image.Resampling.BICUBIC), [16, 16])
    expected = F.normalize(F.to_tensor(cropped), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    # Torch's rounding to uint8 within one level of PIL's.
    assert (ours - expected).abs().max() <= 1.01 / 255 / 0.2
    assert (ours - expected).abs().mean() < 0.1 / 255 / 0.2
    assert ours.shape == (3, 16, 16)
    assert torch.equal(ours, made.transform(image))
    mirrored = made.transform(array[:, ::-1])
    assert torch.equal(mirrored, made.transform(array[:, ::-1].copy()))


def test_sizes_and_offsets_are_torchvisions():
    """Exactly, for every shape: the longer side is rounded down, the offset to the nearest even number."""
    from torchvision.transforms import CenterCrop, Resize

    settings = [TransformConfig(resize=r, crop=c) for r, c in ((256, 224), (248, 224), (32, 32), (37, 20))]
    rng = np.random.default_rng(0)
    shapes = [(333, 500), (500, 333), (375, 500), (8, 9), *rng.integers(8, 900, (200, 2)).tolist()]
    for transform in settings:
        for height, width in shapes:
            size, corner = image_crop(height, width, transform)
            image = torch.empty(1, height, width, device="meta")
            resized = Resize(transform.resize, antialias=True)(image)
            assert tuple(resized.shape[1:]) == size, (transform, height, width)
            marked = torch.arange(size[0] * size[1]).view(1, *size)
            first = int(CenterCrop(transform.crop)(marked)[0, 0, 0])
            assert (first // size[1], first % size[1]) == corner, (transform, height, width)


def test_normalise_is_the_end_of_the_transform():
    made = encoder()
    pixels = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert torch.equal(made.transform(image), made.normalise(pixels[:, :, 2:18, 2:18])[0])


def test_gray_images_are_rgb():
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
    assert torch.allclose(nothing.objects, plain.objects.expand(-1, 2, -1), atol=1e-5)
    assert made(images, torch.zeros(3, 0, 16, dtype=torch.bool)).objects.shape == (3, 0, 24)


KEPT = """{"model": {"size": "small", "width": 24, "depth": 2, "heads": 3, "patch_size": 4, "image_size": 16,
"mlp": "gelu", "mlp_ratio": 4.0, "class_token": true, "registers": 2, "norm": "layer", "norm_eps": null,
"final_norm_affine": true, "bias": true, "drop_path": 0.1, "drop_path_rule": "linear",
"drop_path_subset": false,
"positions": "learned", "field_size": [50, 50], "field_interpolation": "linear", "field_alignment": "cells",
"position_antialias": false, "position_offset": 0.1, "position_init": "random", "rope": "axial",
"layer_scale": null, "init": "normal"},
"transform": {"resize": 23, "crop": 20, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
"interpolation": "bicubic", "squash": false},
"origin": "runs/x at step 10", "pool": "token", "predictor": null}"""


def test_a_kept_folder_gives_the_features_that_it_gave(tmp_path: Path):
    """`config.json` as it was written before transforms rounded as torchvision, and numbers of that code."""
    made = Encoder(build(EncoderConfig, json.loads(KEPT)))
    with torch.no_grad():
        for value in made.weights().values():
            value.copy_(((torch.arange(value.numel()) * 7 % 13 - 6) / 64).view_as(value))
    made.save(tmp_path)
    (tmp_path / "config.json").write_text(KEPT)
    kept = load(tmp_path)
    features = kept((torch.arange(3 * 20 * 20) % 11 / 8 - 0.5).view(1, 3, 20, 20))
    token, last = [-0.01001, 0.01969, 0.01498, 0.06944], [-0.13962, 0.02348, -0.02541, 0.03115]
    torch.testing.assert_close(features.objects[0, 0, :4], torch.tensor(token), rtol=0, atol=2e-5)
    torch.testing.assert_close(features.patches[0, -1, :4], torch.tensor(last), rtol=0, atol=2e-5)
    assert kept.fingerprint() == "9c0e0e98e5c79085"  # names caches and results


@pytest.mark.parametrize("count", [1, 2, 11])
def test_an_object_does_not_depend_on_which_others_are_asked_for(count: int):
    """Each token is that of an image alone with one object, which is what evaluations measure."""
    made, images = encoder(), torch.randn(3, 3, 16, 16)
    objects = torch.rand(3, count, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    together = made(images, objects)
    for b in range(3):
        for m in range(count):
            one = made.backbone(images[b : b + 1], objects[b : b + 1, m : m + 1])
            torch.testing.assert_close(together.objects[b, m], one.objects[0, 0], rtol=1e-4, atol=1e-5)
    plain = made(images)
    assert torch.equal(together.patches, plain.patches)
    assert torch.equal(together.registers, plain.registers)
    assert torch.equal(made.tokens(images, objects), together.objects)


class Doubled(Encoder):
    def forward(self, images, objects=None):
        features = super().forward(images, objects)
        return dataclasses.replace(features, objects=2 * features.objects)


def test_a_subclass_with_a_forward_of_its_own_is_measured():
    made, images = encoder(), torch.randn(2, 3, 16, 16)
    doubled = Doubled(made.config, made.backbone)
    objects = torch.rand(2, 3, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    for asked in (objects, None):
        assert torch.equal(doubled.tokens(images, asked), 2 * made.tokens(images, asked))


def test_objects_in_one_pass_as_in_training():
    made, images = encoder(), torch.randn(3, 3, 16, 16)
    objects = torch.rand(3, 4, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    shared, trained = made(images, objects, independent=False), made.backbone(images, objects)
    assert torch.equal(shared.objects, trained.objects)
    assert torch.equal(shared.patches, trained.patches)
    assert not torch.allclose(shared.objects, made(images, objects).objects, atol=1e-2)
    with pytest.raises(ValueError, match="4 objects of each image in a pass"):
        made.layers(images, 1, objects)


def test_means_over_an_object_without_patches_are_over_all():
    average = encoder().pooled("average")
    images, objects = torch.randn(2, 3, 16, 16), torch.zeros(2, 2, 16, dtype=torch.bool)
    objects[0, 1, [3, 7]] = True
    found = average(images, objects)
    plain = average(images)
    torch.testing.assert_close(found.objects[0, 1], plain.patches[0, [3, 7]].mean(dim=0))
    for b, m in ((0, 0), (1, 0), (1, 1)):
        torch.testing.assert_close(found.objects[b, m], plain.patches[b].mean(dim=0))
    assert torch.equal(average.tokens(images, objects), found.objects)


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
    assert patch_mask(coverage, 0.5, keep_most=True).tolist() == [
        [False, True, False, False],
        [False, False, False, True],
        [False, True, True, False],
    ]
    assert patch_mask(torch.zeros(2, 2), 0.5, keep_most=True).all()


def test_a_head_learns_on_frozen_features():
    made, images = encoder(), torch.randn(4, 3, 16, 16)
    objects = torch.rand(4, 2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    features = made(images, objects)
    assert not features.objects.requires_grad
    features.objects.add_(0)  # an ordinary tensor
    head = torch.nn.Linear(24, 3)
    head(features.objects.flatten(0, 1)).logsumexp(dim=1).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0
    for layer in (*made.layers(images, 2), made.capture(images, attention=True).layers[0]):
        assert not layer.patches.is_inference()


@pytest.mark.parametrize("way", ["requires_grad_", "load"])
def test_gradients_reach_the_weights_of_an_encoder_that_may_learn(way, saved: Path):
    made = load(saved, trainable=True) if way == "load" else encoder().requires_grad_(True)
    assert made.training == (way == "load")
    before = made.fingerprint()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    images = torch.randn(2, 3, 16, 16)
    made(images, torch.rand(2, 3, 16) < 0.5).objects.square().sum().backward()
    idle = {name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert idle == {"backbone.mask_token"}
    # Against a finite difference of the loss.
    weight = made.backbone.cls_token
    loss = lambda: made.eval().double()(images.double()).objects.square().sum()  # noqa: E731
    optimizer.zero_grad()
    loss().backward()
    step = torch.zeros_like(weight).double()
    step[0, 0, 5] = 1e-6
    with torch.no_grad():
        weight += step
        high = loss()
        weight -= 2 * step
        low = loss()
        weight += step
    assert weight.grad[0, 0, 5].item() == pytest.approx((high - low).item() / 2e-6, rel=1e-4)
    optimizer.step()
    assert made.float().fingerprint() != before


def test_evaluations_keep_no_graph_of_an_encoder_that_may_learn():
    made = encoder().requires_grad_(True)
    tokens = object_tokens(made, torch.randn(2, 3, 16, 16), torch.ones(2, 16, dtype=torch.bool), "fp32")
    assert not tokens.requires_grad


def test_it_can_be_traced_and_compiled(run_ranks):
    """In a process of its own: the checks of shapes that tests switch on cannot be compiled."""
    code = """
        import torch
        from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
        from foveola.models.vit import ViTConfig

        class Tokens(torch.nn.Module):
            def __init__(self, encoder):
                super().__init__()
                self.encoder = encoder

            def forward(self, images):
                features = self.encoder(images)
                return features.objects, features.patches

        torch.manual_seed(0)
        model = ViTConfig(width=24, depth=1, heads=3, patch_size=4, image_size=16)
        encoder = Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=20, crop=16)))
        images = torch.randn(3, 3, 16, 16)
        objects = torch.rand(3, 2, 16) < 0.5
        plain = Tokens(encoder)(images)
        traced = torch.jit.trace(Tokens(encoder), images[:2])
        for ours, theirs in zip(plain, traced(images)):
            torch.testing.assert_close(ours, theirs)
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images).patches, plain[1])
        torch.testing.assert_close(compiled(images, objects).objects, encoder(images, objects).objects)
    """
    run_ranks(textwrap.dedent(code), ranks=1)


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
