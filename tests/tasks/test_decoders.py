"""Decoders of segmentation against naive computations in float64, and torch's own layers."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, interpolate

from foveola.tasks.decoders import DecoderConfig, LinearDecoder, MaskDecoder, PatchNorm, enlarged_logits


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that hide nothing: no bias is zero, no norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return module


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + eps) * weight + bias


def test_the_linear_decoder_is_a_product_and_starts_as_segmenter_does():
    decoder = LinearDecoder(6, 4)
    assert sum(p.numel() for p in decoder.parameters()) == 4 * 7
    assert not decoder.linear.bias.any()
    wide = LinearDecoder(512, 64).linear.weight
    assert wide.std().item() == pytest.approx(0.02, rel=0.02)
    patches = drawn(2, 5, 6)
    naive = patches.double().numpy() @ decoder.linear.weight.detach().double().numpy().T
    np.testing.assert_allclose(decoder(patches).detach().numpy(), naive, rtol=1e-5, atol=1e-7)


def test_the_mask_transformer_equals_a_loop_over_tokens():
    """Pre-norm blocks over patches and classes, then cosines of projections, normed over classes."""
    width, classes, heads = 8, 3, 2
    decoder = shaken(MaskDecoder(width, classes, depth=2, heads=heads))
    patches = drawn(1, 5, width, seed=1)
    found = decoder(patches)[0].detach().numpy()

    w = {name: p.detach().double().numpy() for name, p in decoder.named_parameters()}
    rows = [w["proj.weight"] @ x + w["proj.bias"] for x in patches[0].double().numpy()]
    rows += list(w["class_tokens"][0])
    for i in range(2):
        b = {name.removeprefix(f"blocks.{i}."): v for name, v in w.items() if name.startswith(f"blocks.{i}.")}
        normed = [layer_norm(x, b["norm1.weight"], b["norm1.bias"], 1e-6) for x in rows]
        qkv = [b["attn.qkv.weight"] @ x + b["attn.qkv.bias"] for x in normed]
        mixed, size = [], width // heads
        for t in range(len(rows)):
            parts = []
            for h in range(heads):
                at = slice(h * size, (h + 1) * size)
                scores = np.array([qkv[t][at] @ other[width : 2 * width][at] for other in qkv]) / math.sqrt(
                    size
                )
                share = np.exp(scores - scores.max())
                share /= share.sum()
                parts.append(sum(s * other[2 * width :][at] for s, other in zip(share, qkv, strict=True)))
            mixed.append(b["attn.proj.weight"] @ np.concatenate(parts) + b["attn.proj.bias"])
        rows = [x + y for x, y in zip(rows, mixed, strict=True)]
        hidden = [
            b["mlp.fc1.weight"] @ layer_norm(x, b["norm2.weight"], b["norm2.bias"], 1e-6) + b["mlp.fc1.bias"]
            for x in rows
        ]
        active = [gelu(torch.from_numpy(x)).numpy() for x in hidden]
        rows = [x + b["mlp.fc2.weight"] @ a + b["mlp.fc2.bias"] for x, a in zip(rows, active, strict=True)]
    rows = [layer_norm(x, w["norm.weight"], w["norm.bias"], 1e-5) for x in rows]
    unit = [x @ w["patch_map"] / np.linalg.norm(x @ w["patch_map"]) for x in rows[:5]]
    names = [x @ w["class_map"] / np.linalg.norm(x @ w["class_map"]) for x in rows[5:]]
    for x, logits in zip(unit, found, strict=True):
        cosines = np.array([x @ y for y in names])
        naive = layer_norm(cosines, w["mask_norm.weight"], w["mask_norm.bias"], 1e-5)
        np.testing.assert_allclose(logits, naive, rtol=2e-4, atol=2e-5)


def test_patches_are_normed_as_by_torch():
    ours, theirs = shaken(PatchNorm(6)), nn.BatchNorm1d(6)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for seed in range(3):
        x = drawn(2, 7, 6, seed=seed) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view(x.shape), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    x = drawn(1, 4, 6, seed=9)
    torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view(x.shape), rtol=1e-5, atol=1e-6)


def test_patches_of_padding_do_not_move_the_statistics():
    x = drawn(2, 7, 6)
    counted = torch.ones(2, 7, dtype=torch.bool)
    counted[0, 3:] = False
    spoiled = torch.where(counted[..., None], x, 1e3)
    plain, other = PatchNorm(6), PatchNorm(6)
    assert torch.equal(plain(x, counted)[counted], other(spoiled, counted)[counted])
    reference = nn.BatchNorm1d(6)
    once = PatchNorm(6)
    torch.testing.assert_close(once(x, counted)[counted], reference(x[counted]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(once.running_var, reference.running_var)
    assert torch.equal(once.running_var, other.running_var)
    empty = PatchNorm(6)
    assert empty(x, torch.zeros(2, 7, dtype=torch.bool)).isfinite().all()


NORM = """
import torch
from foveola import distributed
from foveola.tasks.decoders import PatchNorm
distributed.start("cpu")
x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
mine = x[:1] if distributed.rank() == 0 else x[1:]
norm = PatchNorm(5)
out = distributed.gather_rows(norm(mine).detach())
whole = PatchNorm(5)
rank, distributed.world_size = distributed.world_size, lambda: 1
expected = whole(x)
torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
torch.testing.assert_close(norm.running_var, whole.running_var)
distributed.world_size = rank
print("same")
distributed.stop()
"""


def test_processes_norm_patches_together(run_ranks):
    assert run_ranks(NORM, ranks=2) == ["same\n"] * 2


def test_logits_are_enlarged_row_by_row():
    logits = drawn(2, 6, 3)
    field = torch.stack([logits[:, :3].mT, logits[:, 3:].mT], dim=2)  # rows of three patches
    expected = interpolate(field, (8, 12), mode="bilinear", align_corners=False)
    assert torch.equal(enlarged_logits(logits, (2, 3), (8, 12)), expected)
    # By hand: between the centres of two patches of four pixels the way is linear.
    two = enlarged_logits(torch.tensor([[[0.0], [8.0]]]), (1, 2), (1, 8)).flatten().tolist()
    assert two == [0, 0, 1, 3, 5, 7, 8, 8]


def test_keys_of_the_other_decoder_are_idle():
    assert DecoderConfig().unread().keys() == {"depth", "heads"}
    assert DecoderConfig(kind="mask").unread().keys() == {"batch_norm"}
    with pytest.raises(ValueError, match=r"method\.decoder\.heads=5 does not divide the width 384"):
        DecoderConfig(kind="mask", heads=5).check(384)
    assert [DecoderConfig(kind="mask").heads_of(width) for width in (32, 96, 384)] == [1, 1, 6]
