"""State dicts in the layouts of the official files, made here, load; others are refused in one line."""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foveola.config import UserError
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.zoo.convert import FileConfig, backbone_of, plain_vit
from foveola.zoo.load import load

CONFIG = ViTConfig(size="tiny", depth=2, patch_size=16, image_size=64, drop_path=0.0)


def network(config: ViTConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a ViT with our names, which are timm's, none of them zero."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in VisionTransformer(config).state_dict().items()}


def shaped(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and shape of a network whose heads are known."""
    return plain_vit(backbone_of(checkpoint), FileConfig(heads=3))


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
    labels = "&preprocess=imagenet" if name == "timm" else ""
    encoder = load(f"{path}?heads=3{labels}")
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
    assert torch.equal(load(f"{tmp_path}/model.safetensors?heads=3").backbone.cls_token, dino()["cls_token"])


def test_half_precision_files_become_float32(tmp_path: Path):
    torch.save({name: value.half() for name, value in dino().items()}, tmp_path / "half.pth")
    assert load(f"{tmp_path}/half.pth?heads=3").backbone.cls_token.dtype == torch.float32


# -- DINOv2: registers, LayerScale, gated MLPs, blocks in chunks, 37 x 37 positions --------------------------

DINOV2 = ViTConfig(
    size="tiny",
    depth=3,
    heads=3,
    patch_size=14,
    image_size=518,
    layer_scale=1e-5,
    drop_path=0.0,
    position_offset=0.1,
)
ANTIALIASED = replace(DINOV2, position_offset=0.0, position_antialias=True)
REGISTERS = replace(ANTIALIASED, registers=4)
GATED = replace(DINOV2, depth=2, mlp="swiglu")


def small(config: ViTConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of moderate size: outputs depend on everything, and differences are not rounding."""
    torch.manual_seed(seed)
    return {name: 0.1 * torch.randn_like(v) for name, v in VisionTransformer(config).state_dict().items()}


def hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes of the backbones on DINOv2's hub."""
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] > state["blocks.0.mlp.fc2.weight"].shape[1]
    names = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."} if gated else {}
    published = {}
    for name, value in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        published["register_tokens" if name == "reg_token" else name] = value
    published["mask_token"] = state["mask_token"][0]  # [1, D]
    return published


def chunked(state: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Blocks as training with chunks of this size names them: chunk, then the block's own number."""
    found = {}
    for name, value in state.items():
        match = re.match(r"blocks\.(\d+)\.(.*)", name)
        found[f"blocks.{int(match[1]) // size}.{match[1]}.{match[2]}" if match else name] = value
    return found


def dinov2_heads() -> dict[str, Tensor]:
    return heads("dino_head.") | heads("ibot_head.")


def teacher_checkpoint(config: ViTConfig) -> dict[str, Any]:
    """What DINOv2's training writes for evaluation: the teacher alone, with its heads."""
    return {"teacher": prefixed(chunked(hub(small(config)), 2), "backbone.") | dinov2_heads()}


def meta_checkpoint(config: ViTConfig) -> dict[str, Any]:
    """Both networks in one module, as a training checkpoint holds them."""
    model = {"dino_loss.center": torch.zeros(1, 4), "ibot_patch_loss.center": torch.zeros(1, 1, 4)}
    for seed, network in ((1, "student."), (0, "teacher.")):
        own = prefixed(chunked(hub(small(config, seed)), 2), "backbone.") | dinov2_heads()
        model |= prefixed(own, network)
    return {"model": model, "optimizer": {"state": {}}, "iteration": 12499}


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's: no mask token; with registers, class positions are part of the token (`no_embed_class`)."""
    published = {name: value for name, value in state.items() if name != "mask_token"}
    if "reg_token" in state:
        published["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        published["pos_embed"] = state["pos_embed"][:, 1:]
    return published


DINOV2_FILES = {
    "hub": (hub(small(DINOV2)), DINOV2),
    "hub, registers": (hub(small(REGISTERS)), REGISTERS),
    "hub, gated": (hub(small(GATED)), GATED),
    "teacher checkpoint": (teacher_checkpoint(DINOV2), DINOV2),
    "teacher checkpoint, gated, registers": (
        teacher_checkpoint(replace(REGISTERS, mlp="swiglu")),
        replace(REGISTERS, mlp="swiglu"),
    ),
    "meta checkpoint": (meta_checkpoint(DINOV2), DINOV2),
    "meta checkpoint, data parallel": (
        {"model": prefixed(meta_checkpoint(DINOV2)["model"], "module.")},
        DINOV2,
    ),
    "timm": (timm_names(small(DINOV2)), ANTIALIASED),
    "timm, registers": (timm_names(small(REGISTERS)), REGISTERS),
    "timm, packed gate": (timm_names(small(GATED)), replace(ANTIALIASED, depth=2, mlp="swiglu")),
}


@pytest.mark.parametrize("name", DINOV2_FILES)
def test_dinov2_files_load(name: str, tmp_path: Path):
    state, config = DINOV2_FILES[name]
    torch.save(state, tmp_path / "dinov2.pth")
    encoder = load(f"{tmp_path}/dinov2.pth?heads=3")
    assert encoder.config.model == config
    assert encoder.grid == (16, 16)  # 224 pixels at 14
    model = VisionTransformer(config).eval()
    weights = small(config)
    if name.startswith("timm"):
        weights["mask_token"] = torch.zeros(1, 1, 192)
    model.load_state_dict(weights)
    for images in (torch.randn(2, 3, 56, 56), torch.randn(1, 3, 98, 70)):
        with torch.no_grad():
            ours, expected = encoder(images), model(images)
        assert expected.objects.std() > 0.03
        for part in ("objects", "registers", "patches"):
            difference = getattr(ours, part) - getattr(expected, part)
            assert difference.numel() == 0 or difference.abs().max() < 1e-5, part
    loaded = encoder.backbone.state_dict()
    for key, value in weights.items():
        if name != "timm, registers" or key not in ("cls_token", "pos_embed"):
            assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_chunks_of_any_size(chunk: int):
    state = small(replace(DINOV2, image_size=28))
    weights, shape = shaped({"teacher": prefixed(chunked(hub(state), chunk), "backbone.")})
    assert shape["depth"] == 3
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], value) for name, value in state.items())


def test_the_gated_mlp_of_the_giant(tmp_path: Path):
    """DINOv2's giant: 4,096 gated channels of width 1,536, in one matrix of 8,192 rows."""
    config = ViTConfig(size="giant", depth=1, patch_size=14, image_size=28, mlp="swiglu", layer_scale=1e-5)
    state = hub(VisionTransformer(config).state_dict())
    assert state["blocks.0.mlp.w12.weight"].shape == (8192, 1536)
    assert state["blocks.0.mlp.w3.weight"].shape == (1536, 4096)
    torch.save(state, tmp_path / "giant.pth")
    encoder = load(f"{tmp_path}/giant.pth?heads=24")
    assert encoder.config.model.mlp == "swiglu"
    assert encoder.config.model.shape == (1536, 1, 24)


def test_positions_with_rows_for_registers_are_theirs():
    """timm's tables with rows for class token, registers and patches."""
    config = replace(REGISTERS, image_size=70)
    state = {name: value for name, value in small(config).items() if name != "mask_token"}
    extra = torch.randn(1, 4, 192)
    table = state["pos_embed"]
    with_rows = state | {"pos_embed": torch.cat((table[:, :1], extra, table[:, 1:]), dim=1)}
    weights, shape = shaped(with_rows)
    assert torch.equal(weights["pos_embed"], table)
    assert torch.equal(weights["reg_token"], state["reg_token"] + extra)
    assert (shape["image_size"], shape["registers"]) == (70, 4)


def test_positions_without_a_class_row_give_it_none():
    """timm's no_embed_class: the class token has no position, so its row is zero."""
    state = dino()
    bare = state | {"pos_embed": state["pos_embed"][:, 1:]}
    weights, shape = shaped(bare)
    assert torch.equal(weights["pos_embed"][:, 1:], state["pos_embed"][:, 1:])
    assert not weights["pos_embed"][:, 0].any()
    assert shape["image_size"] == 64
    assert bare["pos_embed"].shape == (1, 16, 192)  # as it was


TIMM = {
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch14_reg4_dinov2": {"embed_dim": 192, "num_heads": 3},
    "vit_giant_patch14_dinov2": {"embed_dim": 192, "num_heads": 3},
    "vit_giant_patch14_reg4_dinov2": {"embed_dim": 192, "num_heads": 3},
    "deit3_small_patch16_224": {},
    "vit_small_patch16_224": {"reg_tokens": 2},
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("sides", [(112, 112), (112, 224)], ids=str)
def test_networks_of_timm(name: str, sides: tuple[int, int], tmp_path: Path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    options = {"depth": 2, "num_classes": 0, "dynamic_img_size": True, **TIMM[name]}
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():  # timm starts with 0.02 and LayerScale with 1e-5: too little for an error to show
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    heads = model.blocks[0].attn.num_heads
    encoder = load(f"{tmp_path}/timm.pth?heads={heads}")
    count = model.num_prefix_tokens
    assert encoder.config.model.registers == count - 1
    assert encoder.config.model.image_size == (518 if "dinov2" in name else 224)
    assert encoder.config.model.mlp == ("swiglu" if "giant" in name else "gelu")
    images = torch.randn(2, 3, *sides)
    with torch.no_grad():
        theirs, ours = model.forward_features(images), encoder(images)
    assert theirs.std() > 0.1
    assert encoder.config.model.position_antialias
    assert (ours.objects - theirs[:, :1]).abs().max() < 1e-4
    assert (ours.patches - theirs[:, count:]).abs().max() < 1e-4
    if count > 1:
        assert (ours.registers - theirs[:, 1:count]).abs().max() < 1e-4


def test_the_input_is_left_alone():
    state = ibot()
    before = dict(state)
    shaped({"state_dict": state})
    assert state.keys() == before.keys()
    assert all(state[name] is value for name, value in before.items())


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in dino().items() if not key.startswith(name)}


def replaced(**tensors: Tensor) -> dict[str, Tensor]:
    return dino() | {name.replace("__", "."): value for name, value in tensors.items()}


def wrongly_gated() -> dict[str, Tensor]:
    """The names of a gated MLP on the tensors of a plain one."""
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
    "no class token": (without("cls_token"), "no cls_token, of which pos_embed has a row"),
    "no final norm": (without("norm."), "no norm.weight"),
    "a missing block": (without("blocks.0."), "no blocks.0.attn.qkv.weight"),
    "a missing tensor": (without("blocks.1.norm2.bias"), r"lacks blocks.1.norm2.bias \(1 missing"),
    "a gated MLP that is none": (wrongly_gated(), "makes 768 channels and takes 768, which is not a gated"),
    "an MLP that does not fit": (
        replaced(blocks__0__mlp__fc2__weight=torch.zeros(192, 512)),
        "makes 768 channels and takes 512, which is not an MLP",
    ),
    "no second map": (without("blocks.0.mlp.fc2.weight"), "no blocks.0.mlp.fc2.weight"),
    "a network of another kind beside it": (prefixed(dino(), "critic."), "no patch_embed.proj.weight"),
    "patches as a linear map": (
        replaced(patch_embed__proj__weight=torch.zeros(192, 768)),
        "patch_embed.proj.weight",
    ),
    "patches that are not square": (
        replaced(patch_embed__proj__weight=torch.zeros(192, 3, 16, 8)),
        "patch_embed.proj.weight",
    ),
    "positions that are no square": (
        replaced(pos_embed=torch.zeros(1, 19, 192)),
        "pos_embed has 19 entries: expected a square, or a square and a class token",
    ),
    "positions of the class token alone": (
        replaced(pos_embed=torch.zeros(1, 0, 192)),
        "pos_embed has 0 entries",
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
        load(f"{path}?heads=3")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
