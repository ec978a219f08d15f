"""What a ViT says besides its last output: outputs of earlier blocks, and who reads what in each of them.

The only reader of attention: protocols, analyses and figures ask here for the rows that they need.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import linear

from foveola.config import UserError
from foveola.models.attention import rotate, split_heads
from foveola.models.blocks import Block
from foveola.models.vit import Features, TokenLayout, VisionTransformer
from foveola.models.windows import has_windows, window_mask
from foveola.models.wrapped import Wrapped

ATTENTION_AT_ONCE = 2**25  # entries of attention matrices in memory at a time: 128 MiB
CACHED = 2**19  # on a CPU: 2 MiB stay in its cache while statistics go over them again and again


class AttentionRows(ABC):
    """Who reads what in a block: rows of its attention matrix.

    Tokens T stand in the order [object tokens, registers, patches].
    """

    special: int  # object tokens and registers, which stand before the patches
    grid: tuple[int, int]  # rows and columns of patches
    shape: tuple[int, int, int]  # images, heads, tokens

    @abstractmethod
    def keys(self) -> Float32[Tensor, "B N D"]:
        """Return the keys of the patches, the heads one after the other, before rotary positions turn them.

        They are the features of LOST, TokenCut and MaskCut.
        """

    @abstractmethod
    def objects(self) -> Float32[Tensor, "B heads M T"]:
        """Return what each object token reads; nothing outside its object."""

    @abstractmethod
    def patches(self, index: Int64[Tensor, "B Q"]) -> Float32[Tensor, "B heads Q T"]:
        """Return what patches (indices, row-major) of each image read."""

    @abstractmethod
    def matrices(
        self, entries: int | None = None
    ) -> Iterator[tuple[slice, slice, Float32[Tensor, "b g T T"]]]:
        """Yield all logits, whose softmax is the attention, a few matrices at a time.

        Yields (images, heads, logits): some images with all heads, or, where one image has more than
        `entries` numbers, one with some of its heads. What an object token may not read, and what lies in
        another window, is -inf. The receiver may overwrite them.
        """

    @abstractmethod
    def _rows(self, rows: slice) -> Float32[Tensor, "B heads Q T"]: ...

    def centre(self) -> Float32[Tensor, "B heads T"]:
        """Return what the central patch reads: of an even grid the upper left one of the four."""
        rows, columns = self.grid
        at = self.special + (rows - 1) // 2 * columns + (columns - 1) // 2
        return self._rows(slice(at, at + 1))[:, :, 0]

    def received(self) -> Float32[Tensor, "B heads N"]:
        """Return how much of the patches' attention to patches each patch receives: the mean of their rows.

        Each row is divided by its sum over the patches first. Some rows are computed at a time.
        """
        batch, heads, count = self.shape
        at_once = max(ATTENTION_AT_ONCE // (batch * heads * count), 1)
        total: Tensor | float = 0.0
        for start in range(self.special, count, at_once):
            weights = self._rows(slice(start, start + at_once))[..., self.special :]
            total = total + (weights / weights.sum(dim=-1, keepdim=True)).sum(dim=2)
        assert isinstance(total, Tensor)  # there is a patch
        return total / total.shape[-1]


class GivenAttention(AttentionRows):
    """AttentionRows of which the weights are known and nothing else: that of a wrapped network."""

    def __init__(
        self, weights: Float[Tensor, "B heads T T"], objects: int, grid: tuple[int, int], name: str
    ) -> None:
        self.weights, self.count, self.grid, self.name = weights.float(), objects, grid, name
        batch, heads, tokens, _ = weights.shape
        self.shape, self.special = (batch, heads, tokens), tokens - grid[0] * grid[1]

    def keys(self) -> NoReturn:
        raise UserError(f"keys: {self.name} is wrapped, and gives the weights of its attention alone")

    def objects(self) -> Float32[Tensor, "B heads M T"]:
        return self.weights[:, :, : self.count]

    def patches(self, index: Int64[Tensor, "B Q"]) -> Float32[Tensor, "B heads Q T"]:
        at = (index + self.special)[:, None, :, None]
        return self.weights.gather(2, at.expand(-1, self.shape[1], -1, self.shape[2]))

    def matrices(
        self, entries: int | None = None
    ) -> Iterator[tuple[slice, slice, Float32[Tensor, "b g T T"]]]:
        every = slice(0, self.shape[1])
        for start in range(self.shape[0]):
            images = slice(start, start + 1)
            yield images, every, self.weights[images].log()

    def _rows(self, rows: slice) -> Float32[Tensor, "B heads Q T"]:
        return self.weights[:, :, rows]


class BlockAttention(AttentionRows):
    """The attention of a block of ours, softmax(q k^T / sqrt(d) + bias).

    Queries and keys are those of the block, rotary positions included; products and softmax are float32 also
    under autocast.
    """

    def __init__(self, block: Block, x: Float[Tensor, "B T D"], tokens: TokenLayout) -> None:
        attn, width = block.attn, x.shape[-1]
        bias = None if attn.qkv.bias is None else attn.qkv.bias[: 2 * width]
        both = linear(block.norm1(x), attn.qkv.weight[: 2 * width], bias)
        parts = split_heads(both, 2, attn.heads)
        self.placeless = parts[1]  # keys that say nothing of where a token stands
        query, key = (rotate(part, tokens.rotation) for part in parts)
        self.query, self.key = query.float() * query.shape[-1] ** -0.5, key.float()
        self.tokens, self.grid = tokens, tokens.grid
        self.special = tokens.objects + tokens.registers
        self.shape = (x.shape[0], attn.heads, x.shape[1])
        # [heads or 1, T, T]: the bias of relative positions, or -inf for what lies in another window
        added = attn.bias(tokens.grid, x.shape[1])
        if attn.window is not None and has_windows(attn.window, tokens.grid):
            seen = window_mask(tokens.grid, attn.window, self.special, x.device)
            added = torch.zeros(seen.shape, device=x.device).masked_fill_(~seen, -torch.inf)[None]
        self.added: Tensor | None = None if added is None else added.detach().float()

    def keys(self) -> Float32[Tensor, "B N D"]:
        return self.placeless[:, :, self.special :].transpose(1, 2).flatten(2).float()

    def objects(self) -> Float32[Tensor, "B heads M T"]:
        objects = slice(0, self.tokens.objects)
        logits = self._logits(self.query[:, :, objects], self.key, self._added(objects))
        if self.tokens.readable is not None:
            logits.masked_fill_(~self.tokens.readable, -torch.inf)
        return logits.softmax(dim=-1)

    def patches(self, index: Int64[Tensor, "B Q"]) -> Float32[Tensor, "B heads Q T"]:
        at = (index + self.special)[:, None, :, None]
        rows = self.query.gather(2, at.expand(-1, self.query.shape[1], -1, self.query.shape[3]))
        added = None if self.added is None else self.added[:, index + self.special].movedim(1, 0)
        return self._logits(rows, self.key, added).softmax(dim=-1)

    def matrices(
        self, entries: int | None = None
    ) -> Iterator[tuple[slice, slice, Float32[Tensor, "b g T T"]]]:
        batch, heads, count, _ = self.query.shape
        if entries is None:
            entries = CACHED if self.query.device.type == "cpu" else ATTENTION_AT_ONCE
        together = max(1, entries // count**2)  # matrices at a time
        few, some = max(1, together // heads), min(together, heads)
        for start in range(0, batch, few):
            for first in range(0, heads, some):
                images, group = slice(start, start + few), slice(first, first + some)
                added = self.added if self.added is None or len(self.added) == 1 else self.added[group]
                logits = self._logits(self.query[images, group], self.key[images, group], added)
                if self.tokens.readable is not None:
                    readable = self.tokens.readable[images]
                    logits[:, :, : self.tokens.objects].masked_fill_(~readable, -torch.inf)
                yield images, group, logits

    def _added(self, rows: slice) -> Float32[Tensor, "#heads Q T"] | None:
        return None if self.added is None else self.added[:, rows]

    def _rows(self, rows: slice) -> Float32[Tensor, "B heads Q T"]:
        return self._logits(self.query[:, :, rows], self.key, self._added(rows)).softmax(dim=-1)

    @staticmethod
    def _logits(query: Tensor, key: Tensor, added: Tensor | None) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):  # which would round them to half precision
            logits = query @ key.mT
            return logits if added is None else logits.add_(added)


@dataclass(frozen=True, eq=False)
class Capture:
    """Outputs of the last blocks, and on request the attention of a block."""

    layers: tuple[Features, ...]  # each through the final norm; the last block's is the last
    attention: AttentionRows | None

    @property
    def objects(self) -> Float32[Tensor, "B heads M T"] | None:
        """What each object token reads."""
        return None if self.attention is None else self.attention.objects()

    @property
    def centre(self) -> Float32[Tensor, "B heads T"] | None:
        """What the central patch reads."""
        return None if self.attention is None else self.attention.centre()


def block_index(network: VisionTransformer, block: int) -> int:
    """Return the index of a block: negative numbers count from the last. Raises UserError where there is
    none.
    """
    depth = network.config.shape[1]
    if isinstance(network, Wrapped) and block not in (0, -1):  # its output is all that there is
        network.config.refuse(f"block={block}")
    if not -depth <= block < depth:
        raise UserError(f"block={block}: this encoder has {depth} blocks, 0 to {depth - 1}")
    return range(depth)[block]


def capture(
    network: VisionTransformer,
    images: Float[Tensor, "B ch H W"],
    n: int = 1,
    objects: Bool[Tensor, "B M N"] | None = None,
    attention: bool = False,
    block: int = -1,
) -> Capture:
    """Return outputs of the last n blocks from one pass; with `attention` also that of a block, by default
    the last.

    `layers[-1]` is what `network(images, objects)` gives. Raises ValueError unless the network has n blocks,
    UserError for a `block` that there is not.
    """
    if isinstance(network, Wrapped):
        if n != 1:
            network.config.refuse("the output of an earlier block")
        if not attention:
            return Capture((network(images, objects),), None)
        block_index(network, block)
        found, _, seen = _given(network, images, objects)
        return Capture((found,), seen)
    if not 1 <= n <= len(network.blocks):
        raise ValueError(f"the last {n} blocks of a network of {len(network.blocks)}")
    asked = block_index(network, block) if attention else None
    x, tokens = network.prepare(images, objects)
    outputs, seen = [], None
    for index, layer in enumerate(_blocks(network)):
        if index == asked:
            seen = BlockAttention(layer, x, tokens)
        x = layer(x, *tokens.reading)
        if index >= len(network.blocks) - n:
            outputs.append(network.finish(x, tokens))
    return Capture(tuple(outputs), seen)


def attention_of(
    network: VisionTransformer,
    images: Float[Tensor, "B ch H W"],
    objects: Bool[Tensor, "B M N"] | None = None,
    block: int = -1,
) -> AttentionRows:
    """Return the attention of a block; what comes after it is not computed. Raises UserError as
    `block_index`.
    """
    index = block_index(network, block)
    if isinstance(network, Wrapped):
        return _given(network, images, objects)[2]
    x, tokens = network.prepare(images, objects)
    for layer in _blocks(network)[:index]:
        x = layer(x, *tokens.reading)
    return BlockAttention(_blocks(network)[index], x, tokens)


def visit(
    network: VisionTransformer,
    images: Float[Tensor, "B ch H W"],
    attention: Callable[[int, slice, slice, Tensor], None],
    output: Callable[[int, Tensor], None] | None = None,
) -> Features:
    """Return one pass that hands out the attention of every block, a few matrices at a time.

    Calls `attention(block, images, heads, logits)` for all blocks from 0, with `logits` as in
    `BlockAttention.matrices`, and then `output(block, x)` with what the block gives, [B, T, D], not yet
    normalised. Returns what `network(images)` returns, bit for bit: the pass itself keeps the fused kernels,
    and the logits are computed beside it.
    """
    if isinstance(network, Wrapped):
        found, x, seen = _given(network, images, None)
        for part, heads, logits in seen.matrices():
            attention(0, part, heads, logits)
        if output is not None:
            output(0, x)
        return found
    x, tokens = network.prepare(images)
    for index, layer in enumerate(_blocks(network)):
        for part, heads, logits in BlockAttention(layer, x, tokens).matrices():
            attention(index, part, heads, logits)
        x = layer(x, *tokens.reading)
        if output is not None:
            output(index, x)
    return network.finish(x, tokens)


def _given(
    network: Wrapped, images: Tensor, objects: Tensor | None
) -> tuple[Features, Float[Tensor, "B T D"], GivenAttention]:
    """What a wrapped network gives of images, all of its tokens, and the attention that comes with them."""
    found, given = network.with_tokens(images, objects)
    if given.attention is None:
        network.config.refuse("attention")
    config = network.config
    return (
        found,
        given.tokens,
        GivenAttention(given.attention, int(config.class_token), given.grid, config.name),
    )


def _blocks(network: VisionTransformer) -> list[Any]:
    return list(network.blocks)
