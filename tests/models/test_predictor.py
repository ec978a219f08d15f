"""The cross-attention predictor: predictions on their own, at any places; the encoder on kept patches."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm

from foveola.methods.capi import UnitPrototypes
from foveola.models.attention import rotate
from foveola.models.positions import border_coordinates, grid_coordinates
from foveola.models.predictor import Predictor, PredictorConfig
from foveola.models.vit import Features, Inputs, VisionTransformer, ViTConfig

CAPI = ViTConfig(
    width=24,
    depth=4,
    heads=2,
    patch_size=4,
    image_size=16,
    class_token=False,
    registers=4,
    norm="rms",
    final_norm_affine=False,
    bias=False,
    positions="rope",
    init="xavier",
    drop_path=0.0,
)
LEARNED = dataclasses.replace(CAPI, positions="learned", class_token=True, registers=0)


def random_images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def kept(count: int = 2, size: int = 6) -> Tensor:
    return torch.stack(
        [
            torch.randperm(16, generator=torch.Generator().manual_seed(i))[:size].sort().values
            for i in range(count)
        ]
    )


def make(
    config: ViTConfig = CAPI, predictor: PredictorConfig | None = None
) -> tuple[VisionTransformer, Predictor]:
    torch.manual_seed(0)
    return VisionTransformer(config).eval(), Predictor(predictor or PredictorConfig(), config).eval()


@pytest.fixture(params=["rope", "learned"])
def networks(request) -> tuple[VisionTransformer, Predictor]:
    return make(CAPI if request.param == "rope" else LEARNED)


@torch.no_grad()
def predict(
    networks: tuple[VisionTransformer, Predictor], images: Tensor, keep: Tensor, targets: Tensor | None
) -> Tensor:
    backbone, predictor = networks
    return predictor(backbone(images, Inputs(kept=keep)), targets, keep)


# -- the encoder on kept patches ----------------------------------------------------------------------------


def naive_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    logits = (q @ k.mT) / q.shape[-1] ** 0.5
    return logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1) @ v


def test_kept_patches_equal_a_full_network_that_cannot_see_the_others():
    """In float64, all patches go through every block, but the keys of dropped ones are forbidden."""
    backbone, _ = make()
    backbone.double()
    images, keep = random_images().double(), kept()
    found = backbone(images, Inputs(kept=keep))
    seen = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, keep, True)
    coordinates = grid_coordinates((4, 4)).double().expand(2, -1, -1)
    border = border_coordinates(4, coordinates.gather(1, keep[..., None].expand(-1, -1, 2)))
    assert backbone.rope is not None
    rotation = backbone.rope(torch.cat((border, coordinates), dim=1)).double()
    x, _ = backbone.embed(images)
    assert backbone.reg_token is not None
    x = torch.cat((backbone.reg_token.expand(2, -1, -1), x), dim=1)
    allowed = torch.cat((torch.ones(2, 4, dtype=torch.bool), seen), dim=1)[:, None, None]
    for block in backbone.blocks:
        y = rms_norm(x, (24,), block.norm1.weight, 1e-5)
        q, k, v = (y @ block.attn.qkv.weight.T).view(2, 20, 3, 2, 12).permute(2, 0, 3, 1, 4)
        out = naive_attention(rotate(q, rotation), rotate(k, rotation), v, allowed)
        x = x + out.transpose(1, 2).flatten(2) @ block.attn.proj.weight.T
        y = rms_norm(x, (24,), block.norm2.weight, 1e-5)
        x = x + gelu(y @ block.mlp.fc1.weight.T) @ block.mlp.fc2.weight.T
    x = rms_norm(x, (24,), None, 1e-5)
    rows = keep[..., None].expand(-1, -1, 24)
    assert (found.registers - x[:, :4]).abs().max() < 1e-6
    assert (found.patches - x[:, 4:].gather(1, rows)).abs().max() < 1e-6


def test_dropped_patches_reach_nothing(networks):
    images, keep = random_images(), kept()
    before = predict(networks, images, keep, None)
    changed = images.clone()
    for b in range(2):
        for patch in set(range(16)) - set(keep[b].tolist()):
            y, x = 4 * (patch // 4), 4 * (patch % 4)
            changed[b, :, y : y + 4, x : x + 4] += 10
    assert torch.equal(predict(networks, changed, keep, None), before)
    visible = images.clone()
    patch = int(keep[0, 0])
    visible[0, :, 4 * (patch // 4), 4 * (patch % 4)] += 10
    after = predict(networks, visible, keep, None)
    assert (after[0] - before[0]).abs().amax(dim=1).min() > 0
    assert torch.equal(after[1], before[1])


def test_the_order_of_kept_patches_does_not_matter(networks):
    images, keep = random_images(), kept()
    shuffled = keep.flip(1)
    one, two = (predict(networks, images, k, None) for k in (keep, shuffled))
    assert (one - two).abs().max() < 1e-5


# -- predictions --------------------------------------------------------------------------------------------


def test_predictions_do_not_depend_on_each_other(networks):
    images, keep = random_images(), kept()
    everywhere = predict(networks, images, keep, None)
    for targets in (
        torch.tensor([[3, 9], [0, 15]]),
        torch.tensor([[9], [1]]),
        torch.arange(16).flip(0).expand(2, -1),
    ):
        some = predict(networks, images, keep, targets)
        rows = targets[..., None].expand(-1, -1, 24)
        assert (some - everywhere.gather(1, rows)).abs().max() < 1e-5
    assert (everywhere[:, 0] - everywhere[:, 1]).abs().max() > 1e-3  # places differ


def test_the_self_attention_variant_lets_predictions_meet():
    networks = make(CAPI, PredictorConfig(kind="self"))
    images, keep = random_images(), kept()
    one = predict(networks, images, keep, torch.tensor([[3, 9], [3, 9]]))[:, 0]
    two = predict(networks, images, keep, torch.tensor([[3, 10], [3, 10]]))[:, 0]
    assert (one - two).abs().max() > 1e-5


def test_the_predictor_is_the_loop():
    """One block of cross-attention in float64, written out."""
    backbone, predictor = make(CAPI, PredictorConfig(depth=1))
    backbone.double()
    predictor.double()
    images, keep, targets = random_images().double(), kept(), torch.tensor([[3, 9], [0, 15]])
    context = backbone(images, Inputs(kept=keep))
    found = predictor(context, targets, keep)
    tokens = torch.cat((context.registers, context.patches), dim=1)
    coordinates = grid_coordinates((4, 4)).double()[0]
    assert predictor.rope is not None
    block = predictor.blocks[0]
    for b in range(2):
        border = border_coordinates(4, coordinates[keep[b]][None])
        keys_at = predictor.rope(torch.cat((border, coordinates[keep[b]][None]), dim=1)).double()
        asked_at = predictor.rope(coordinates[targets[b]][None]).double()
        x = predictor.mask_token[0].expand(2, -1)
        y = rms_norm(x, (24,), block.norm1.weight, 1e-5)
        q = (y @ block.attn.q.weight.T).view(1, 2, 2, 12).transpose(1, 2)
        k, v = (tokens[b] @ block.attn.kv.weight.T).view(1, 10, 2, 2, 12).permute(2, 0, 3, 1, 4)
        everything = torch.ones(1, 1, 1, 10, dtype=torch.bool)
        out = naive_attention(rotate(q, asked_at), rotate(k, keys_at), v, everything)
        x = x + out.transpose(1, 2).flatten(2)[0] @ block.attn.proj.weight.T
        y = rms_norm(x, (24,), block.norm2.weight, 1e-5)
        x = x + gelu(y @ block.mlp.fc1.weight.T) @ block.mlp.fc2.weight.T
        assert (found[b] - rms_norm(x, (24,), None, 1e-5)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["cross", "self"])
def test_other_shapes(kind):
    """CAPI, Table 1f: narrower and wider than the encoder, with heads as wide as its own."""
    networks = make(CAPI, PredictorConfig(kind=kind, width=36, depth=1))
    assert networks[1].blocks[0].attn.heads == 3
    assert predict(networks, random_images(), kept(), torch.tensor([[1], [2]])).shape == (2, 1, 36)
    with pytest.raises(ValueError, match="predictor: width=32 is not a multiple of heads=3"):
        Predictor(PredictorConfig(width=32, heads=3), CAPI)


def test_other_grids(networks):
    """Positions stretch with the resolution; an encoder's predictor answers for each patch of any image."""
    backbone, predictor = networks
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 24, 32))
        assert predictor(features).shape == (1, 48, 24)


def test_published_shape_and_biases():
    """ViT-L/14: 302.0 M in the encoder's blocks, 151.0 M in the decoder's; one bias, of the patches."""
    config = dataclasses.replace(
        CAPI, size="large", width=None, depth=None, heads=None, patch_size=14, image_size=224, registers=16
    )
    with torch.device("meta"):
        backbone, predictor = VisionTransformer(config), Predictor(PredictorConfig(), config)
    assert sum(p.numel() for p in backbone.blocks.parameters()) == pytest.approx(302.0e6, rel=1e-3)
    assert sum(p.numel() for p in predictor.blocks.parameters()) == pytest.approx(151.0e6, rel=1e-3)
    assert len(predictor.blocks) == 12
    assert backbone.patch_embed.proj.weight.numel() + backbone.patch_embed.proj.bias.numel() == 603_136
    names = [name for net in (backbone, predictor) for name, _ in net.named_parameters() if "bias" in name]
    assert names == ["patch_embed.proj.bias"]
    assert "norm.weight" not in dict(backbone.named_parameters())


def test_xavier_draws_packed_maps_one_by_one():
    torch.manual_seed(0)
    wide = dataclasses.replace(CAPI, width=240, heads=20, depth=1)
    backbone, predictor = VisionTransformer(wide), Predictor(PredictorConfig(depth=1), wide)
    bound = (6 / (240 + 240)) ** 0.5
    for weight in (backbone.blocks[0].attn.qkv.weight, predictor.blocks[0].attn.kv.weight):
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    flat = backbone.patch_embed.proj.weight.flatten(1)
    assert flat.abs().max().item() == pytest.approx((6 / (240 + 48)) ** 0.5, rel=1e-2)
    assert backbone.reg_token.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_linear_head_of_capi_starts_as_its_code():
    torch.manual_seed(0)
    prototypes = UnitPrototypes(256, 900, trainable_length=True)
    assert prototypes.v.std().item() == pytest.approx(0.02, rel=0.02)
    assert prototypes.v.abs().max() > 0.07  # a normal distribution, where the uniform one would end at 0.035


def test_features_are_kept_in_their_places():
    backbone, predictor = make()
    with torch.no_grad():
        features = backbone(random_images(), Inputs(kept=kept()))
    assert isinstance(features, Features)
    assert features.objects.shape == (2, 0, 24)
    assert features.registers.shape == (2, 4, 24)
    assert features.patches.shape == (2, 6, 24)
    with pytest.raises(ValueError, match="no class token"):
        backbone(random_images(), torch.ones(2, 1, 16, dtype=torch.bool))
    assert predictor.width == 24
