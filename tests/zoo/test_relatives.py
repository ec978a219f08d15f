"""Files of BEiT, SimMIM, data2vec, AIM, SelfPatch and fine-tuned MAE, against other implementations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from foveola.config import UserError
from foveola.models.encoder import Encoder
from foveola.zoo.load import load

timm = pytest.importorskip("timm")
WIDTH, HEADS, PATCH, SIDE = 48, 3, 8, 4
SHAPE = {"img_size": PATCH * SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters from noise, so that none is without effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def beit(**changes: Any) -> Any:
    from timm.models.beit import Beit

    usual = {"use_abs_pos_emb": False, "qkv_bias": True, "init_values": 0.1, "num_classes": 0}
    return drawn(Beit(**(SHAPE | usual | {"use_rel_pos_bias": True, "global_pool": "token"} | changes)))


def image(seed: int = 1, side: int = PATCH * SIDE) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def loaded(state: Any, tmp_path: Path, options: str = "") -> Encoder:
    torch.save(state, tmp_path / "file.pth")
    return load(f"{tmp_path}/file.pth{options}")


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def index() -> dict[str, Tensor]:
    """A constant that the official code saves beside each table."""
    return {"relative_position_index": torch.zeros(17, 17, dtype=torch.long)}


SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
MIM = {"mask_token": torch.ones(1, 1, WIDTH)}
LAYOUTS: dict[
    str, tuple[dict[str, Any], Any, str, str]
] = {  # network, its file, options, what stands for an image
    "BEiT": (SHARED, lambda s: {"model": s | MIM | {"lm_head.bias": torch.ones(9)}}, "half", "average"),
    "BEiT-v2": (
        SHARED,
        lambda s: {
            "model": s
            | MIM
            | prefixed(index(), "rel_pos_bias.")
            | {"cls_pt_layers.0.attn.q_bias": torch.ones(4)}
        },
        "",
        "token",
    ),
    "SimMIM": (
        SHARED,
        lambda s: {"model": prefixed(s | MIM, "encoder.") | {"decoder.0.weight": torch.ones(9, WIDTH, 1, 1)}},
        "",
        "average",
    ),
    "data2vec": ({}, lambda s: {"model": s | prefixed(index(), "blocks.0.attn.")}, "half", "average"),
    "with absolute positions": ({"use_abs_pos_emb": True}, lambda s: {"model": s}, "half", "average"),
    "without biases": ({"qkv_bias": False}, lambda s: {"model": s}, "half", "average"),
    "without LayerScale": ({"init_values": None}, lambda s: {"model": s}, "half", "average"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_relative_positions_are_those_of_timm(name: str, tmp_path: Path):
    changes, layout, preprocess, pool = LAYOUTS[name]
    network = beit(**changes)
    encoder = loaded(
        layout(network.state_dict()), tmp_path, f"?preprocess={preprocess}" if preprocess else ""
    )
    expected = network.forward_features(image())
    features = encoder.backbone(image())
    torch.testing.assert_close(features.objects[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.patches, expected[:, 1:], rtol=1e-4, atol=1e-5)
    config = encoder.config
    assert (config.pool, config.model.shape, config.transform.crop) == (pool, (WIDTH, 2, HEADS), PATCH * SIDE)
    assert config.transform.std[0] == (0.5 if preprocess == "half" else 0.229)


def test_a_norm_of_the_mean(tmp_path: Path):
    """Fine-tuned BEiT: no norm of tokens; the mean of the patches is normalised."""
    network = beit(global_pool="avg")
    encoder = loaded({"model": network.state_dict()}, tmp_path, "?preprocess=imagenet")
    tokens = network.forward_features(image())
    torch.testing.assert_close(encoder.backbone(image()).patches, tokens[:, 1:], rtol=1e-4, atol=1e-5)
    expected = network.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(encoder(image()).objects[:, 0], expected, rtol=1e-4, atol=1e-5)
    half = torch.zeros(2, 1, SIDE**2, dtype=torch.bool)
    half[..., :8] = True
    expected = network.fc_norm(tokens[:, 1:9].mean(dim=1))
    torch.testing.assert_close(encoder(image(), half).objects[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_fine_tuned_mae(tmp_path: Path):
    from timm.models.vision_transformer import VisionTransformer

    network: Any = drawn(VisionTransformer(**SHAPE, global_pool="avg", num_classes=5))
    encoder = loaded({"model": network.state_dict()}, tmp_path, "?heads=3")
    expected = network.forward_head(network.forward_features(image()), pre_logits=True)
    torch.testing.assert_close(encoder.tokens(image())[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert encoder.config.model.final_norm == "pooled"


def test_selfpatch_has_neither_class_token_nor_final_norm(tmp_path: Path):
    from timm.models.vision_transformer import VisionTransformer

    network: Any = drawn(VisionTransformer(**SHAPE, class_token=False, global_pool="avg", num_classes=0))
    network.fc_norm = nn.Identity()
    state = network.state_dict()
    file = {"teacher": prefixed(state, "backbone.") | {"head.norm.weight": torch.ones(WIDTH)}}
    encoder = loaded(file, tmp_path, "?heads=3")
    expected = network.forward_features(image())
    torch.testing.assert_close(encoder(image()).patches, expected, rtol=1e-4, atol=1e-5)
    assert encoder.config.pool == "average"


def test_tables_at_another_size_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from foveola.models.relative import relative_bias

    config = transformers.BeitConfig(image_size=32, patch_size=8, num_attention_heads=3, hidden_size=48)
    module = transformers.models.beit.modeling_beit.BeitRelativePositionBias(config)
    table = torch.randn_like(module.relative_position_bias_table)
    module.relative_position_bias_table.data = table
    for grid in ((4, 4), (3, 5), (6, 6)):
        torch.testing.assert_close(relative_bias(table, (4, 4), grid, 1), module(grid)[0].detach())


# -- AIM -----------------------------------------------------------------------------------------------------

AIM_WIDTH = 256  # two heads of 128


def aim_state(gated: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    def norm(name: str) -> dict[str, Tensor]:
        biases = {} if gated else {f"{name}.bias": noise(AIM_WIDTH)}
        return {f"{name}.weight": 1 + noise(AIM_WIDTH), **biases}

    state = {
        "preprocessor.patchifier.proj.weight": noise(AIM_WIDTH, 3, PATCH, PATCH),
        "preprocessor.patchifier.proj.bias": noise(AIM_WIDTH),
        **norm("preprocessor.patchifier.norm"),
        **norm("trunk.post_trunk_norm"),
        "head.linear.weight": noise(5, AIM_WIDTH),
    }
    for i in range(2):
        block = f"trunk.blocks.{i}"
        state |= norm(f"{block}.norm_1") | norm(f"{block}.norm_2")
        state[f"{block}.attn.qkv.weight"] = noise(3 * AIM_WIDTH, AIM_WIDTH)
        state[f"{block}.attn.proj.weight"] = noise(AIM_WIDTH, AIM_WIDTH)
        state[f"{block}.mlp.fc1.weight"] = noise(512, AIM_WIDTH)
        state[f"{block}.mlp.fc2.weight"] = noise(AIM_WIDTH, 512)
        if gated:
            state[f"{block}.mlp.fc3.weight"] = noise(512, AIM_WIDTH)
    if gated:
        state["preprocessor.pos_embed"] = noise(1, SIDE**2, AIM_WIDTH)
    return state


def naive_aim(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The trunk of AIM in float64, one head after the other: patches read all patches (no causal mask)."""
    at = {name: value.double() for name, value in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.bias" in at:
            return layer_norm(x, (AIM_WIDTH,), at[f"{name}.weight"], at[f"{name}.bias"], 1e-6)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * at[f"{name}.weight"]

    p = "preprocessor.patchifier"
    x = torch.conv2d(images.double(), at[f"{p}.proj.weight"], at[f"{p}.proj.bias"], stride=PATCH)
    rows, columns = x.shape[2:]
    x = norm(x.flatten(2).mT, f"{p}.norm")
    if "preprocessor.pos_embed" in at:
        x = x + at["preprocessor.pos_embed"]
    else:
        quarter = AIM_WIDTH // 4
        for i in range(rows):
            for j in range(columns):
                for k in range(quarter):
                    turn = 10_000.0 ** (-k / quarter)
                    waves = torch.tensor([j * turn, i * turn], dtype=torch.float64)
                    for part, value in enumerate(
                        (waves.sin()[0], waves.cos()[0], waves.sin()[1], waves.cos()[1])
                    ):
                        x[:, i * columns + j, part * quarter + k] += value
    for b in range(2):
        block = f"trunk.blocks.{b}"
        y = norm(x, f"{block}.norm_1")
        query, key, value = (y @ w.T for w in at[f"{block}.attn.qkv.weight"].chunk(3))
        heads = []
        for h in range(AIM_WIDTH // 128):
            part = slice(128 * h, 128 * (h + 1))
            share = (query[..., part] @ key[..., part].mT / 128**0.5).softmax(-1)
            heads.append(share @ value[..., part])
        x = x + torch.cat(heads, -1) @ at[f"{block}.attn.proj.weight"].T
        y = norm(x, f"{block}.norm_2")
        up = linear(y, at[f"{block}.mlp.fc1.weight"])
        if f"{block}.mlp.fc3.weight" in at:
            up = up * up.sigmoid() * linear(y, at[f"{block}.mlp.fc3.weight"])
        else:
            up = gelu(up)
        x = x + linear(up, at[f"{block}.mlp.fc2.weight"])
    return norm(x, "trunk.post_trunk_norm")


@pytest.mark.parametrize("gated", [False, True])
def test_aim_and_aimv2(gated: bool, tmp_path: Path):
    state = aim_state(gated)
    encoder = loaded(state, tmp_path, "?preprocess=clip" if gated else f"?image_size={PATCH * SIDE}")
    features = encoder(image())
    expected = naive_aim(state, image())
    torch.testing.assert_close(features.patches.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.objects[:, 0].double(), expected.mean(dim=1), rtol=1e-4, atol=1e-4)
    assert encoder.config.model.shape == (AIM_WIDTH, 2, 2)


# -- what must be said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (lambda: beit().state_dict(), "", "say .preprocess=imagenet .BEiT-v2, SimMIM. or .preprocess=half"),
        (lambda: beit().state_dict(), "?preprocess=half&heads=4", "heads=4: its tables .* are of 3"),
        (lambda: beit().state_dict(), "?preprocess=half&positions=timm", "no effect on relative positions"),
        (
            lambda: beit().state_dict() | {"blocks.0.attn.relative_position_bias_table": torch.zeros(50, 3)},
            "?preprocess=half",
            "has 50 rows: expected those of a square grid",
        ),
        (
            lambda: {n: v for n, v in beit().state_dict().items() if not n.endswith("0.attn.v_bias")},
            "?preprocess=half",
            "q_bias without .*v_bias",
        ),
        (
            lambda: beit().state_dict() | {"fc_norm.weight": torch.ones(WIDTH)},
            "?preprocess=half",
            "one of both",
        ),
        (lambda: aim_state(True), "", "AIMv2 is evaluated with two kinds"),
    ],
)
def test_what_tensors_do_not_tell_is_asked_for(state, options: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message) as error:
        loaded(state(), tmp_path, options)
    assert "\n" not in str(error.value)
