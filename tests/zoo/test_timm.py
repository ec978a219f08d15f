"""timm's models give what they give in timm, also with object masks; what is not ours is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveola.config import UserError
from foveola.models.encoder import Encoder
from foveola.zoo.foreign import adopt
from foveola.zoo.load import load
from foveola.zoo.preprocess import transform_of
from foveola.zoo.timm_models import from_timm_module

timm = pytest.importorskip("timm", reason="timm is not installed")
SMALL = {"embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}


def create(name: str, **options: Any) -> Any:
    """A small one of timm's networks, with weights large enough for every part to count."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def converted(model: Any) -> Encoder:
    return adopt(from_timm_module(model, "a model"), "a model")


MODELS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {},
    "vit_base_patch32_384": {"img_size": 96},
    "vit_small_patch16_224.dino": {"num_heads": 2},
    "vit_small_patch14_dinov2": {"img_size": 140},
    "vit_small_patch14_reg4_dinov2": {"img_size": 140},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 140},
    "vit_huge_patch14_gap_224": {"img_size": 112},
    "vit_small_patch16_dinov3": {"img_size": 112},
    "vit_huge_plus_patch16_dinov3": {"img_size": 112},
}
OTHERS: dict[str, dict[str, Any]] = {
    "no bias of q, k and v": {"qkv_bias": False},
    "registers, no class token": {
        "reg_tokens": 3,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
    "registers with positions": {"reg_tokens": 3, "img_size": 112},
    "average": {"global_pool": "avg", "fc_norm": False},
    "another eps": {"norm_layer": lambda width, **_: nn.LayerNorm(width, eps=1e-3)},
}
CASES = [*MODELS.items(), *(("vit_small_patch16_224", options) for options in OTHERS.values())]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[*MODELS, *OTHERS])
def test_outputs_are_those_of_timm(name: str, options: dict[str, Any]):
    model = create(name, **options)
    encoder = converted(model)
    patch, special = encoder.patch_size, model.num_prefix_tokens
    config = encoder.config
    assert config.transform.crop == timm.data.resolve_model_data_config(model)["input_size"][1]
    for size in ((6 * patch, 6 * patch), (3 * patch, 5 * patch)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            theirs, ours = model.forward_features(images), encoder(images)
            pooled = model.forward_head(theirs, pre_logits=True)
        assert theirs.std() > 0.1
        assert (ours.patches - theirs[:, special:]).abs().max() < 1e-4
        registers = theirs[:, special - config.model.registers : special]
        assert torch.allclose(ours.registers, registers, atol=1e-4)
        assert (ours.objects[:, 0] - pooled).abs().max() < 1e-4


def masked_by_hand(model: Any, images: Tensor, mask: Tensor) -> Tensor:
    """The class token of timm's network if in each block it reads only itself and these patches."""
    x = model._pos_embed(model.patch_embed(images))
    readable = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    readable[0, 1:] = mask
    for block in model.blocks:
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~readable, -torch.inf)
        x = x + block.ls1(block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)[:, 0]


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch14_dinov2"])
def test_object_masks(name: str):
    model = create(name, img_size=84 if "14" in name else 96)
    encoder = converted(model)
    side = 6 * encoder.patch_size
    images, objects = torch.randn(1, 3, side, side), torch.rand(1, 2, 36) < 0.3
    with torch.no_grad():
        for m in range(2):
            expected = masked_by_hand(model, images, objects[0, m])
            assert (encoder(images, objects[:, m : m + 1]).objects[0] - expected).abs().max() < 1e-4
    plain = encoder(images).objects
    assert (encoder(images, objects).objects - plain).abs().max() > 1e-2
    rows = encoder.capture(images, attention=True).objects
    assert rows is not None
    assert rows.shape == (1, 3, 1, 37)


def test_by_name_with_random_weights():
    before = torch.get_rng_state()
    encoder = load("timm:vit_tiny_patch16_224?pretrained=false")
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder.config.origin == "timm:vit_tiny_patch16_224?pretrained=false"
    assert encoder.config.model.shape == (192, 12, 3)
    transform = encoder.config.transform
    assert (transform.mean, transform.resize, transform.crop) == ((0.5, 0.5, 0.5), 248, 224)
    assert load("timm:vit_tiny_patch16_224?pretrained=false").fingerprint() == encoder.fingerprint()


def test_a_file_of_weights(tmp_path: Path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    with torch.no_grad():
        model.blocks[3].attn.proj.weight += 1
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.pth")
    encoder = load(f"timm:vit_tiny_patch16_224?pretrained={tmp_path}/a.pth")
    assert torch.equal(encoder.backbone.blocks[3].attn.proj.weight, model.blocks[3].attn.proj.weight)
    for state, message in (
        ({"norm.weight": torch.zeros(192)}, "lacks blocks.0.attn.proj.bias of timm's vit_tiny"),
        (model.state_dict() | {"extra": torch.zeros(1)}, "has an unknown extra"),
        (model.state_dict() | {"norm.bias": torch.zeros(8)}, r"norm.bias is \(8,\), expected \(192,\)"),
    ):
        torch.save(state, tmp_path / "b.pth")
        with pytest.raises(UserError, match=message):
            load(f"timm:vit_tiny_patch16_224?pretrained={tmp_path}/b.pth")


def test_a_folder(tmp_path: Path):
    """What `save_for_hf` writes, with preprocessing of its own."""
    model = create("vit_small_patch16_224", img_size=96)
    own = {"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.75}
    arguments = {key: value for key, value in SMALL.items() if key != "num_classes"} | {"img_size": 96}
    model.pretrained_cfg |= own | {"interpolation": "bilinear", "crop_mode": "squash", "num_classes": 0}
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    encoder = load(f"timm:{tmp_path}")
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert (encoder(images).objects[:, 0] - model(images)).abs().max() < 1e-4
    transform = encoder.config.transform
    assert (transform.resize, transform.crop, transform.squash) == (128, 96, True)
    assert (transform.mean, transform.std, transform.interpolation) == (own["mean"], own["std"], "bilinear")
    saved = load(encoder.save(tmp_path / "ours"))
    assert saved.config == encoder.config
    assert torch.equal(saved(images).patches, encoder(images).patches)
    with pytest.raises(UserError, match="a folder brings its own weights"):
        load(f"timm:{tmp_path}?pretrained=false")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        load(f"timm:{tmp_path}")
    assert "\n" not in str(error.value)


def test_another_function_is_no_silent_difference():
    model = create("vit_small_patch16_224")
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output + 0.01 * output.roll(1, -1))
    with pytest.raises(
        UserError, match=r"a model: on an image of 224 x 224 pixels its converted network differs"
    ):
        converted(model)
    broken = create("vit_small_patch16_224")
    with torch.no_grad():
        broken.norm.bias[0] = torch.nan
    with pytest.raises(UserError, match="numbers that are not finite"):
        converted(broken)


REFUSED = {
    "resnet18": ({}, "is a ResNet, not a plain VisionTransformer"),
    "deit_small_distilled_patch16_224": (SMALL, "is a VisionTransformerDistilled"),
    "vit_base_patch16_siglip_224": (SMALL, "pools by 'map'"),
    "vit_base_patch16_clip_224": (SMALL, "norm before its first block"),
    "vit_base_patch16_clip_quickgelu_224": (SMALL | {"pre_norm": False}, "QuickGELU"),
    "eva02_small_patch14_224": ({"depth": 1, "num_classes": 0}, "other positions than DINOv3's"),
    "vit_base_patch16_224": (SMALL | {"qk_norm": True}, r"norms of queries and keys"),
    "vit_large_patch16_224": (SMALL | {"img_size": (96, 160)}, "96 x 160|not square|expected a square"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_our_vit_is_refused(name: str):
    options, message = REFUSED[name]
    model = timm.create_model(name, **options).eval()
    with pytest.raises(UserError, match=message) as error:
        converted(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:", "names no model: expected timm:NAME or timm:FOLDER"),
        ("timm:vit_tiny_patch16?pretrained=false", "Unknown model"),
        ("timm:vit_tiny_patch16_224?pretraned=false", "did you mean 'pretrained'"),
        ("timm:vit_tiny_patch16_224?pretrained=/no/file", "expected true, false or a file"),
        ("timm:./nowhere", "no folder ./nowhere"),
        ("timm:vit_tiny_patch16_224.no_such_tag", "tag"),
    ],
)
def test_wrong_names(name: str, message: str):
    with pytest.raises(UserError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_files_are_no_models_and_folders_need_a_config(tmp_path: Path):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"load it as .*weights.pth, or timm:NAME\?pretrained=.*weights.pth"):
        load(f"timm:{tmp_path}/weights.pth")
    with pytest.raises(UserError, match=r"no config\.json"):
        load(f"timm:{tmp_path}")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"need timm .*pip install 'foveola\[timm\]'"):
        load("timm:vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("options", "resize", "crop"),
    [
        ("", 168, 160),  # crop_pct 0.95
        ("&preprocess=timm", 168, 160),
        ("&image_size=96", 101, 96),
        ("&preprocess=imagenet", 256, 224),
        ("&preprocess=imagenet&image_size=96", 110, 96),
    ],
)
def test_preprocessing_on_request(options: str, resize: int, crop: int):
    """Loading compares our network and timm's at the size that was asked for."""
    encoder = load(f"timm:test_vit?pretrained=false{options}")
    assert (encoder.config.transform.resize, encoder.config.transform.crop) == (resize, crop)
    assert encoder.config.model.image_size == 160  # of the table, which is resized
    assert encoder(torch.randn(1, 3, crop, crop)).grid == (crop // 16, crop // 16)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vit_small_patch16_224.dino", None, (256, 224)),
        ("vit_small_patch14_dinov2.lvd142m", None, (256, 224)),
        ("vit_base_patch14_reg4_dinov2.lvd142m", 448, (512, 448)),
        ("vit_base_patch16_224.mae", None, (256, 224)),
        ("vit_small_patch16_dinov3.lvd1689m", None, (256, 224)),
        ("deit_base_patch16_384.fb_in1k", None, (439, 384)),
        ("deit3_base_patch16_384.fb_in1k", None, (384, 384)),
    ],
)
def test_official_preprocessing(name: str, size: int | None, expected: tuple[int, int]):
    own = {"resize": 400, "crop": 384, "mean": [0.1] * 3, "interpolation": "bilinear", "squash": True}
    found = transform_of("timm", name, "official", size, lambda size: dict(own))
    assert (found["resize"], found["crop"]) == expected
    assert (found["mean"], found["interpolation"], found["squash"]) == ([0.1] * 3, "bicubic", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "preprocess=official",
            "official is known of DINO, DINOv2, DINOv3, MAE and DeiT, .*; take timm or imag",
        ),
        ("preprocess=own", "preprocess=own: expected timm, official, imagenet"),
        ("image_size=100", "crop=100 is not a multiple of the patch size 16"),
        ("image_size=224&image_size=448", "image_size is given more than once"),
        ("image_size=big", "image_size must be pixels of a side"),
        ("image_size=99999999999", "image_size must be pixels of a side, 1 to 8192"),
        ("image-size=96", "did you mean 'image_size'"),
    ],
)
def test_preprocessing_that_is_not_known(options: str, message: str):
    with pytest.raises(UserError, match=message):
        load(f"timm:test_vit?pretrained=false&{options}")
