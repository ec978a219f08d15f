"""DINOv2's networks are timm's with the same weights: LayerScale, SwiGLU, registers, resized positions."""

import pytest
import timm
import torch
from torch import Tensor, nn

from foveola.models.vit import VisionTransformer, ViTConfig

# Name in timm, and what it is to us; all at a width of 48.
NETWORKS = {
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {"registers": 4},
    "vit_giant_patch14_dinov2": {"mlp": "swiglu"},
    "vit_giant_patch14_reg4_dinov2": {"mlp": "swiglu", "registers": 4},
}


def theirs(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        name, num_classes=0, img_size=56, dynamic_img_size=True, embed_dim=48, depth=3, num_heads=3
    ).eval()
    with (
        torch.no_grad()
    ):  # timm starts with 0.02 and LayerScale with 1e-5: far too little for an error to show
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def ours(name: str, weights: dict[str, Tensor]) -> VisionTransformer:
    config = ViTConfig(
        width=48,
        depth=3,
        heads=3,
        patch_size=14,
        image_size=56,
        layer_scale=1e-5,
        position_antialias=True,
        **NETWORKS[name],
    )
    model = VisionTransformer(config).eval()
    if config.registers:  # timm gives the class token no row of the table then: ours is zero
        table = weights["pos_embed"]
        weights = weights | {"pos_embed": torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)}
    model.load_state_dict(weights | {"mask_token": torch.zeros(1, 1, 48)})
    return model


@pytest.mark.parametrize("size", [(56, 56), (84, 42)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs(name: str, size: tuple[int, int]):
    model = theirs(name)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, features = model.forward_features(images), ours(name, model.state_dict())(images)
    found = torch.cat((features.objects, features.registers, features.patches), dim=1)
    assert expected.std() > 0.5
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parameters_are_theirs(name: str):
    """Names, shapes, and so their number; only training needs a mask token."""
    weights = theirs(name).state_dict()
    found = ours(name, weights).state_dict()
    assert found.keys() - {"mask_token"} == weights.keys()
    for key, value in weights.items():
        extra = int("reg4" in name and key == "pos_embed")
        assert found[key].numel() == value.numel() + extra * 48, key
