"""Attention within windows: against loops over pairs of patches, and against blocks without windows."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveola.models.attention import readable_tokens
from foveola.models.blocks import Block
from foveola.models.capture import attention_of, visit
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import Inputs, VisionTransformer, ViTConfig
from foveola.models.windows import global_blocks, windowed_attention

CONFIG = ViTConfig(
    width=24, depth=3, heads=2, patch_size=4, image_size=24, drop_path=0.0, window=2, global_blocks=1
)


def network(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    made = VisionTransformer(replace(CONFIG, **changes)).eval().requires_grad_(False)
    for block in made.blocks:
        block.attn.qkv.weight.mul_(10)
    return made


def images(height: int = 24, width: int = 24) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def allowed(grid: tuple[int, int], window: int, special: int) -> Tensor:
    """Who reads whom, pair by pair."""
    total = special + grid[0] * grid[1]
    found = torch.ones(total, total, dtype=torch.bool)
    for a in range(special, total):
        for b in range(special, total):
            (y, x), (v, u) = (divmod(i - special, grid[1]) for i in (a, b))
            found[a, b] = y // window == v // window and x // window == u // window
    return found


@pytest.mark.parametrize(("grid", "window", "special"), [((6, 6), 2, 0), ((5, 7), 3, 2), ((2, 9), 4, 1)])
def test_windows_by_a_loop(grid, window, special) -> None:
    count = grid[0] * grid[1]
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, special + count, 4, generator=drawn).double() for _ in range(3))
    found = windowed_attention(query[:, :, special:], key, value, grid, window)
    reads = allowed(grid, window, special)
    for n in range(count):
        some = reads[special + n]
        logits = (query[:, :, special + n, None] * key[:, :, some]).sum(-1) / math.sqrt(4)
        expected = (logits.softmax(-1)[..., None] * value[:, :, some]).sum(2)
        torch.testing.assert_close(found[:, :, n], expected)


@pytest.mark.parametrize(
    "changes", [{}, {"registers": 2}, {"positions": "rope", "width": 16, "registers": 4}]
)
def test_a_window_as_large_as_the_grid_changes_no_bit(changes) -> None:
    pixels = images(16, 24)
    whole = network(**changes, window=None)(pixels)
    for window in (6, 7, 100):
        same = network(**changes, window=window)(pixels)
        assert torch.equal(same.patches, whole.patches)
        assert torch.equal(same.objects, whole.objects)
    other = network(**changes, window=5)(pixels)
    assert not torch.allclose(other.patches, whole.patches, atol=1e-3)


def test_special_tokens_read_everything_and_are_read() -> None:
    """A block with windows against one whose attention has a dense mask."""
    shape = replace(CONFIG, registers=3, layer_scale=1.0).block(0)
    torch.manual_seed(0)
    windowed, plain = Block(shape).eval(), Block(replace(shape, window=None)).eval()
    plain.load_state_dict(windowed.state_dict())
    x, grid, count = torch.randn(2, 2 + 3 + 20, 24), (4, 5), 2
    objects = torch.rand(2, count, 20, generator=torch.Generator().manual_seed(3)) < 0.5
    readable = readable_tokens(objects, 3)
    found = windowed(x, count, readable, None, grid)
    mask = allowed(grid, 2, 5).expand(2, 1, -1, -1).clone()
    mask[:, :, :count] = readable
    query, key, value = plain.attn.heads_of(plain.norm1(x))
    logits = (query @ key.mT / math.sqrt(12)).masked_fill(~mask, -torch.inf)
    mixed = plain.attn.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    expected = x + mixed
    expected = expected + plain.mlp(plain.norm2(expected))
    torch.testing.assert_close(found, expected)


def test_blocks_that_read_everything() -> None:
    """ViTDet names 2, 5, 8, 11 of ViT-B, 5, 11, 17, 23 of ViT-L, 7, 15, 23, 31 of ViT-H."""
    assert global_blocks(12, 4) == (2, 5, 8, 11)
    assert global_blocks(24, 4) == (5, 11, 17, 23)
    assert global_blocks(32, 4) == (7, 15, 23, 31)
    assert [block.attn.window for block in network(depth=4, global_blocks=2).blocks] == [2, None, 2, None]
    with pytest.raises(ValueError, match="global_blocks=4 of depth=3"):
        replace(CONFIG, global_blocks=4)
    assert "global_blocks" in replace(CONFIG, window=None).unread()


def test_windows_hold_all_patches() -> None:
    with pytest.raises(ValueError, match="none can be dropped"):
        network()(images(), Inputs(kept=torch.zeros(2, 4, dtype=torch.int64)))


def test_attention_of_a_block_with_windows() -> None:
    vit, pixels = network(registers=1), images(20, 24)
    grid, special = (5, 6), 2
    seen = attention_of(vit, pixels, block=0)
    reads = allowed(grid, 2, special)
    logits = (seen.query @ seen.key.mT).masked_fill(~reads, -torch.inf)
    whole = logits.softmax(-1)
    index = torch.tensor([[0, 7, 29], [3, 3, 11]])
    for b in range(2):
        torch.testing.assert_close(seen.patches(index)[b], whole[b][:, index[b] + special])
    torch.testing.assert_close(seen.centre(), whole[:, :, special + 2 * 6 + 2])
    torch.testing.assert_close(seen.objects(), whole[:, :, :1])
    inner = whole[:, :, special:, special:]
    torch.testing.assert_close(seen.received(), (inner / inner.sum(-1, keepdim=True)).mean(2))
    handed = torch.cat([part.softmax(-1).flatten(0, 1) for _, _, part in seen.matrices(1)])
    torch.testing.assert_close(handed, whole.flatten(0, 1))
    assert torch.equal(visit(vit, pixels, lambda *_: None).patches, vit(pixels).patches)


def test_fingerprints_of_networks_without_windows_stay() -> None:
    """That of the version before windows, of these weights."""
    config = ViTConfig(width=8, depth=1, heads=1, patch_size=4, image_size=8)
    transform = TransformConfig(8, 8)
    encoder = Encoder(EncoderConfig(config, transform))
    for value in encoder.weights().values():
        value.zero_()
    assert encoder.fingerprint() == "00c09563b740ed7a"
    other = Encoder(EncoderConfig(replace(config, window=1, global_blocks=1), transform))
    for value in other.weights().values():
        value.zero_()
    assert other.fingerprint() != encoder.fingerprint()
