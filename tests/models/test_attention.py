"""Masked attention against a dense mask in float64; which token may read which."""

import pytest
import torch
from torch import Tensor

from foveola.models.attention import Attention, readable_tokens

WIDTH, HEADS = 12, 3


def attention(seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    module = Attention(WIDTH, HEADS)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def naive_allowed(objects: Tensor, registers: int) -> Tensor:
    """[B, T, T]: whether a token (row) may read another (column), by the rules, one entry after the other."""
    batch, count, patches = objects.shape
    total = count + registers + patches
    allowed = torch.ones(batch, total, total, dtype=torch.bool)
    for b in range(batch):
        for m in range(count):
            for other in range(count):
                allowed[b, m, other] = m == other
            for n in range(patches):
                empty = not objects[b, m].any()
                allowed[b, m, count + registers + n] = bool(objects[b, m, n]) or empty
    return allowed


def naive_attention(module: Attention, x: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Explicit softmax over a dense mask in float64: output [B, T, D] and weights [B, heads, T, T]."""
    x = x.double()
    qkv = x @ module.qkv.weight.double().T + module.qkv.bias.double()
    size = WIDTH // HEADS
    out, weights = torch.zeros_like(x), []
    for head in range(HEADS):
        query, key, value = (
            qkv[..., part * WIDTH + head * size : part * WIDTH + (head + 1) * size] for part in range(3)
        )
        logits = query @ key.transpose(1, 2) / size**0.5
        share = logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
        weights.append(share)
        out[..., head * size : (head + 1) * size] = share @ value
    return out @ module.proj.weight.double().T + module.proj.bias.double(), torch.stack(weights, dim=1)


def some_objects(batch: int, count: int, patches: int, seed: int = 0) -> Tensor:
    objects = torch.rand(batch, count, patches, generator=torch.Generator().manual_seed(seed)) < 0.4
    objects[0, 0] = False  # empty
    objects[1, 0] = False
    objects[1, 0, 3] = True  # one patch
    objects[2, 0] = True  # all
    return objects


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("registers", [0, 3])
def test_masked_attention_is_a_dense_mask(count: int, registers: int):
    module = attention()
    objects = some_objects(5, count, 9)
    x = torch.randn(5, count + registers + 9, WIDTH)
    readable = readable_tokens(objects, registers)
    expected, expected_weights = naive_attention(module, x, naive_allowed(objects, registers))
    with torch.no_grad():
        out, weights = module(x, count, readable), module.weights(x, readable)
    assert (out - expected).abs().max() < 1e-5
    assert (weights - expected_weights).abs().max() < 1e-6
    # Nothing outside of the object, and a whole in all.
    blocked = ~readable.expand(-1, HEADS, -1, -1)
    assert (weights[:, :, :count][blocked] == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(5, HEADS, x.shape[1]), atol=1e-6)


def test_without_masks_it_is_plain_attention():
    module = attention()
    x = torch.randn(3, 8, WIDTH)
    expected, _ = naive_attention(module, x, torch.ones(3, 8, 8, dtype=torch.bool))
    with torch.no_grad():
        assert (module(x, 1) - expected).abs().max() < 1e-5


def test_who_may_read_whom():
    objects = torch.tensor([[[True, False, False], [False, False, False]]])
    readable = readable_tokens(objects, 1)[0, 0]
    #                             itself, other | register | patches
    assert readable[0].tolist() == [True, False, True, True, False, False]
    assert readable[1].tolist() == [
        False,
        True,
        True,
        True,
        True,
        True,
    ]  # empty: everything but other objects
    assert readable_tokens(torch.ones(2, 1, 4, dtype=torch.bool), 2).all()


@pytest.mark.parametrize("tokens", [5, 37, 197])
def test_an_object_that_is_everything_is_the_class_token_bit_for_bit(tokens: int):
    module = attention()
    x = torch.randn(4, tokens, WIDTH)
    readable = readable_tokens(torch.ones(4, 1, tokens - 1, dtype=torch.bool), 0)
    with torch.no_grad():
        assert torch.equal(module(x, 1, readable), module(x, 1))


def test_patches_do_not_depend_on_the_masks():
    module = attention()
    x = torch.randn(5, 10, WIDTH)
    with torch.no_grad():
        one = module(x, 1, readable_tokens(some_objects(5, 1, 9, 1), 0))
        other = module(x, 1, readable_tokens(some_objects(5, 1, 9, 2), 0))
    assert torch.equal(one[:, 1:], other[:, 1:])
    assert not torch.equal(one[3:, :1], other[3:, :1])


def test_patches_and_mask_may_be_permuted_together():
    module = attention()
    x, objects = torch.randn(3, 10, WIDTH), some_objects(3, 1, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat((x[:, :1], x[:, 1:][:, order]), dim=1)
    with torch.no_grad():
        before = module(x, 1, readable_tokens(objects, 0))
        after = module(shuffled, 1, readable_tokens(objects[:, :, order], 0))
    assert torch.allclose(before[:, 0], after[:, 0], atol=1e-6)
    assert torch.allclose(before[:, 1:][:, order], after[:, 1:], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(dtype: torch.dtype):
    module = attention()
    x, objects = torch.randn(5, 10, WIDTH), some_objects(5, 1, 9)
    readable = readable_tokens(objects, 0)
    expected, _ = naive_attention(module, x, naive_allowed(objects, 0))
    with torch.no_grad():
        out = module.to(dtype)(x.to(dtype), 1, readable)
    assert out.isfinite().all()
    assert (out - expected).abs().max() < 0.15


def test_gradients_reach_only_what_was_read():
    module = attention()
    x = torch.randn(1, 6, WIDTH, requires_grad=True)
    objects = torch.tensor([[[True, True, False, False, False]]])
    out = module(x, 1, readable_tokens(objects, 0))[:, 0].square().sum()
    (gradient,) = torch.autograd.grad(out, x)
    assert (gradient[0, 3:] == 0).all()
    assert (gradient[0, :3] != 0).any(dim=1).all()
    assert gradient.isfinite().all()
