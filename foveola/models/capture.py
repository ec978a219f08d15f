"""What a ViT says besides its last output: outputs of earlier blocks, and who reads what in each of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn.functional import linear

from foveola.models.attention import rotate, split_heads
from foveola.models.blocks import Block
from foveola.models.vit import Features, Tokens, VisionTransformer

ENTRIES = 2**25  # entries of attention matrices in memory at a time: 128 MiB
CACHED = 2**19  # on a CPU: 2 MiB stay in its cache while statistics go over them again and again


@dataclass(frozen=True, eq=False)
class Capture:
    """Outputs of the last blocks, and rows of the attention of the last one (softmax over all T tokens)."""

    layers: tuple[Features, ...]  # each through the final norm; the last block's is the last
    objects: Float[Tensor, "B heads M T"] | None  # what each object token reads
    centre: Float[Tensor, "B heads T"] | None  # what the central patch reads


def capture(
    network: VisionTransformer,
    images: Float[Tensor, "B 3 H W"],
    n: int = 1,
    objects: Bool[Tensor, "B M N"] | None = None,
    attention: bool = False,
) -> Capture:
    """Outputs of the last n blocks from one pass; with `attention` also rows of the last block's matrix.

    `layers[-1]` is what `network(images, objects)` gives. Tokens T stand in the order [object tokens,
    registers, patches]. The central patch of an even grid is the upper left one of the four: row (h - 1) // 2
    (P004's code: row 6, column 6 of 14). Raises ValueError unless the network has n blocks.
    """
    if not 1 <= n <= len(network.blocks):
        raise ValueError(f"the last {n} blocks of a network of {len(network.blocks)}")
    x, tokens = network.prepare(images, objects)
    outputs, rows = [], None
    for index, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        if attention and index == len(network.blocks) - 1:
            rows = _attention_rows(block, x, tokens)
        x = block(x, tokens.objects, tokens.readable, tokens.rotation)
        if index >= len(network.blocks) - n:
            outputs.append(network.finish(x, tokens))
    return Capture(tuple(outputs), *(rows or (None, None)))


def visit(
    network: VisionTransformer,
    images: Float[Tensor, "B 3 H W"],
    attention: Callable[[int, slice, slice, Tensor], None],
    output: Callable[[int, Tensor], None] | None = None,
) -> Features:
    """One pass that hands out the attention of every block, a few matrices at a time.

    Calls `attention(block, pictures, heads, logits)` for all blocks from 0, with `logits` as in
    `attention_logits`, and then `output(block, x)` with what the block gives, [B, T, D], not yet normalised.
    Returns what `network(images)` returns, bit for bit: the pass itself keeps the fused kernels, and the
    logits are computed beside it.
    """
    x, tokens = network.prepare(images)
    for index, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        for pictures, heads, logits in attention_logits(block, x, tokens):
            attention(index, pictures, heads, logits)
        x = block(x, tokens.objects, tokens.readable, tokens.rotation)
        if output is not None:
            output(index, x)
    return network.finish(x, tokens)


def attention_logits(
    block: Block, x: Float[Tensor, "B T D"], tokens: Tokens, entries: int | None = None
) -> Iterator[tuple[slice, slice, Float32[Tensor, "b g T T"]]]:
    """q k^T / sqrt(d) of a block on its input x, in float32 also under autocast; softmax gives the attention.

    Yields (pictures, heads, logits): some pictures with all heads, or, where one picture has more than
    `entries` numbers, one with some of its heads. What an object token may not read is -inf. The receiver may
    overwrite them. Queries and keys are those of the block, rotary positions included.
    """
    attn, width = block.attn, x.shape[-1]
    bias = None if attn.qkv.bias is None else attn.qkv.bias[: 2 * width]
    both = linear(block.norm1(x), attn.qkv.weight[: 2 * width], bias)
    query, key = (rotate(part, tokens.rotation) for part in split_heads(both, 2, attn.heads))
    query, key = query.float() * query.shape[-1] ** -0.5, key.float()
    count = (CACHED if x.device.type == "cpu" else ENTRIES) if entries is None else entries
    together = max(1, count // x.shape[1] ** 2)  # matrices at a time
    few, some = max(1, together // attn.heads), min(together, attn.heads)
    for start in range(0, len(x), few):
        for first in range(0, attn.heads, some):
            part, heads = slice(start, start + few), slice(first, first + some)
            with torch.autocast(x.device.type, enabled=False):
                logits = query[part, heads] @ key[part, heads].mT
            if tokens.readable is not None:
                logits[:, :, : tokens.objects].masked_fill_(~tokens.readable[part], -torch.inf)
            yield part, heads, logits


def _attention_rows(block: Block, x: Float[Tensor, "B T D"], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The rows of the object tokens and of the central patch; whole matrices only of a few pictures."""
    rows, columns = tokens.grid
    centre = tokens.objects + tokens.registers + (rows - 1) // 2 * columns + (columns - 1) // 2
    special = x.new_empty(len(x), block.attn.heads, tokens.objects, x.shape[1], dtype=torch.float32)
    central = x.new_empty(len(x), block.attn.heads, x.shape[1], dtype=torch.float32)
    for part, heads, logits in attention_logits(block, x, tokens, ENTRIES):
        special[part, heads] = logits[:, :, : tokens.objects].softmax(dim=-1)
        central[part, heads] = logits[:, :, centre].softmax(dim=-1)
    return special, central
