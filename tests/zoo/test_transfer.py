"""Weights in networks of another shape: resampled kernels, resized tables, fields, tokens that are added."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from foveola.config import ConfigError
from foveola.methods.distillation import Distillation
from foveola.models.embedding import resized_kernel
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.positions import fixed_positions
from foveola.models.starting import StartingWeights, together
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.training.recipe import resolve
from foveola.training.start import read_start
from foveola.zoo.load import load
from foveola.zoo.transfer import kernel_of_channels, transfer

SHAPE = ViTConfig(width=24, depth=2, heads=2, patch_size=8, image_size=32, drop_path=0.0)


def encoder_of(config: ViTConfig = SHAPE) -> Encoder:
    torch.manual_seed(0)
    transform = TransformConfig(config.image_size, config.image_size)
    encoder = Encoder(EncoderConfig(config, transform, pool="token" if config.class_token else "average"))
    for name, value in encoder.backbone.state_dict().items():
        if config.positions != "sincos" or name != "pos_embed":
            value += 0.1 * torch.randn_like(value)
    return encoder


def moved(encoder: Encoder, **changes: object) -> tuple[VisionTransformer, StartingWeights]:
    """A network of another shape with the weights, and what is said of them."""
    want = dataclasses.replace(encoder.config.model, **changes)
    state, account = transfer(encoder, want, "x")
    torch.manual_seed(1)
    network, start = VisionTransformer(want), StartingWeights("x", state, account=account)
    start.fill(network)
    return network.eval(), start


def patches(network: VisionTransformer, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images).patches


def resizing(size: int, new: int) -> Tensor:
    """The antialiased bicubic resizing of a whole patch as a matrix [new^2, size^2], pixel by pixel."""
    pixels = torch.eye(size * size, dtype=torch.float64).view(size * size, 1, size, size)
    return interpolate(pixels, (new, new), mode="bicubic", antialias=True).flatten(1).T


@pytest.mark.parametrize(("size", "new"), [(14, 16), (16, 14), (16, 8), (8, 16), (14, 8), (8, 14)])
def test_kernels_are_the_least_squares_solution(size: int, new: int):
    """<B x, w2> = <x, w> for as many random patches as make the solution of least squares certain."""
    torch.manual_seed(0)
    kernel = torch.randn(3, 3, size, size)
    found = resized_kernel(kernel, new)
    assert found.shape == (3, 3, new, new)
    resize = resizing(size, new)
    # All x at once: B^T w2 = w, in the sense of least squares; of several solutions the shortest.
    wanted = torch.linalg.lstsq(resize.T, kernel.double().flatten(2).flatten(0, 1).T, driver="gelsd").solution
    assert (found.double().flatten(2).flatten(0, 1).T - wanted).abs().max() < 1e-5 * wanted.abs().max()
    if new > size:  # exact: an enlarged patch gives the embedding that it gave before
        patch = torch.randn(3, size, size, dtype=torch.float64)
        before = (kernel.double() * patch).sum((1, 2, 3))
        larger = (resize @ patch.flatten(1).T).T.view(3, new, new)
        assert torch.allclose((found.double() * larger).sum((1, 2, 3)), before, atol=1e-4)
    assert resized_kernel(kernel, size) is kernel


def test_larger_patches_give_the_features_of_the_smaller():
    """Every patch of an image enlarged by itself: all features are those of before."""
    encoder = encoder_of()
    network, start = moved(encoder, patch_size=12, image_size=48)
    images = torch.randn(2, 3, 32, 32)
    cells = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 1, 8, 8).double()
    larger = interpolate(cells, (12, 12), mode="bicubic", antialias=True).float()
    larger = larger.view(2, 3, 4, 4, 12, 12).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 48, 48)
    assert (patches(network, larger) - patches(encoder.backbone, images)).abs().max() < 1e-4
    assert "patch_embed.proj.weight resampled from patches of 8 to 12 pixels" in start.account.line()
    assert "pos_embed" in start.account.taken


@pytest.mark.parametrize(
    "how", [{}, {"position_offset": 0.1}, {"position_antialias": True}], ids=["plain", "dino", "timm"]
)
@pytest.mark.parametrize("side", [16, 48])
def test_resized_tables_are_what_the_network_reads_at_that_size(how: dict, side: int):
    encoder = encoder_of(dataclasses.replace(SHAPE, **how))
    network, start = moved(encoder, image_size=side)
    images = torch.randn(2, 3, side, side)
    assert torch.equal(patches(network, images), patches(encoder.backbone, images))
    assert f"pos_embed resized from 4 x 4 to {side // 8} x {side // 8} positions" in start.account.line()


@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_a_field_of_as_many_nodes_gives_the_table_back(kind: str):
    encoder = encoder_of(dataclasses.replace(SHAPE, positions=kind))
    network, start = moved(encoder, positions="field", field_size=(4, 4), image_size=32)
    assert network.pos_field is not None
    table = encoder.backbone.positions((4, 4))
    assert torch.equal(network.pos_field.values.detach().view(1, 16, 24), table)
    images = torch.randn(2, 3, 32, 32)
    assert (patches(network, images) - patches(encoder.backbone, images)).abs().max() < 1e-5
    assert "pos_embed became the 4 x 4 nodes of the field, which give the table of 4 x 4 back" in str(
        start.account.line()
    )
    back, _ = moved(
        Encoder(EncoderConfig(network.config, encoder.config.transform), network), positions="learned"
    )
    assert torch.allclose(back.positions((4, 4)), table, atol=1e-6)


@pytest.mark.parametrize("alignment", ["cells", "corners"])
def test_a_field_of_more_nodes_says_how_well_it_gives_the_table_back(alignment: str):
    """A table that is linear in row and column is read at the nodes, wherever these are."""
    encoder = encoder_of()
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    table = torch.stack((rows, columns, *[rows - columns] * 22), dim=2).view(1, 16, 24)
    with torch.no_grad():
        encoder.backbone.pos_embed[:, 1:] = table
    network, start = moved(
        encoder, positions="field", field_size=(10, 10), field_alignment=alignment, position_offset=0.0
    )
    values = network.pos_field.values
    # Node i stands at (i + 1/2) / 10 or at i / 9 of the image, which is 4 (...) - 1/2 in rows of the table.
    for i in range(4, 6):  # away from the borders, where nothing is beyond the table
        place = 4 * (i + 0.5) / 10 - 0.5 if alignment == "cells" else 4 * i / 9 - 0.5
        assert values[i, 4, 0].item() == pytest.approx(place, abs=1e-4)
        assert values[4, i, 1].item() == pytest.approx(place, abs=1e-4)
    error = (network.pos_field((4, 4)) - table).abs().max().item()
    assert error > 1e-3
    assert f"back up to {error:.2g} where its entries are about" in start.account.line()


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("mean", [12.0, 12.0, 12.0, 12.0, 12.0]),  # (10 + 20 + 30) / 3, times 3 / 5
        ("repeat", [5.0, 10.0, 30.0, 5.0, 10.0]),  # the first and second twice, so half of each
        ("4,3,2", [0.0, 30.0, 20.0, 10.0, 0.0]),
        ("mean", [30.0, 30.0]),
        ("repeat", [15.0, 30.0]),  # the first two, times 3 / 2
        ("mean", [60.0]),
        ("repeat", [30.0]),
    ],
)
def test_kernels_of_other_channels(how: str, wanted: list[float]):
    kernel = torch.tensor([10.0, 20.0, 30.0])[None, :, None, None].expand(4, 3, 2, 2)
    made = kernel_of_channels(kernel, len(wanted), how, "x")
    assert torch.allclose(made, torch.tensor(wanted)[None, :, None, None].expand(4, -1, 2, 2))
    if how != "repeat" or len(wanted) >= 3:  # equal channels are embedded as before
        assert made.sum(dim=1).allclose(kernel.sum(dim=1))


@pytest.mark.parametrize("how", ["median", "1,2", "1,2,6", "0,1,2", "1,1,2", "3,2,x,1", "1,2,"])
def test_channels_that_weights_cannot_go_to_are_refused(how: str):
    with pytest.raises(ConfigError, match=rf"init_channels={how}: .* have 3 channels, .* the 5 of the data"):
        kernel_of_channels(torch.ones(4, 3, 2, 2), 5, how, "x")


def test_a_choice_of_channels_without_effect_is_refused():
    with pytest.raises(ConfigError, match=r"init_channels=repeat has no effect: .* have 3 channel\(s\), as"):
        transfer(encoder_of(), SHAPE, "x", "repeat")
    with pytest.raises(ConfigError, match=r"init_channels has no effect: there are no starting weights"):
        resolve("dino-tiny-tinyimagenet", ["init_channels=repeat"])


def test_added_registers_and_class_tokens_are_fresh_and_the_others_stay():
    encoder = encoder_of(dataclasses.replace(SHAPE, registers=2, class_token=False))
    network, start = moved(encoder, registers=5, class_token=True)
    torch.manual_seed(1)
    drawn = VisionTransformer(network.config)
    assert torch.equal(network.reg_token[:, :2], encoder.backbone.reg_token)
    assert torch.equal(network.reg_token[:, 2:], drawn.reg_token[:, 2:])
    assert torch.equal(network.cls_token, drawn.cls_token)
    assert not network.pos_embed[:, 0].any()
    assert torch.equal(network.pos_embed[:, 1:], encoder.backbone.pos_embed)
    assert {"cls_token", "reg_token"} <= start.account.fresh.keys()
    assert "3 of 5 added" in start.account.fresh["reg_token"]


def test_layer_scale_of_one_is_the_same_function():
    encoder = encoder_of()
    network, start = moved(encoder, layer_scale=1.0)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(patches(network, images), patches(encoder.backbone, images))
    assert "added as 1, which is the same function" in start.account.line()
    with pytest.raises(ConfigError, match=r"layer_scale=1e-05: the weights of init=x have none; 1\.0 adds"):
        moved(encoder, layer_scale=1e-5)


def test_a_fixed_table_that_trains_may_be_fixed_again():
    """MAE's files hold their table; to half precision it is the computed one."""
    encoder = encoder_of()
    with torch.no_grad():
        encoder.backbone.pos_embed[:, :1] = 0
        encoder.backbone.pos_embed[:, 1:] = fixed_positions((4, 4), 24).half().float()
    network, start = moved(encoder, positions="sincos")
    assert torch.equal(network.pos_embed[:, 1:], fixed_positions((4, 4), 24))
    assert "is the fixed table of sines, computed anew" in start.account.line()
    with torch.no_grad():
        encoder.backbone.pos_embed[0, 5, 3] += 0.1
    with pytest.raises(ConfigError, match="have a table that was trained, not the fixed one"):
        moved(encoder, positions="sincos")
    trains, _ = moved(encoder_of(dataclasses.replace(SHAPE, positions="sincos")), positions="learned")
    assert trains.pos_embed.requires_grad
    assert torch.equal(trains.pos_embed[:, 1:], fixed_positions((4, 4), 24))
    with pytest.raises(ConfigError, match=r"a fixed table is not resized; .* want 32 with patches of 8"):
        moved(encoder_of(dataclasses.replace(SHAPE, positions="sincos")), image_size=64)


@pytest.mark.parametrize("other", ["learned", "sincos", "field"])
def test_rotary_positions_are_not_mixed_with_others(other: str):
    rope = dataclasses.replace(SHAPE, positions="rope")
    with pytest.raises(ConfigError, match=f"^model.positions={other}: .* have rope: rotary positions"):
        moved(encoder_of(rope), positions=other)
    with pytest.raises(ConfigError, match=f"^model.positions=rope: .* have {other}: rotary positions"):
        moved(encoder_of(dataclasses.replace(SHAPE, positions=other)), positions="rope")


def test_everything_else_is_taken_bit_by_bit():
    encoder = encoder_of(dataclasses.replace(SHAPE, registers=4, layer_scale=0.1, positions="rope"))
    network, start = moved(encoder)
    own = network.state_dict()
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(own[name], value), name
    assert start.account.taken == list(encoder.backbone.state_dict())
    assert not start.account.changed
    assert not start.account.fresh


def test_names_are_told_together():
    names = ["a.0.b", "a.1.b", "a.12.b", "a.0.c", "x1.y"]
    assert together(names) == "a.*.b (3), a.*.c, x1.y"


@pytest.mark.filterwarnings("ignore:views.local_size=98 instead:UserWarning")
def test_real_weights_give_what_they_give_for_evaluation(data_folder: Path):
    """A ViT-S/14 as public ones are: the same patches in student and teacher of ODIS with DINOv2's terms."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    if not (data_folder / "vits14").is_dir():
        pytest.skip(f"no vits14 in {data_folder}")
    init = f"hf:{data_folder}/vits14"
    small = {"prototypes": 8, "hidden": 8, "bottleneck": 8}
    config = resolve("odis-dinov2-vits16-in1k", {"init": init, "method.heads.main": small})
    assert (config.model.patch_size, config.model.image_size, config.views.local_size) == (14, 518, 98)
    method = Distillation(config.method, config.model, config.views)
    start = read_start(init, config.model)
    method.start_from(start)
    images = torch.randn(1, 3, 98, 126)
    theirs = patches(load(init).backbone, images)
    for network in method.trained():
        assert (patches(network.eval(), images) - theirs).abs().max() < 1e-6
    assert start.close().unused == []
