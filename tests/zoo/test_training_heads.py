"""Heads, decoders and predictors of published training checkpoints, and of runs, move into the methods."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, normalize

from foveola.files import RunFolder
from foveola.methods import find_method
from foveola.models.embedding import unpatchify
from foveola.models.positions import fixed_positions
from foveola.models.predictor import Predictor, PredictorConfig
from foveola.models.starting import StartingWeights
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.training.recipe import resolve
from foveola.training.run import pretrain
from foveola.training.start import read_start
from foveola.zoo.load import load

SHAPE = ViTConfig(width=24, depth=2, heads=2, patch_size=8, image_size=32, drop_path=0.0)
HEAD = {"prototypes": 12, "hidden": 20, "bottleneck": 8}
NARROW = {"width": 16, "depth": 2, "heads": 2}
SEPARATE = {"method.heads": {"main": HEAD, "patches": HEAD}, "method.patch.head": "patches"}


def noise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 0.3 * torch.randn_like(value) for name, value in state.items()}


def backbone(config: ViTConfig = SHAPE, mask_token: bool = False) -> dict[str, Tensor]:
    made = noise(VisionTransformer(config).state_dict())
    return made if mask_token else {name: value for name, value in made.items() if name != "mask_token"}


def head(seed: int, layer: str = "last_layer") -> dict[str, Tensor]:
    """A projection head with the names of DINO's code."""
    torch.manual_seed(seed)
    widths = ((20, 24), (20, 20), (8, 20))
    mlp = {f"mlp.{2 * i}.weight": torch.randn(size) / 4 for i, size in enumerate(widths)}
    mlp |= {f"mlp.{2 * i}.bias": torch.randn(size[0]) for i, size in enumerate(widths)}
    return mlp | {f"{layer}.weight_g": torch.ones(12, 1), f"{layer}.weight_v": torch.randn(12, 8)}


def by_hand(head: dict[str, Tensor], x: Tensor, layer: str = "last_layer") -> Tensor:
    """What such a head gives."""
    for i in (0, 2):
        x = gelu(linear(x, head[f"mlp.{i}.weight"], head[f"mlp.{i}.bias"]))
    x = normalize(linear(x, head["mlp.4.weight"], head["mlp.4.bias"]), dim=-1)
    v, g = head[f"{layer}.weight_v"], head[f"{layer}.weight_g"]
    return x @ (g * v / v.norm(dim=1, keepdim=True)).T


def named(before: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {before + name: value for name, value in state.items()}


def started(recipe: str, init: str, **changes: Any) -> tuple[Any, StartingWeights]:
    """The method of a recipe with its starting weights."""
    config = resolve(f"{recipe}-tiny-tinyimagenet", {"init": init, **changes})
    torch.manual_seed(0)
    method = find_method(config.method.name)(config.method, config.model, config.views)
    start = read_start(init, config.model)
    method.start_from(start)
    return method.eval(), start


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Any], str]:
    def write(state: Any) -> str:
        torch.save(state, tmp_path / "file.pth")
        return f"{tmp_path}/file.pth?heads=2"

    return write


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))


def test_dino_gives_each_network_its_own_head(written):
    mine, theirs = head(1), head(2)
    file = written(
        {
            "student": named("module.backbone.", backbone()) | named("module.head.", mine),
            "teacher": named("backbone.", backbone()) | named("head.", theirs),
            "dino_loss": {"center": torch.zeros(1, 12)},
            "epoch": 3,
        }
    )
    method, start = started("dino", file, **{"method.heads.main": HEAD})
    with torch.no_grad():
        assert torch.allclose(method.student.head("main")(X), by_hand(mine, X), atol=1e-6)
        assert torch.allclose(method.teacher.head("main")(X), by_hand(theirs, X), atol=1e-6)
    for ours, state in ((method.student, mine), (method.teacher, theirs)):
        assert torch.equal(ours.head("main").last_layer.v, state["last_layer.weight_v"])
    account = start.close()
    assert {"student.module.head.mlp.0.weight", "teacher.head.last_layer.weight_v"} <= set(account.taken)
    assert "dino_loss.center" in account.unused
    assert "student.module.backbone.blocks.0.norm1.weight" in account.unused
    assert not any("head" in name for name in account.unused)


def test_a_head_of_other_shape_stays_fresh_whole_and_says_why(written):
    file = written({"teacher": named("backbone.", backbone()) | named("head.", head(1))})
    method, start = started("dino", file, **{"method.heads.main": HEAD | {"prototypes": 16}})
    config = resolve("dino-tiny-tinyimagenet", {"init": file, "method.heads.main": HEAD | {"prototypes": 16}})
    torch.manual_seed(0)
    fresh = find_method("distillation")(config.method, config.model, config.views)
    for name, value in fresh.student.heads.state_dict().items():
        assert torch.equal(method.student.heads.state_dict()[name], value), name
    account = start.close()
    assert account.fresh["heads.main"] == "last_layer.v is (16, 8), the file's (12, 8)"
    assert {f"teacher.head.{name}" for name in head(1)} <= set(account.unused)


@pytest.mark.parametrize("separate", [False, True])
def test_ibot_has_two_layers_of_prototypes(separate: bool, written):
    first, second = head(1), head(2, "last_layer2")
    both = first | {name: value for name, value in second.items() if "last_layer2" in name}
    file = written({"state_dict": named("backbone.", backbone()) | named("head.", both)})
    heads = {"main": HEAD, "patches": HEAD | {"mlp_of": "main"}}
    changes = {"method.heads": heads, "method.patch.head": "patches"} if separate else {}
    method, start = started("ibot", file, **changes or {"method.heads.main": HEAD})
    with torch.no_grad():
        assert torch.allclose(method.student.head("main")(X), by_hand(first, X), atol=1e-6)
        if separate:
            assert torch.allclose(
                method.teacher.head("patches")(X), by_hand(both, X, "last_layer2"), atol=1e-6
            )
    unused = {name for name in start.close().unused if "head" in name}
    second_layer = {f"state_dict.head.last_layer2.weight_{part}" for part in "gv"}
    assert unused == (set() if separate else second_layer)


def test_dinov2_has_two_heads_under_the_names_of_torch_today(written):
    token, patch = head(1), head(2)
    today = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for name, value in patch.items()
    }
    file = written(
        {
            "teacher": named("backbone.", backbone(mask_token=True))
            | named("dino_head.", token)
            | named("ibot_head.", today)
        }
    )
    method, _ = started("dinov2", file, **SEPARATE)
    with torch.no_grad():
        for side in (method.student, method.teacher):  # the file has one: it is for both
            assert torch.allclose(side.head("main")(X), by_hand(token, X), atol=1e-6)
            assert torch.allclose(side.head("patches")(X), by_hand(patch, X), atol=1e-6)


def test_a_shared_mlp_is_not_overwritten_by_another(written):
    file = written(
        {
            "teacher": named("backbone.", backbone())
            | named("dino_head.", head(1))
            | named("ibot_head.", head(2))
        }
    )
    heads = {"main": HEAD, "patches": HEAD | {"mlp_of": "main"}}
    method, start = started("ibot", file, **{"method.heads": heads, "method.patch.head": "patches"})
    with torch.no_grad():
        assert torch.allclose(method.student.head("main")(X), by_hand(head(1), X), atol=1e-6)
    assert "is shared with another part" in start.close().fresh["heads.patches"]


def narrow(positions: str = "sincos", depth: int = 2) -> tuple[Predictor, nn.Linear]:
    config = PredictorConfig(kind="self", width=16, depth=depth, heads=2, drop_path=0.0)
    predictor = Predictor(config, dataclasses.replace(SHAPE, positions=positions))
    with torch.no_grad():
        for value in predictor.parameters():
            value.normal_(0, 0.3)
    return predictor.eval(), nn.Linear(16, 192)


def of_mae() -> tuple[dict[str, Tensor], Predictor, nn.Linear]:
    """A checkpoint with MAE's names: its linear map makes pixels with their channels together."""
    decoder, pixels = narrow()
    encoder = backbone()
    encoder["pos_embed"] = torch.cat((torch.zeros(1, 1, 24), fixed_positions((4, 4), 24)), dim=1)
    state = encoder | {"mask_token": decoder.mask_token, "decoder_pos_embed": torch.zeros(1, 17, 16)}
    for name, value in decoder.state_dict().items():
        if name != "mask_token":
            state[f"decoder_{name}"] = value
    return state | named("decoder_pred.", pixels.state_dict()), decoder, pixels


def test_mae_gives_its_decoder_and_pixels_in_our_order(written):
    torch.manual_seed(0)
    state, decoder, pixels = of_mae()
    method, start = started("mae", written({"model": state}), **{"method.decoder": NARROW})
    assert method.backbone.config.positions == "sincos"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = method.backbone(images)
        found = method.student.head(method.student.decoder(features))
        theirs = pixels(decoder(features))  # [B, 16, 8 * 8 * 3], as MAE cuts patches: rows, columns, channels
        # MAE's unpatchify: nhwpqc -> nchpwq
        image = torch.einsum("nhwpqc->nchpwq", theirs.reshape(2, 4, 4, 8, 8, 3)).reshape(2, 3, 32, 32)
    assert torch.allclose(unpatchify(found, 8, (4, 4)), image, atol=1e-5)
    account = start.close()
    assert account.unused == ["model.decoder_pos_embed"]
    assert account.fresh.keys() <= {"mask_token"}


def test_a_decoder_of_other_depth_stays_fresh(written):
    torch.manual_seed(0)
    state, _, _ = of_mae()
    _, start = started("mae", written({"model": state}), **{"method.decoder": NARROW | {"depth": 1}})
    account = start.close()
    assert account.fresh["decoder"].startswith("the file's has blocks.1.")
    assert "head" not in account.fresh
    assert "model.decoder_blocks.1.norm1.weight" in account.unused


def test_ijepa_gives_its_predictor(written):
    torch.manual_seed(0)
    predictor, _ = narrow()
    out = nn.Linear(16, 24)
    encoder = backbone(dataclasses.replace(SHAPE, class_token=False))
    encoder["pos_embed"] = fixed_positions((4, 4), 24)
    own = {"predictor_" + name: value for name, value in predictor.state_dict().items()}
    own["mask_token"] = own.pop("predictor_mask_token")
    own |= named("predictor_proj.", out.state_dict()) | {"predictor_pos_embed": torch.zeros(1, 16, 16)}
    file = written(
        {
            "encoder": named("module.", noise(encoder)),
            "predictor": named("module.", own),
            "target_encoder": named("module.", encoder),
        }
    )
    method, start = started("ijepa", file, **{"method.predictor": NARROW})
    features = method.backbone(torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        assert torch.equal(method.student.head(method.student.predictor(features)), out(predictor(features)))
    account = start.close()
    assert "predictor.module.predictor_pos_embed" in account.unused
    assert not any("predictor_blocks" in name for name in account.unused)


def test_capi_gives_all_blocks_of_its_decoder(written):
    torch.manual_seed(0)
    config = resolve("capi-tiny-tinyimagenet").model
    config = dataclasses.replace(config, size="small", width=24, depth=2, heads=2)
    predictor = Predictor(PredictorConfig(depth=2), config)
    with torch.no_grad():
        for value in predictor.parameters():
            value.normal_(0, 0.3)
    network = VisionTransformer(config)
    ours = {f"decoder.{name}": value for name, value in predictor.state_dict().items()}
    ours |= {f"encoder.{name}": value for name, value in network.state_dict().items()}
    state: dict[str, Tensor] = {
        "patch_embed.weight": network.patch_embed.proj.weight,
        "patch_embed.bias": network.patch_embed.proj.bias,
        "registers": network.reg_token,
        "mask_token": predictor.mask_token,
        "head.weight": torch.zeros(3, 24),
    }
    for name, value in ours.items():
        if ".blocks." not in name:
            continue
        block = ".".join(name.split(".")[:3])
        rest = name.removeprefix(block + ".")
        if rest.startswith("norm"):
            state[f"{block}.residual{rest[4]}.norm.weight"] = value
        elif rest.startswith("mlp"):
            state[f"{block}.residual2.fn.{rest.removeprefix('mlp.')}"] = value
        elif rest == "attn.proj.weight":
            state[f"{block}.residual1.fn.proj.weight"] = value
        else:
            parts = {"attn.qkv.weight": "qkv", "attn.q.weight": "q", "attn.kv.weight": "kv"}[rest]
            for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
                state[f"{block}.residual1.fn.{part}_proj.weight"] = piece
    state = {name: value.detach().clone() for name, value in state.items()}
    method, start = started("capi", written(state), **{"method.predictor.depth": 2})
    for name, value in predictor.named_parameters():
        assert torch.equal(dict(method.student.predictor.named_parameters())[name], value), name
    for name, value in method.teacher.predictor.named_parameters():
        assert torch.equal(dict(predictor.named_parameters())[name], value), name
    account = start.close()
    assert account.unused == ["head.weight"]
    assert set(account.fresh) <= {"mask_token", "head", "clustering"}


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("ibot", {"method.heads.main": HEAD}),
        ("capi", {"method.clustering.prototypes": 8, "method.predictor.depth": 2}),
        ("mae", {"method.decoder": NARROW}),
    ],
)
def test_a_run_gives_all_that_it_trained(recipe: str, changes: dict[str, Any], tmp_path: Path):
    keys = {"data": "scenes:?size=32&count=8", "batch_size": 4, "loader.workers": 0, "device": "cpu"}
    small = {"model.width": 24, "model.depth": 2, "model.heads": 2, "keep_every": "1 steps"}
    name = f"{recipe}-tiny-tinyimagenet"
    run = pretrain(name, out=str(tmp_path / "run"), duration="2 steps", **keys, **small, **changes)
    kept = RunFolder(run.folder)
    for init, step in ((run.folder, 2), (f"{run.folder}?step=1", 1), (kept.saved_encoder(1).path, 1)):
        method, start = started(recipe, str(init), **changes)
        state = torch.load(kept.checkpoint(step) / "state.pt")["trainer"]["method"]
        own = dict(method.named_parameters())
        parts = [part for part in own if "backbone" not in part and ".targets" not in part]
        assert parts
        for part in parts:
            assert torch.equal(own[part], state[part]), part
        account = start.close()
        assert account.fresh.keys() <= {"mask_token"}
        assert all("targets" in name or "clustering." in name for name in account.unused), account.unused
        theirs = load(init).backbone.state_dict()
        for network in method.trained():
            for key, value in network.state_dict().items():
                assert key == "mask_token" or torch.equal(value, theirs[key]), key
    student, _ = started(recipe, f"{run.folder}?which=student", **changes)
    state = torch.load(kept.checkpoint(2) / "state.pt")["trainer"]["method"]
    key = "blocks.1.mlp.fc1.weight"
    assert torch.equal(student.backbone.state_dict()[key], state[f"student.backbone.{key}"])
