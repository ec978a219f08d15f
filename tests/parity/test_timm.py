"""Our plain ViT is timm's, with the same weights: outputs, names, position resizing, attention masks."""

import pytest
import timm
import torch
from torch import Tensor, nn

from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.zoo.convert import FileConfig, bare, plain_vit


def timm_vit(**options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True, **options).eval()
    with torch.no_grad():  # timm starts with 0.02: far too little for an error to show
        for name, parameter in model.named_parameters():
            parameter += (0.2 if parameter.ndim == 1 or "embed" in name else 0.02) * torch.randn_like(
                parameter
            )
    return model


def ours_like(model: nn.Module, **changes) -> VisionTransformer:
    weights, shape = plain_vit(bare(model.state_dict()), FileConfig(heads=6))
    ours = VisionTransformer(
        ViTConfig(**{**shape, "position_offset": 0.0, "position_antialias": True, **changes})
    ).eval()
    ours.load_state_dict(weights)
    return ours


def random_images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return timm_vit()


@pytest.mark.parametrize("size", [(224, 224), (160, 272), (320, 256)], ids=str)
def test_outputs_of_small_16(small: nn.Module, size: tuple[int, int]):
    images = random_images(*size)
    with torch.no_grad():
        theirs, ours = small.forward_features(images), ours_like(small)(images)
    assert theirs.std() > 0.5
    assert (ours.objects - theirs[:, :1]).abs().max() < 1e-5
    assert (ours.patches - theirs[:, 1:]).abs().max() < 1e-5
    assert ours.grid == (size[0] // 16, size[1] // 16)


def test_without_antialiasing_positions_differ_when_resized(small: nn.Module):
    """What DINO and iBOT do is not what timm does: the switch matters."""
    images = random_images(96, 96)
    with torch.no_grad():
        ours = ours_like(small, position_antialias=False)(images)
        theirs = small.forward_features(images)
    assert (ours.patches - theirs[:, 1:]).abs().max() > 1e-3


def test_layer_scale_and_depth():
    model = timm_vit(init_values=0.1, depth=2)
    images = random_images(224, 224)
    with torch.no_grad():
        theirs, ours = model.forward_features(images), ours_like(model)(images)
    assert (ours.patches - theirs[:, 1:]).abs().max() < 1e-5


def test_masked_attention_is_timms_with_a_dense_mask():
    model = timm_vit(depth=3)
    images = random_images(112, 112)
    objects = torch.rand(2, 1, 49, generator=torch.Generator().manual_seed(1)) < 0.3
    dense = torch.ones(2, 1, 50, 50, dtype=torch.bool)
    dense[:, :, 0, 1:] = objects
    with torch.no_grad():
        theirs, ours = model.forward_features(images, attn_mask=dense), ours_like(model)(images, objects)
        plain = model.forward_features(images)
    assert (ours.objects - theirs[:, :1]).abs().max() < 1e-5
    assert (ours.patches - theirs[:, 1:]).abs().max() < 1e-5
    assert (plain[:, :1] - theirs[:, :1]).abs().max() > 0.1


def test_our_weights_load_into_timm(small: nn.Module):
    torch.manual_seed(1)
    ours = VisionTransformer(ViTConfig(drop_path=0.0)).eval()
    state = ours.state_dict()
    del state["mask_token"]
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(state)
    images = random_images(224, 224)
    with torch.no_grad():
        assert (ours(images).objects[:, 0] - theirs.forward_features(images)[:, 0]).abs().max() < 1e-5
