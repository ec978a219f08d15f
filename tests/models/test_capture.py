"""Outputs of earlier blocks and attention matrices, against hooks and loops."""

import pytest
import torch
from torch import Tensor

from foveola.config import UserError
from foveola.models.capture import BlockAttention, attention_of, capture, visit
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import VisionTransformer, ViTConfig


def network(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"width": 24, "depth": 3, "heads": 2, "patch_size": 4, "image_size": 16} | changes
    made = VisionTransformer(ViTConfig(**settings)).eval().requires_grad_(False)
    for block in made.blocks:
        block.attn.qkv.weight.mul_(10)
    return made


def random_images(count: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def masks(count: int = 3, patches: int = 16) -> Tensor:
    return torch.rand(count, 1, patches, generator=torch.Generator().manual_seed(2)) < 0.5


@pytest.mark.parametrize("changes", [{}, {"registers": 2}, {"positions": "rope"}])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_are_the_blocks_outputs_through_the_final_norm(changes, masked) -> None:
    vit = network(**changes)
    objects = masks() if masked else None
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda m, i, o: seen.append(o)) for block in vit.blocks]
    whole = vit(random_images(), objects)
    for hook in hooks:
        hook.remove()
    found = capture(vit, random_images(), 3, objects).layers
    registers = changes.get("registers", 0)
    for x, features in zip(seen, found, strict=True):
        expected = vit.norm(x)
        torch.testing.assert_close(features.objects, expected[:, :1])
        torch.testing.assert_close(features.registers, expected[:, 1 : 1 + registers])
        torch.testing.assert_close(features.patches, expected[:, 1 + registers :])
    torch.testing.assert_close(found[-1].objects, whole.objects)
    torch.testing.assert_close(found[-1].patches, whole.patches)
    torch.testing.assert_close(capture(vit, random_images(), 1, objects).layers[0].patches, whole.patches)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_rows_of_attention_by_a_loop(size) -> None:
    """float64 softmax of q k / sqrt(c), entry by entry; the central patch of an even grid is upper left."""
    vit, images = network(registers=1), random_images(2, *size)
    inputs: list[Tensor] = []
    hook = vit.blocks[-1].register_forward_hook(lambda m, i, o: inputs.append(i[0]))
    found = capture(vit, images, 1, None, attention=True)
    hook.remove()
    if not inputs:
        pytest.fail("the last block was not called")
    block = vit.blocks[-1]
    rows, columns = size[0] // 4, size[1] // 4
    centre = 2 + (rows - 1) // 2 * columns + (columns - 1) // 2
    for b in range(2):
        qkv = block.attn.qkv(block.norm1(inputs[0][b])).double()
        q, k = (qkv[:, 24 * i : 24 * i + 24].view(-1, 2, 12) for i in range(2))
        for head in range(2):
            for row, mine in ((0, found.objects[b, head, 0]), (centre, found.centre[b, head])):
                scores = torch.stack([q[row, head] @ other / 12**0.5 for other in k[:, head]])
                torch.testing.assert_close(mine.double(), scores.softmax(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"positions": "rope"}, {"class_token": False}], ids=str)
def test_keys_are_the_second_third_of_what_the_block_projects(changes) -> None:
    vit = network(registers=4, **changes)
    projected: list[Tensor] = []
    hook = vit.blocks[1].attn.qkv.register_forward_hook(lambda m, i, o: projected.append(o))
    vit(random_images())
    hook.remove()
    special = 4 + int(vit.config.class_token)
    expected = projected[0][:, special:, 24:48]  # not turned
    torch.testing.assert_close(attention_of(vit, random_images(), None, 1).keys(), expected)


def test_an_object_token_reads_only_its_object() -> None:
    vit = network()
    found = capture(vit, random_images(), 1, masks(), attention=True).objects
    assert (found[:, :, 0, 1:][~masks().expand(-1, 2, -1)] == 0).all()
    torch.testing.assert_close(found.sum(dim=3), torch.ones(3, 2, 1))


@pytest.mark.parametrize("extras", [{}, {"relative_bias": True, "positions": "none"}], ids=str)
@pytest.mark.parametrize("entries", [1, 2**25])
def test_rows_that_are_asked_for_are_those_of_the_whole_matrices(entries, extras, monkeypatch) -> None:
    """Of every block, from a pass that ends there and from one that goes on, against its own matrix."""
    monkeypatch.setattr("foveola.models.capture.ATTENTION_AT_ONCE", entries)
    vit, index = network(registers=2, **extras), torch.tensor([[0, 7], [15, 3], [5, 5]])
    for block in vit.blocks:
        if extras:
            torch.nn.init.normal_(block.attn.relative_position_bias_table)
    for block in range(3):
        seen = attention_of(vit, random_images(), masks(), block - 3)
        also = capture(vit, random_images(), 1, masks(), attention=True, block=block).attention
        x, tokens = vit.prepare(random_images(), masks())
        for layer in vit.blocks[:block]:
            x = layer(x, *tokens.reading)
        at = vit.blocks[block]
        whole = at.attn.weights(at.norm1(x), tokens.readable, tokens.rotation, tokens.grid)
        asked = torch.stack([whole[b][:, 3 + index[b]] for b in range(3)])
        of_patches = whole[:, :, 3:, 3:] / whole[:, :, 3:, 3:].sum(dim=-1, keepdim=True)
        for found in (seen, also):
            torch.testing.assert_close(found.objects(), whole[:, :, :1])
            torch.testing.assert_close(found.centre(), whole[:, :, 3 + 5])
            torch.testing.assert_close(found.patches(index), asked)
            torch.testing.assert_close(found.received(), of_patches.mean(dim=2))
            for part, heads, logits in found.matrices(entries):
                torch.testing.assert_close(logits.softmax(dim=-1), whole[part, heads])
    for block in (-4, 3):
        with pytest.raises(UserError, match=f"^block={block}: this encoder has 3 blocks, 0 to 2$"):
            attention_of(vit, random_images(), None, block)


def test_without_class_token_there_is_only_the_centre() -> None:
    found = capture(network(class_token=False), random_images(), 2, None, attention=True)
    assert found.objects.shape[2] == found.layers[0].objects.shape[1] == 0
    torch.testing.assert_close(found.centre.sum(dim=2), torch.ones(3, 2))


def test_more_blocks_than_there_are() -> None:
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"the last {n} blocks of a network of 3"):
            capture(network(), random_images(), n)


def test_an_encoders_layers_and_capture() -> None:
    vit = network()
    encoder = Encoder(EncoderConfig(vit.config, TransformConfig(resize=16, crop=16)), vit)
    layers = encoder.layers(random_images(), 2, masks())
    both = encoder.capture(random_images(), 2, masks(), attention=True)
    assert both.objects is not None
    for a, b in zip(layers, both.layers, strict=True):
        assert torch.equal(a.objects, b.objects)
        assert torch.equal(a.patches, b.patches)
    assert torch.equal(layers[-1].objects, encoder(random_images(), masks()).objects)


def visited(vit: VisionTransformer, images: Tensor) -> tuple[list[Tensor], list[Tensor], object]:
    """Attention [B, heads, T, T] and output of every block, put together from what `visit` hands out."""
    tokens = vit.config.class_token + vit.config.registers + images[0, 0].numel() // vit.config.patch_size**2
    heads = vit.config.shape[2]
    matrices = [torch.full((len(images), heads, tokens, tokens), torch.nan) for _ in vit.blocks]
    outputs: list[Tensor] = []

    def attention(block: int, random_images: slice, some: slice, logits: Tensor) -> None:
        assert logits.dtype == torch.float32
        matrices[block][random_images, some] = logits.softmax(dim=-1)
        logits.fill_(torch.nan)  # a receiver may overwrite them

    def output(block: int, x: Tensor) -> None:
        assert block == len(outputs)
        outputs.append(x)

    return matrices, outputs, visit(vit, images, attention, output)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 4, "positions": "rope"},
        {
            "class_token": False,
            "registers": 4,
            "positions": "rope",
            "rope": "capi",
            "norm": "rms",
            "bias": False,
        },
        {"positions": "sincos", "class_token": False},
    ],
)
@pytest.mark.parametrize("entries", [1, 2**19])
def test_visit_hands_out_the_attention_of_every_block(changes, entries, monkeypatch) -> None:
    """softmax(q k^T / sqrt(c)) in float64 from the block's own weights and input; outputs bit for bit."""
    monkeypatch.setattr("foveola.models.capture.CACHED", entries)
    vit, images = network(**changes), random_images(3, 16, 12)
    inputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda m, i, o: inputs.append(i[0])) for block in vit.blocks]
    matrices, outputs, features = visited(vit, images)
    for hook in hooks:
        hook.remove()
    whole = vit(images)
    for name in ("objects", "registers", "patches"):
        assert torch.equal(getattr(features, name), getattr(whole, name))
    rotation = vit.prepare(images)[1].rotation
    for index, block in enumerate(vit.blocks):
        normed = block.norm1(inputs[index]).double()
        bias = 0 if block.attn.qkv.bias is None else block.attn.qkv.bias.double()
        qkv = normed @ block.attn.qkv.weight.double().T + bias
        q, k, v = (qkv[..., 24 * i : 24 * i + 24].unflatten(2, (2, 12)).transpose(1, 2) for i in range(3))
        if rotation is not None:
            cosine, sine = (rotation[0, i].double() for i in range(2))
            q, k = (x * cosine + torch.cat((-x[..., 6:], x[..., :6]), dim=-1) * sine for x in (q, k))
        expected = (q @ k.mT / 12**0.5).softmax(dim=-1)
        torch.testing.assert_close(matrices[index].double(), expected, rtol=1e-4, atol=1e-6)
        # The matrices are those with which the block itself averaged its values.
        read = (expected @ v).transpose(1, 2).flatten(2).float()
        x = inputs[index] + block.ls1(block.attn.proj(read))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        torch.testing.assert_close(outputs[index], x, rtol=1e-4, atol=1e-4)


def test_attention_is_float32_under_autocast() -> None:
    vit, images = network(registers=1), random_images()
    exact = visited(vit, images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        coarse = visited(vit, images)[0]  # asserts float32 logits
    assert (coarse[0].sum(dim=-1) - 1).abs().max() < 1e-6
    assert 0 < (coarse[0] - exact[0]).abs().max() < 0.05


def test_logits_of_what_an_object_may_not_read() -> None:
    vit = network()
    x, tokens = vit.prepare(random_images(), masks())
    block = vit.blocks[0]
    expected = block.attn.weights(block.norm1(x), tokens.readable, tokens.rotation)
    for entries in (1, 2**20):
        for part, heads, logits in BlockAttention(block, x, tokens).matrices(entries):
            torch.testing.assert_close(logits.softmax(dim=-1), expected[part, heads])
