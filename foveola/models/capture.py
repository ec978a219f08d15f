"""What a ViT says besides its last output: outputs of earlier blocks, and who reads what in the last one."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveola.models.blocks import Block
from foveola.models.vit import Features, Tokens, VisionTransformer

ENTRIES = 2**25  # entries of attention matrices in memory at a time: 128 MiB


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


def _attention_rows(block: Block, x: Float[Tensor, "B T D"], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The rows of the object tokens and of the central patch; whole matrices only of a few pictures."""
    rows, columns = tokens.grid
    centre = tokens.objects + tokens.registers + (rows - 1) // 2 * columns + (columns - 1) // 2
    few = max(1, ENTRIES // (block.attn.heads * x.shape[1] ** 2))
    special, central = [], []
    for start in range(0, len(x), few):
        part = slice(start, start + few)
        readable = None if tokens.readable is None else tokens.readable[part]
        rotation = tokens.rotation
        if rotation is not None and len(rotation) > 1:
            rotation = rotation[part]
        weights = block.attn.weights(block.norm1(x[part]), readable, rotation)
        special.append(weights[:, :, : tokens.objects])
        central.append(weights[:, :, centre])
    return torch.cat(special), torch.cat(central)
