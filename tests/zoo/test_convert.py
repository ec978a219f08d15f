"""State dicts in the layouts of the official files, made here, load; others are refused in one line."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foveola.config import UserError
from foveola.models.encoder import load
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.zoo.convert import plain_vit

CONFIG = ViTConfig(size="tiny", depth=2, patch_size=16, image_size=64, drop_path=0.0)


def network(config: ViTConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a ViT with our names, which are timm's, none of them zero."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in VisionTransformer(config).state_dict().items()}


def dino(seed: int = 0) -> dict[str, Tensor]:
    """A bare backbone as DINO publishes it: no mask token."""
    return {name: value for name, value in network(seed=seed).items() if name != "mask_token"}


def ibot(seed: int = 0) -> dict[str, Tensor]:
    """A bare backbone as iBOT publishes it: the mask token has another name and shape."""
    state = network(seed=seed)
    state["masked_embed"] = state.pop("mask_token")[0]
    return state


def heads(prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}mlp.0.weight": torch.randn(8, 192),
        f"{prefix}mlp.0.bias": torch.randn(8),
        f"{prefix}last_layer.weight_g": torch.randn(4, 1),
        f"{prefix}last_layer.weight_v": torch.randn(4, 8),
    }


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def full_checkpoint(make) -> dict[str, Any]:
    """A training checkpoint as the official code saves it: two networks, the optimiser, the command line."""
    return {
        "student": prefixed(make(1), "module.backbone.") | heads("module.head."),
        "teacher": prefixed(make(0), "backbone.") | heads("head."),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(5e-4), "params": [0]}]},
        "epoch": 100,
        "args": Namespace(arch="vit_tiny", patch_size=16, global_crops_scale=(0.25, 1.0)),
        "fp16_scaler": None,
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


LAYOUTS = {
    "dino backbone": dino(),
    "dino full checkpoint": full_checkpoint(dino),
    "dino full checkpoint, data parallel teacher": {
        "teacher": prefixed(dino(), "module.backbone.") | heads("module.head."),
        "student": prefixed(dino(1), "module.backbone."),
    },
    "ibot backbone": ibot(),
    "ibot backbone in state_dict": {"state_dict": ibot()},
    "ibot backbone in state_dict, with a head": {
        "state_dict": prefixed(ibot(), "backbone.") | heads("head.")
    },
    "ibot full checkpoint": full_checkpoint(ibot),
    "ibot student alone": {"student": prefixed(ibot(), "module.backbone.") | heads("module.head.")},
    "timm": dino() | {"head.weight": torch.randn(10, 192), "head.bias": torch.randn(10)},
    "timm in model, compiled": {"model": prefixed(dino(), "_orig_mod.")},
    "ours": network(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_layouts_load(name: str, tmp_path: Path):
    path = tmp_path / "checkpoint.pth"
    torch.save(LAYOUTS[name], path)
    encoder = load(path)
    assert encoder.config.model.shape == (192, 2, 3)
    assert encoder.config.model.patch_size == 16
    assert encoder.config.model.image_size == 64
    expected = network()
    if "dino" in name or "timm" in name:
        expected["mask_token"] = torch.zeros(1, 1, 192)
    state = encoder.backbone.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    model = VisionTransformer(CONFIG).eval()
    model.load_state_dict(expected)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(images).objects, model(images).objects)


def test_safetensors_load_too(tmp_path: Path):
    save_file(dino(), tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors").backbone.cls_token, dino()["cls_token"])


def test_half_precision_files_become_float32(tmp_path: Path):
    torch.save({name: value.half() for name, value in dino().items()}, tmp_path / "half.pth")
    assert load(tmp_path / "half.pth").backbone.cls_token.dtype == torch.float32


@pytest.mark.parametrize("name", ["reg_token", "register_tokens"])
def test_registers_and_layer_scale(name: str, tmp_path: Path):
    """DINOv2's names: register_tokens, a mask token of two dimensions, ls1.gamma; timm's: reg_token."""
    config = ViTConfig(
        size="tiny", depth=2, patch_size=14, image_size=56, registers=4, layer_scale=1.0, drop_path=0.0
    )
    state = network(config)
    published = dict(state)
    published[name] = published.pop("reg_token")
    published["mask_token"] = published["mask_token"][0]
    torch.save(published, tmp_path / "dinov2.pth")
    encoder = load(tmp_path / "dinov2.pth")
    assert encoder.config.model.registers == 4
    assert encoder.config.model.patch_size == 14
    model = VisionTransformer(config).eval()
    model.load_state_dict(state)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        ours, expected = encoder(images), model(images)
    assert torch.equal(ours.objects, expected.objects)
    assert torch.equal(ours.registers, expected.registers)


def test_the_input_is_left_alone():
    state = ibot()
    before = dict(state)
    plain_vit({"state_dict": state})
    assert state.keys() == before.keys()
    assert all(state[name] is value for name, value in before.items())


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in dino().items() if not key.startswith(name)}


def replaced(**tensors: Tensor) -> dict[str, Tensor]:
    return dino() | {name.replace("__", "."): value for name, value in tensors.items()}


def swiglu() -> dict[str, Tensor]:
    return {
        name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
        for name, value in dino().items()
    }


WRONG = {
    "a ResNet": (
        {"conv1.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)},
        "no patch_embed.proj.weight",
    ),
    "nothing": ({}, "no patch_embed.proj.weight .*no tensors"),
    "no class token": (without("cls_token"), "no cls_token"),
    "no final norm": (without("norm."), "no norm.weight"),
    "a missing block": (without("blocks.0."), "no blocks.0.attn.qkv.weight"),
    "a missing tensor": (without("blocks.1.norm2.bias"), r"lacks blocks.1.norm2.bias \(1 missing"),
    "a gated MLP": (swiglu(), "no blocks.0.mlp.fc1.weight"),
    "a decoder (MAE)": (replaced(decoder_embed__weight=torch.zeros(2)), "unknown decoder_embed.weight"),
    "an unknown width": (
        replaced(patch_embed__proj__weight=torch.zeros(100, 3, 16, 16)),
        "width 100 is unknown; known widths: 192",
    ),
    "patches as a linear map": (
        replaced(patch_embed__proj__weight=torch.zeros(192, 768)),
        "patch_embed.proj.weight",
    ),
    "patches that are not square": (
        replaced(patch_embed__proj__weight=torch.zeros(192, 3, 16, 8)),
        "patch_embed.proj.weight",
    ),
    "positions without a class token": (
        replaced(pos_embed=torch.zeros(1, 16, 192)),
        "pos_embed has 16 entries",
    ),
    "one channel": (
        replaced(patch_embed__proj__weight=torch.zeros(192, 1, 16, 16)),
        "patch_embed.proj.weight",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_layouts_are_refused_in_one_line(name: str, tmp_path: Path):
    state, message = WRONG[name]
    path = tmp_path / "wrong.pth"
    torch.save(state, path)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
