"""What files say of the networks in them, what they do not, and what is then asked for or refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveola.config import UserError
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.zoo.convert import FileConfig, convert
from foveola.zoo.load import load

WIDTH, SIDE = 48, 4
CONFIG = ViTConfig(width=WIDTH, depth=2, heads=4, patch_size=16, image_size=64, drop_path=0.0)


def weights(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    config = ViTConfig(**(CONFIG.__dict__ | changes))
    made = {name: 0.1 * torch.randn_like(v) for name, v in VisionTransformer(config).state_dict().items()}
    del made["mask_token"]
    return made


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def sines(width: int, side: int, rows_first: bool) -> Tensor:
    """The table of MAE (columns first) or of MoCo-v3 (rows first), behind a zero row for the class token."""
    table = torch.zeros(1, 1 + side * side, width, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            first, second = (row, column) if rows_first else (column, row)
            for i in range(width // 4):
                for part, place in ((0, first), (2, second)):
                    angle = torch.tensor(place * 10_000 ** (-i / (width // 4)), dtype=torch.float64)
                    table[0, 1 + row * side + column, part * width // 4 + i] = angle.sin()
                    table[0, 1 + row * side + column, (part + 1) * width // 4 + i] = angle.cos()
    return table.float()


def skeleton(width: int, depth: int, hidden: int, gated: bool = False, **more: Tensor) -> dict[str, Tensor]:
    """The tensors of a network of this shape, which take no memory."""

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(1).expand(*shape)

    state = {
        "cls_token": tensor(1, 1, width),
        "pos_embed": torch.ones(1).expand(1, 17, width),
        "patch_embed.proj.weight": tensor(width, 3, 16, 16),
        "patch_embed.proj.bias": tensor(width),
        "norm.weight": tensor(width),
        "norm.bias": tensor(width),
    }
    for i in range(depth):
        state[f"blocks.{i}.attn.qkv.weight"] = tensor(3 * width, width)
        state[f"blocks.{i}.mlp.fc1.weight"] = tensor(2 * hidden if gated else hidden, width)
        state[f"blocks.{i}.mlp.fc2.weight"] = tensor(width, hidden)
    return state | more


def without_class(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {name: value for name, value in state.items() if name != "cls_token"}
    return made | {"pos_embed": state["pos_embed"][:, 1:]}


@pytest.mark.parametrize(
    ("state", "heads"),
    [
        (skeleton(192, 12, 768), 3),
        (skeleton(384, 12, 1536), 6),
        (skeleton(768, 12, 3072), 12),
        (skeleton(1024, 24, 4096), 16),
        (skeleton(1536, 40, 4096, gated=True), 24),
        (without_class(skeleton(1280, 32, 5120)), 16),
        (without_class(skeleton(1408, 40, 6144)), 16),
        (skeleton(768, 12, 3072, pos_embed=sines(768, SIDE, rows_first=False)), 12),
        (skeleton(768, 12, 3072, pos_embed=sines(768, SIDE, rows_first=True)), 12),
        (skeleton(384, 12, 1536, pos_embed=sines(384, SIDE, rows_first=True)), 12),  # MoCo-v3
        (skeleton(768, 8, 2304), None),  # timm's old vit_small has 8
        (skeleton(768, 12, 2304), None),
        (skeleton(384, 6, 1536), None),
        (skeleton(192, 12, 768, pos_embed=sines(192, SIDE, rows_first=False)), None),  # MAE-Lite has 12
        (skeleton(100, 12, 400), None),
    ],
)
def test_heads_are_those_of_a_published_network_or_must_be_said(state, heads: int | None):
    if heads is not None:
        _, settings = convert(state)
        assert settings["model"]["heads"] == heads
    else:
        width = state["norm.weight"].numel()
        with pytest.raises(ValueError, match=rf"width {width}, .*say what its code says, as in FILE\?heads="):
            convert(state)
        _, settings = convert(state, FileConfig(heads=4))
    assert convert(state, FileConfig(heads=2))[1]["model"]["heads"] == 2


def same(path: Path, said: str, state: dict[str, Tensor], **changes: Any) -> None:
    """Assert that the file gives what a network with these weights gives."""
    encoder = load(f"{path}?{said}")
    model = VisionTransformer(ViTConfig(**(CONFIG.__dict__ | changes))).eval()
    model.load_state_dict({"mask_token": torch.zeros(1, 1, WIDTH), **state})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    for part in ("objects", "registers", "patches"):
        torch.testing.assert_close(getattr(encoder(images), part), getattr(expected, part))
    assert encoder.config.origin == f"{path}?{said}"


MOCO = weights() | {"pos_embed": sines(WIDTH, SIDE, rows_first=True)}
MAE = weights() | {"pos_embed": sines(WIDTH, SIDE, rows_first=False)}
HEAD = {"mlp.0.weight": torch.zeros(8, WIDTH), "last_layer.weight_v": torch.zeros(4, 8)}
LEFT_OVER = {
    "MoCo-v3": {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": prefixed(MOCO, "module.base_encoder.")
        | prefixed({"0.weight": torch.zeros(8, WIDTH)}, "module.base_encoder.head.")
        | prefixed(weights(1), "module.momentum_encoder.")
        | prefixed({"0.weight": torch.zeros(8, 8)}, "module.predictor."),
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4}]},
    },
    "DropPos": {
        "model": MAE
        | {"mask_pos_token": torch.zeros(1, 1, WIDTH), "decoder_embed.weight": torch.zeros(8, WIDTH)}
    },
    "Mugs": {
        "teacher": prefixed(weights(), "module.backbone.")
        | prefixed(HEAD, "module.instance_head.")
        | prefixed(HEAD, "module.local_group_head.")
        | prefixed(HEAD, "module.group_head.")
        | prefixed({"0.norm1.weight": torch.zeros(WIDTH)}, "module.relation_blocks.")
        | {"module.mem.queue": torch.zeros(8, WIDTH)}
    },
    "Mugs, backbone": weights()
    | prefixed({"0.norm1.weight": torch.zeros(WIDTH)}, "relation_blocks.")
    | prefixed(HEAD, "group_head."),
    "MSN": {
        "target_encoder": prefixed(weights() | {"fc.fc1.weight": torch.zeros(8, WIDTH)}, "module."),
        "encoder": prefixed(weights(1), "module."),
        "prototypes": torch.zeros(9, 8),
    },
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_what_only_training_reads_is_left_out(name: str, tmp_path: Path):
    torch.save(LEFT_OVER[name], tmp_path / "file.pth")
    state = {"MoCo-v3": MOCO, "DropPos": MAE}.get(name, weights())
    same(tmp_path / "file.pth", "heads=4", state)


def dinov3(gated: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights of ours, the same by the names of DINOv3's files, and the shape."""
    changes = {"positions": "rope", "rope": "dinov3", "registers": 4, "layer_scale": 1e-5, "norm_eps": 1e-5}
    changes |= {"mlp": "swiglu"} if gated else {}
    ours, official = weights(**changes), {}
    for name, value in ours.items():
        if name.endswith("attn.qkv.bias"):
            mask = torch.ones(3 * WIDTH)
            mask[WIDTH : 2 * WIDTH] = 0
            official |= {name: value.where(mask > 0, torch.tensor(torch.nan)), f"{name}_mask": mask}
            value[WIDTH : 2 * WIDTH] = 0
        elif gated and ".mlp.fc1." in name:
            for part, half in zip(("w1", "w2"), value.chunk(2), strict=True):
                official[name.replace("fc1", part)] = half.clone()
        else:
            theirs = name.replace("reg_token", "storage_tokens")
            official[theirs.replace(".fc2.", ".w3.") if gated else theirs] = value
    periods = 100.0 ** (torch.arange(3) / 3)  # heads of 12 channels
    official |= {"rope_embed.periods": periods, "mask_token": torch.zeros(1, WIDTH)}
    return ours, official, changes


@pytest.mark.parametrize("gated", [False, True])
def test_files_of_dinov3(gated: bool, tmp_path: Path):
    """Heads are told by the periods of its rotary positions; keys have no bias, whatever stands there."""
    ours, official, changes = dinov3(gated)
    torch.save(official, tmp_path / "dinov3.pth")
    same(tmp_path / "dinov3.pth", "", ours, **changes)
    encoder = load(tmp_path / "dinov3.pth")
    assert encoder.config.model.shape == (WIDTH, 2, 4)
    assert (encoder.config.transform.resize, encoder.config.transform.crop) == (256, 224)
    for change, said, message in (
        ({}, "?heads=2", "heads=2: its rotary positions are of 4"),
        ({}, "?positions=dino", "positions has no effect on rotary positions"),
        ({"rope_embed.periods": torch.tensor([1.0, 5.0, 9.0])}, "", "other periods than DINOv3's"),
        (
            {"local_cls_norm.weight": torch.zeros(WIDTH)},
            "",
            r"say \?preprocess=imagenet .* or \?preprocess=sat",
        ),
    ):
        torch.save(official | change, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=message):
            load(f"{tmp_path}/wrong.pth{said}")
    satellites = load(f"{tmp_path}/wrong.pth?preprocess=sat493m").config.transform
    assert satellites.mean == (0.430, 0.411, 0.296)


def test_a_classifier_does_not_say_which_pixels_it_saw(tmp_path: Path):
    labels = {"head.weight": torch.zeros(9, WIDTH), "head.bias": torch.zeros(9)}
    torch.save(weights() | labels, tmp_path / "timm.pth")
    with pytest.raises(UserError, match=r"say \?preprocess=imagenet .* or \?preprocess=half"):
        load(f"{tmp_path}/timm.pth?heads=4")
    half = load(f"{tmp_path}/timm.pth?heads=4&preprocess=half").config
    assert half.transform.mean == half.transform.std == (0.5, 0.5, 0.5)
    assert half.model.position_antialias
    torch.save({"model": weights() | labels}, tmp_path / "deit.pth")
    assert load(f"{tmp_path}/deit.pth?heads=4").config.transform.mean == (0.485, 0.456, 0.406)


def test_settings_that_are_said(tmp_path: Path):
    path = tmp_path / "bare.pth"
    torch.save(weights(), path)
    config = load(f"{path}?heads=6&norm_eps=1e-3&positions=timm&image_size=448").config
    assert config.model.shape == (WIDTH, 2, 6)
    assert (config.model.norm_eps, config.model.position_antialias) == (1e-3, True)
    assert (config.transform.crop, config.transform.resize) == (448, 512)
    assert load(f"{path}?heads=4&image_size=64").config.transform.crop == 64
    plain = load(f"{path}?heads=4&positions=plain").config.model
    assert (plain.position_antialias, plain.position_offset) == (False, 0.0)
    for said, message in (
        (
            "image_size=448&heads=4",
            r"for 64 pixels, .* resized to 448: add &positions=dino .* &positions=timm",
        ),
        ("image_size=100&heads=4&positions=dino", "100 is not a multiple of the patch size 16"),
        ("heads=4&heads=2", "heads is given more than once"),
        ("head=4", "unknown key 'head'.* did you mean 'heads'"),
        ("heads=5", "not a multiple of heads=5"),
        ("heads=four", "heads: expected"),
        ("positions=vit", "positions: .*'vit'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(f"{path}?{said}")
        assert "\n" not in str(error.value)


def test_a_file_whose_name_holds_a_question_mark(tmp_path: Path):
    path = tmp_path / "odd?heads=9"
    torch.save(weights() | {"pos_embed": torch.ones(1, 17, WIDTH)}, path)
    with pytest.raises(UserError, match="tensors do not tell the attention heads"):
        load(path)
    with pytest.raises(UserError, match="no model at"):
        load(tmp_path / "missing.pth?heads=3")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no final norm": (
        {name: value for name, value in weights().items() if not name.startswith("norm.")},
        "no norm.weight, though it has a class token",
    ),
    "a shard": (
        {"model": {"_fsdp_wrapped_module._flat_param": torch.zeros(9)}},
        "a shard of sharded training .*make one file",
    ),
    "Swin": ({"model": {"layers.0.blocks.0.norm1.weight": torch.zeros(9)}}, "a Swin transformer"),
    "data2vec 2.0": ({"model": {"modality_encoders.IMAGE.extra_tokens": torch.zeros(9)}}, "a data2vec 2.0"),
    "SAM": (weights() | {"blocks.0.attn.rel_pos_h": torch.zeros(9, 4)}, "by rows and columns .SAM."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name: str, tmp_path: Path):
    state, message = REFUSED[name]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=message) as error:
        load(f"{tmp_path}/wrong.pth?heads=4")
    assert "\n" not in str(error.value)


def holding_itself() -> dict[str, Any]:
    state: dict[str, Any] = {"epoch": 3}
    state["model"] = state
    return state


def many_times_over() -> dict[str, Any]:
    state: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(7):
        state = {f"part{i}": state for i in range(40)}
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (holding_itself(), "more than 8 dicts in each other"),
        (many_times_over(), "found no tensors"),
        ({0: torch.zeros(1), None: {"a": 1}, "model": {1: torch.zeros(2)}}, "found no tensors"),
        ({"model": {("a", 1): torch.zeros(1)}}, "found no tensors"),
    ],
)
def test_odd_files_end_in_one_line(state, message: str, tmp_path: Path):
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "odd.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 100_000_000}, "depth: .*1000"),
        ({"width": 1_000_000_000}, "width: .*65536"),
        ({"image_size": 16 * 10**9}, "image_size: .*8192"),
        ({"registers": 10**15}, "registers: .*4096"),
        ({"width": 60_000, "depth": 999}, "network of .* parameters, beyond any machine"),
        ({"depth": 999}, r"lacks blocks\.10\."),
        ({"width": 9600, "depth": 40}, r"lacks blocks\.10\."),
        ({"width": 20_000}, r"is \(.*\), expected"),
    ],
)
def test_sizes_are_looked_at_before_memory_is_taken(change, message: str, tmp_path: Path, monkeypatch):
    torch.save(weights(), tmp_path / "file.pth")
    folder = load(f"{tmp_path}/file.pth?heads=4").save(tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    real = torch.empty

    def small(*shape: Any, **options: Any) -> Tensor:
        made = real(*shape, **options)
        assert made.device.type == "meta" or made.numel() < 10**7
        return made

    monkeypatch.setattr(torch, "empty", small)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    (folder / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**8}}, "depth: .*1000"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 10**9}}, "width: .*65536"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 10**12}}, "image_size: .*8192"),
        ({"model_type": "vit", "hidden_size": 10**9}, "width: .*65536"),
        ({"model_type": "vit", "num_hidden_layers": 10**8}, "depth: .*1000"),
        ({"model_type": "vit", "hidden_size": 768, "intermediate_size": 10**13}, "mlp_ratio: .*64"),
        ([], "config.json holds a list"),
    ],
)
def test_folders_of_libraries_are_looked_at_before_they_load(settings, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    library = "hf" if "model_type" in settings else "timm"
    with pytest.raises(UserError, match=message) as error:
        load(f"{library}:{tmp_path}")
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_heads_says_how_its_positions_are_resized(tmp_path: Path):
    torch.save({"teacher": prefixed(weights(), "backbone.") | prefixed(HEAD, "head.")}, tmp_path / "dino.pth")
    config = load(f"{tmp_path}/dino.pth?heads=4&image_size=448").config
    assert (config.model.position_offset, config.transform.crop) == (0.1, 448)


def test_names_are_told_apart_in_the_reasons():
    """No reason names a tensor that a network which loads has."""
    from foveola.zoo.convert import REASONS

    for pattern, _ in REASONS:
        assert not [name for name in (*weights(), *dinov3()[1]) if re.search(pattern, name)]
