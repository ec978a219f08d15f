"""Official files of MAE and I-JEPA, how each kind's positions are resized, and files that are no weights."""

import math
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foveola.config import UserError
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.zoo.load import load

WIDTH, SIDE = 192, 4  # ViT-Ti, the smallest known width; 4 x 4 patches
CONFIG = ViTConfig(size="tiny", depth=2, patch_size=16, image_size=64, drop_path=0.0)


def sines(width: int, side: int) -> Tensor:
    """MAE's table [1, side^2, width], entry by entry: columns first, sines before cosines."""
    table = torch.zeros(1, side * side, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                frequency = 10_000 ** (-i / quarter)
                values = [f(place * frequency) for place in (column, row) for f in (math.sin, math.cos)]
                for part, value in enumerate(values):
                    table[0, row * side + column, part * quarter + i] = value
    return table.float()


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {name: 0.1 * torch.randn_like(v) for name, v in VisionTransformer(CONFIG).state_dict().items()}
    del made["mask_token"]
    return made


def mae(seed: int = 0) -> dict[str, Tensor]:
    """An encoder as MAE publishes it: the class token's position is zero."""
    table = torch.cat((torch.zeros(1, 1, WIDTH), sines(WIDTH, SIDE)), dim=1)
    return weights(seed) | {"pos_embed": table}


def mae_with_decoder() -> dict[str, Tensor]:
    return mae() | {
        "mask_token": torch.randn(1, 1, 64),
        "decoder_pos_embed": torch.randn(1, 17, 64),
        "decoder_embed.weight": torch.randn(64, WIDTH),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(192, 64),
        "decoder_norm.weight": torch.randn(64),
        "decoder_pred.bias": torch.randn(768),
    }


def ijepa(seed: int = 0) -> dict[str, Tensor]:
    """An encoder of I-JEPA: no class token."""
    made = weights(seed) | {"pos_embed": sines(WIDTH, SIDE)}
    del made["cls_token"]
    return made


def ijepa_checkpoint() -> dict[str, Any]:
    """What I-JEPA's training writes: both encoders and the predictor, from parallel training."""

    def parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"module.{name}": value for name, value in state.items()}

    return {
        "encoder": parallel(ijepa(1)),
        "predictor": parallel({"predictor_embed.weight": torch.randn(96, WIDTH)}),
        "target_encoder": parallel(ijepa(0)),
        "opt": {"state": {}, "param_groups": [{"lr": 1e-6}]},
        "scaler": None,
        "epoch": 300,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 0.001,
    }


MAE_FILES = {
    "encoder": {"model": mae()},
    "encoder and decoder": {"model": mae_with_decoder()},
    "checkpoint": {
        "model": mae_with_decoder(),
        "optimizer": {"state": {}},
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": Namespace(model="mae_vit_base_patch16", norm_pix_loss=True),
    },
    "half precision": {"model": {name: value.half() for name, value in mae().items()}},
}
IJEPA_FILES = {
    "checkpoint": ijepa_checkpoint(),
    "target encoder": {"target_encoder": ijepa()},
    "encoder alone": {"encoder": ijepa(), "predictor": {"mask_token": torch.zeros(1, 1, 96)}},
    "bare": ijepa(),
}


def of_timm(state: dict[str, Tensor], **options: Any) -> Any:
    """timm's network with these weights."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=WIDTH, depth=2, num_heads=3, num_classes=0, **options
    )
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("name", MAE_FILES)
def test_files_of_mae(name: str, tmp_path: Path):
    torch.save(MAE_FILES[name], tmp_path / "mae.pth")
    encoder = load(f"{tmp_path}/mae.pth?heads=3")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, expected = encoder(images), of_timm(mae()).forward_features(images)
    close = 0.05 if "half" in name else 1e-4
    assert (features.objects - expected[:, :1]).abs().max() < close
    assert (features.patches - expected[:, 1:]).abs().max() < close
    assert (encoder.config.pool, encoder.grid) == ("token", (4, 4))
    assert encoder.config.transform.resize == 73  # 8 / 7 of 64
    assert encoder.config.model.position_offset == 0
    assert not encoder.config.model.position_antialias


@pytest.mark.parametrize("name", IJEPA_FILES)
def test_files_of_ijepa(name: str, tmp_path: Path):
    torch.save(IJEPA_FILES[name], tmp_path / "ijepa.pth.tar")
    encoder = load(f"{tmp_path}/ijepa.pth.tar?heads=3")
    images = torch.randn(2, 3, 64, 64)
    model = of_timm(ijepa(), class_token=False, global_pool="avg", fc_norm=False)
    with torch.no_grad():
        features, expected = encoder(images), model.forward_features(images)
        assert (features.patches - expected).abs().max() < 1e-4
        assert (features.objects[:, 0] - model(images)).abs().max() < 1e-4
    assert (encoder.config.pool, encoder.config.pools) == ("average", ("average",))
    objects = torch.zeros(2, 1, 16, dtype=torch.bool)
    objects[:, 0, 3:5] = True
    assert torch.allclose(encoder(images, objects).objects[:, 0], features.patches[:, 3:5].mean(1), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "width", "hidden", "heads", "patch"),
    [("huge", 1280, 5120, 16, 14), ("giant", 1408, 6144, 16, 16)],
)
def test_the_large_ones(size, width: int, hidden: int, heads: int, patch: int, tmp_path: Path):
    """ViT-H of MAE and I-JEPA, and I-JEPA's ViT-g, whose MLP is 48 / 11 as wide."""
    config = ViTConfig(size=size, width=width, depth=1, heads=heads, patch_size=patch, image_size=2 * patch)
    state = dict(VisionTransformer(config).state_dict())
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(hidden, width)
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(hidden)
    state["blocks.0.mlp.fc2.weight"] = torch.zeros(width, hidden)
    del state["cls_token"], state["mask_token"]
    state["pos_embed"] = torch.zeros(1, 4, width)
    torch.save({"target_encoder": state}, tmp_path / "large.pth")
    encoder = load(f"{tmp_path}/large.pth?heads={heads}")
    assert encoder.config.model.shape == (width, 1, heads)
    assert encoder.backbone.blocks[0].mlp.fc1.out_features == hidden


@pytest.mark.parametrize(("up", "width"), [(6144, 1408), (683, 193), (4 * 768, 768), (1000, 999)])
def test_ratios_give_their_width_back(up: int, width: int):
    from foveola.zoo.sizes import mlp_ratio

    assert int(width * mlp_ratio(up, width)) == up
    for hidden in range(1, 3000):
        assert int(width * mlp_ratio(hidden, width)) == hidden


def cubic(x: float) -> float:
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resized_by_hand(table: Tensor, grid: tuple[int, int], offset: float) -> Tensor:
    """DINO's interpolation: entry i of n is read at (i + 1/2) side / (n + offset) - 1/2, borders repeated."""
    side = round(len(table) ** 0.5)
    field = table.double().view(side, side, -1)
    out = torch.zeros(*grid, table.shape[1], dtype=torch.float64)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = (i + 0.5) * side / (grid[0] + offset) - 0.5
            x = (j + 0.5) * side / (grid[1] + offset) - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    node = field[min(max(m, 0), side - 1), min(max(n, 0), side - 1)]
                    out[i, j] += cubic(y - m) * cubic(x - n) * node
    return out.flatten(0, 1)


def scaled() -> dict[str, Tensor]:
    gammas = {f"blocks.{i}.ls{k}.gamma": torch.ones(WIDTH) for i in range(2) for k in (1, 2)}
    return weights() | gammas


KINDS: dict[str, tuple[dict[str, Any], float, bool]] = {  # file, offset, antialiased
    "DINO": (weights(), 0.1, False),
    "iBOT": ({"state_dict": weights() | {"masked_embed": torch.zeros(1, WIDTH)}}, 0.1, False),
    "DINOv2": (scaled() | {"mask_token": torch.zeros(1, WIDTH)}, 0.1, False),
    "DINOv2 with registers": (
        scaled() | {"mask_token": torch.zeros(1, WIDTH), "register_tokens": torch.zeros(1, 4, WIDTH)},
        0.0,
        True,
    ),
    "timm's DINOv2": (scaled(), 0.0, True),
    "a classifier": (
        weights() | {"head.weight": torch.zeros(9, 192), "head.bias": torch.zeros(9)},
        0.0,
        True,
    ),
    "MAE": ({"model": mae()}, 0.0, False),
    "I-JEPA": ({"target_encoder": ijepa()}, 0.0, False),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("grid", [(2, 3), (4, 4), (7, 5), (2, 8)], ids=str)
def test_positions_are_resized_as_in_the_code_behind_the_weights(
    name: str, grid: tuple[int, int], tmp_path: Path
):
    state, offset, antialias = KINDS[name]
    torch.save(state, tmp_path / "file.pth")
    labels = "&preprocess=imagenet" if "head.weight" in state else ""
    encoder = load(f"{tmp_path}/file.pth?heads=3{labels}")
    config = encoder.config.model
    assert (config.position_offset, config.position_antialias) == (offset, antialias)
    table = encoder.backbone.pos_embed[0, int(config.class_token) :]
    found = encoder.backbone.positions(grid)[0]
    if grid == (4, 4):
        assert torch.equal(found, table)
    elif not antialias:
        assert (found - resized_by_hand(table, grid, offset)).abs().max() < 1e-5
        assert (found - resized_by_hand(table, grid, 0.1 - offset)).abs().max() > 1e-3
    else:
        timm = pytest.importorskip("timm", reason="timm is not installed")
        expected = timm.layers.resample_abs_pos_embed(table[None], list(grid), num_prefix_tokens=0)[0]
        assert (found - expected).abs().max() < 1e-5


def test_offset_and_antialiasing_exclude_each_other():
    with pytest.raises(ValueError, match="cannot be had together"):
        ViTConfig(position_offset=0.1, position_antialias=True)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("code of a file ran",))


WRONG = {
    "Hugging Face's names": (
        {"embeddings.cls_token": torch.zeros(1)},
        "load the model's folder as hf:FOLDER",
    ),
    "another network": (
        {"conv1.weight": torch.zeros(1)},
        "found conv1.weight .*known: DINO, iBOT, DINOv2, DINOv3",
    ),
    "flat positions": (weights() | {"pos_embed": torch.zeros(17, WIDTH)}, "pos_embed is .17, 192., expected"),
    "code": ({"model": Evil()}, "no readable checkpoint"),
    "a list": ([torch.zeros(1)], "holds a list, not a state dict"),
    "numbers alone": ({"epoch": 3}, "found no tensors"),
    "a gate of odd width": (
        weights()
        | {f"blocks.{i}.mlp.fc2.weight": torch.zeros(WIDTH, 12) for i in range(2)}
        | {f"blocks.{i}.mlp.fc1.weight": torch.zeros(24, WIDTH) for i in range(2)},
        "12 channels, which is no multiple of 8",
    ),
    "a distilled DeiT": (weights() | {"dist_token": torch.zeros(1, 1, WIDTH)}, "has an unknown dist_token"),
    "norms of queries": (
        weights() | {"blocks.0.attn.q_norm.weight": torch.zeros(64)},
        "norms of queries and keys",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_say_what_they_are(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state, message = WRONG[name]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=message) as error:
        load(f"{tmp_path}/wrong.pth?heads=3")
    assert "\n" not in str(error.value)
    assert "wrong.pth" in str(error.value)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02.", b"<html>404</html>", pickle.dumps({"a": 1}, 2)], ids=repr
)
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_no_weights_at_all(content: bytes, name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_cut_files(name: str, tmp_path: Path):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(weights(), path)
    else:
        save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="no readable checkpoint"):
        load(path)


@pytest.mark.parametrize(("name", "library"), [("model_type", "hf"), ("architecture", "timm")])
def test_folders_of_other_libraries_say_how_to_load_them(name: str, library: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(f'{{"{name}": "vit"}}')
    save_file(weights(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"another library; load it as {library}:{tmp_path}"):
        load(tmp_path)
