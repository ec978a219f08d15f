"""Parts of a block against loops in float64: the gated MLP, LayerScale, both forms of stochastic depth."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveola.models.blocks import Block, BlockShape, LayerScale, Mlp, SwiGlu
from foveola.models.vit import VisionTransformer, ViTConfig

SHAPE = BlockShape(width=12, heads=2, hidden=48)
SUBSET = replace(SHAPE, drop_path=0.3, drop_subset=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough for every part of a formula to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


# -- MLPs and LayerScale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_gated_mlp_channel_by_channel(bias: bool):
    mlp = filled(SwiGlu(6, 24, bias))
    x = normal(2, 3, 6)
    weights = {name: value.double() for name, value in mlp.state_dict().items()}
    inner = 16
    assert weights["fc1.weight"].shape == (2 * inner, 6)
    zeros = torch.zeros(2 * inner, dtype=torch.float64)
    expected = torch.zeros(2, 3, 6, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            up = [float(weights["fc1.weight"][j] @ x[b, t].double()) for j in range(2 * inner)]
            up = [u + float(weights.get("fc1.bias", zeros)[j]) for j, u in enumerate(up)]
            gated = [up[j] / (1 + math.exp(-up[j])) * up[inner + j] for j in range(inner)]
            for d in range(6):
                out = sum(float(weights["fc2.weight"][d, j]) * gated[j] for j in range(inner))
                expected[b, t, d] = out + float(weights.get("fc2.bias", zeros)[d])
    assert (mlp(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("width", "inner"), [(384, 1024), (1024, 2736), (1536, 4096), (6, 16)])
def test_the_gated_mlp_has_about_the_parameters_of_the_plain_one(width: int, inner: int):
    """Two thirds of 4 x width, rounded up to 8; 4,096 are those of DINOv2's giant."""
    mlp, plain = SwiGlu(width, 4 * width), Mlp(width, 4 * width)
    assert (mlp.fc1.out_features, mlp.fc2.in_features) == (2 * inner, inner)
    counts = [sum(p.numel() for p in m.parameters()) for m in (mlp, plain)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01 if width > 6 else 0.1)


def test_layer_scale_multiplies_channels():
    scale = LayerScale(5, 1e-5)
    assert scale.gamma.tolist() == pytest.approx([1e-5] * 5)
    filled(scale)
    x = normal(2, 3, 5)
    expected = [
        [[x[b, t, d].item() * scale.gamma[d].item() for d in range(5)] for t in range(3)] for b in range(2)
    ]
    assert (scale(x) - torch.tensor(expected)).abs().max() < 1e-6


def test_layer_scale_stands_on_both_branches():
    """x + g1 attention(norm x), then y + g2 mlp(norm y); scales of one are the block without."""
    block = filled(Block(replace(SHAPE, layer_scale=1e-5))).double().eval()
    plain = Block(SHAPE).double().eval()
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if "gamma" not in name})
    x = normal(2, 5, 12).double()
    attention = plain.attn(plain.norm1(x), 1)
    y = x + block.ls1.gamma * attention
    expected = y + block.ls2.gamma * plain.mlp(plain.norm2(y))
    assert (block(x, 1) - expected).abs().max() < 1e-12
    with torch.no_grad():
        block.ls1.gamma.fill_(1)
        block.ls2.gamma.fill_(1)
    assert torch.equal(block(x, 1), plain(x, 1))


def test_a_new_network_with_layer_scale_changes_its_input_little():
    config = ViTConfig(width=24, depth=3, heads=3, patch_size=4, image_size=16, layer_scale=1e-5)
    torch.manual_seed(0)
    model = VisionTransformer(config)
    assert all(torch.equal(b.ls1.gamma, torch.full((24,), 1e-5)) for b in model.blocks)
    images = normal(2, 3, 16, 16)
    embedded, _ = model.embed(images)
    assert (model.eval()(images).patches - model.norm(embedded)).abs().max() < 1e-2


# -- stochastic depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "rate", "kept"),
    [(10, 0.3, 7), (64, 0.3, 44), (3, 0.3, 2), (2, 0.4, 1), (1, 0.9, 1), (5, 0.95, 1), (20, 0.2, 16)],
)
def test_the_branch_sees_exactly_its_share_of_images(batch: int, rate: float, kept: int):
    """max(int(B (1 - p)), 1) rows, each once, and no work for the others; times B over their number."""
    block = Block(replace(SUBSET, drop_path=rate)).train()
    x, other = normal(batch, 4, 12), torch.arange(batch * 1.0)[:, None]
    seen = []

    def branch(rows: Tensor, whose: Tensor) -> Tensor:
        seen.append(whose[:, 0].long().tolist())
        assert torch.equal(rows, x[seen[-1]])  # and others follow their images
        return 2 * rows

    out = block.residual(x, branch, other)
    assert len(seen) == 1
    assert len(seen[0]) == len(set(seen[0])) == kept
    changed = (out != x).flatten(1).any(1)
    assert changed.nonzero()[:, 0].tolist() == sorted(seen[0])
    assert torch.allclose(out[changed], x[changed] * (1 + 2 * batch / kept))


def test_branches_are_drawn_anew_and_skip_their_work():
    """Two branches of a block, each with rows of its own: counted where the layers see them."""
    block = Block(SUBSET).train()
    seen: dict[str, list[int]] = {"qkv": [], "fc1": []}
    block.attn.qkv.register_forward_hook(lambda _, args, __: seen["qkv"].append(len(args[0])))
    block.mlp.fc1.register_forward_hook(lambda _, args, __: seen["fc1"].append(len(args[0])))
    x = normal(10, 4, 12)
    chosen = []
    for seed in range(30):
        torch.manual_seed(seed)
        before = x.clone()
        attended = block.residual(x, lambda r: block.attn(block.norm1(r), 1))
        torch.manual_seed(seed)
        out = block(x, 1)
        changed = [(a != b).flatten(1).any(1) for a, b in ((attended, before), (out, attended))]
        assert [int(c.sum()) for c in changed] == [7, 7]
        chosen += [tuple(c.tolist()) for c in changed]
    assert set(seen["qkv"]) == {7}
    assert set(seen["fc1"]) == {7}
    assert len(set(chosen)) > 40  # of the 120 choices
    shares = torch.tensor(chosen).float().mean(dim=0)
    assert (shares - 0.7).abs().max() < 0.2  # no image is preferred


@pytest.mark.parametrize("subset", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 10])
def test_the_expectation_is_the_whole_branch(subset: bool, batch: int):
    block = Block(replace(SUBSET, drop_subset=subset)).train()
    x, branch = normal(batch, 2, 3), normal(batch, 2, 3, seed=1)
    torch.manual_seed(0)
    rows = torch.arange(batch * 1.0)[:, None]
    draws = [
        block.residual(x, lambda _, r: branch[r[:, 0].long()], rows).double() - x.double()
        for _ in range(2000)
    ]
    mean = torch.stack(draws).mean(dim=0)
    assert (mean - branch).abs().max() < 0.1 * branch.abs().max()
    # One image alone is never dropped by the subset form, so its branch is exact.
    if batch == 1 and subset:
        assert torch.allclose(mean, branch.double(), atol=1e-6)


def test_rates_of_single_draws_are_those_of_a_coin_or_of_a_hand_of_cards():
    x, ones = torch.zeros(10, 1, 1), torch.ones(10, 1, 1)
    rows = torch.arange(10.0)[:, None]
    counts: dict[bool, Counter] = {True: Counter(), False: Counter()}
    for subset, counter in counts.items():
        block = Block(replace(SUBSET, drop_subset=subset)).train()
        torch.manual_seed(0)
        for _ in range(500):
            kept = block.residual(x, lambda _, r: ones[r[:, 0].long()], rows) != 0
            counter[int(kept.sum())] += 1
    assert set(counts[True]) == {7}
    assert len(counts[False]) > 5


@pytest.mark.parametrize("subset", [True, False])
def test_evaluation_and_a_rate_of_zero_keep_everything(subset: bool):
    x, branch = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    shape = replace(SUBSET, drop_subset=subset)
    for block in (Block(shape).eval(), Block(replace(shape, drop_path=0.0)).train()):
        assert torch.equal(block.residual(x, lambda _: branch), x + branch)


def test_gradients_reach_kept_images_alone():
    block = Block(SUBSET).train()
    x, weight = normal(10, 2, 3), torch.ones(10, requires_grad=True)
    rows = torch.arange(10.0)[:, None]
    block.residual(x, lambda r, i: r * weight[i[:, 0].long(), None, None], rows).sum().backward()
    assert weight.grad is not None
    kept = weight.grad != 0
    assert int(kept.sum()) == 7
    assert torch.allclose(weight.grad[kept], x.sum(dim=(1, 2))[kept] * 10 / 7)


def test_the_rate_is_one_for_all_blocks_if_it_is_constant():
    config = ViTConfig(
        width=12,
        depth=4,
        heads=2,
        patch_size=4,
        image_size=16,
        drop_path=0.3,
        drop_path_rule="constant",
        drop_path_subset=True,
    )
    blocks = VisionTransformer(config).blocks
    assert [block.drop_path for block in blocks] == [0.3] * 4
    assert all(block.drop_subset for block in blocks)


@pytest.mark.parametrize("subset", [True, False])
def test_half_precision_keeps_what_layer_scale_leaves_of_a_branch(subset: bool):
    """Branches scaled by 1e-5 are below the steps of a bfloat16 stream: it becomes float32, in all forms."""
    torch.manual_seed(0)
    block = Block(replace(SUBSET, layer_scale=1e-5, drop_subset=subset)).train()
    x = normal(10, 4, 12).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, 1)
    assert out.dtype == torch.float32
    moved = (out != x.float()).flatten(1).any(1)
    assert int(moved.sum()) >= 7
    assert (out - x.float()).abs().max() < 1e-3
    plain = Block(replace(SUBSET, drop_subset=subset)).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x, 1).dtype == torch.bfloat16
