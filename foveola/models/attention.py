"""Multi-head attention: object tokens read only their own object, without a full mask; rotary positions."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from foveola.models.relative import relative_bias, table_rows
from foveola.models.windows import has_windows, windowed_attention


class PackedLinear(nn.Linear):
    """Several linear maps of one input in one matrix, one after the other."""

    def __init__(self, width: int, out: int, parts: int, bias: bool = True) -> None:
        super().__init__(width, parts * out, bias=bias)
        self.parts = parts


class Attention(nn.Module):
    """Self-attention with timm's parameter names (`qkv`, `proj`, `relative_position_bias_table`)."""

    relative_position_bias_table: nn.Parameter | None

    def __init__(
        self,
        width: int,
        heads: int,
        bias: bool = True,
        window: int | None = None,
        relative: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.window, self.relative = heads, window, relative
        self.qkv = PackedLinear(width, width, 3, bias)
        self.proj = nn.Linear(width, width, bias=bias)
        table = None if relative is None else nn.Parameter(torch.zeros(table_rows(relative), heads))
        self.register_parameter("relative_position_bias_table", table)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        objects: int = 0,
        readable: Bool[Tensor, "B 1 M T"] | None = None,
        rotation: Float[Tensor, "#B 2 T d"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend; the first `objects` tokens only to those named in `readable`, all others to every
        token.

        The restriction concerns a few rows of the attention matrix, so they make a second, small call and the
        patches keep the fast unmasked kernel (ODIS, Section 4 and Figure 3). Both calls are made without a
        mask as well (1 % of the attention's time): an object that is the whole image gives the plain class
        token, bit for bit. `rotation` turns queries and keys (see `positions.Rope`).

        With a `window`, patches (the last of the tokens, on a `grid` of rows and columns) read the patches of
        their window and all other tokens, which read every token. With a table of `relative` positions, every
        pair of tokens has a bias in its logits, so that all rows of the attention matrix have a mask.
        """
        query, key, value = self.heads_of(x, rotation)
        bias = None if grid is None else self.bias(grid, x.shape[1])
        if bias is not None:
            return self._biased(query, key, value, bias.to(query.dtype), objects, readable)
        if grid is not None and self.window is not None and has_windows(self.window, grid):
            special = x.shape[1] - grid[0] * grid[1]
            out = windowed_attention(query[:, :, special:], key, value, grid, self.window)
            if special > objects:
                registers = scaled_dot_product_attention(query[:, :, objects:special], key, value)
                out = torch.cat((registers, out), dim=2)
        else:
            out = scaled_dot_product_attention(query[:, :, objects:], key, value)
        if objects:
            of_objects = scaled_dot_product_attention(query[:, :, :objects], key, value, attn_mask=readable)
            out = torch.cat((of_objects, out), dim=2)
        return self.proj(out.transpose(1, 2).flatten(2))

    def bias(self, grid: tuple[int, int], tokens: int) -> Float[Tensor, "heads T T"] | None:
        """Return what is added to the logits of so many tokens, of which the last are the patches of a grid.

        None without a table of relative positions.
        """
        if self.relative is None or self.relative_position_bias_table is None:
            return None
        special = tokens - grid[0] * grid[1]
        return relative_bias(self.relative_position_bias_table, self.relative, grid, special)

    def _biased(
        self,
        query: Float[Tensor, "B heads T d"],
        key: Float[Tensor, "B heads T d"],
        value: Float[Tensor, "B heads T d"],
        bias: Float[Tensor, "heads T T"],
        objects: int,
        readable: Bool[Tensor, "B 1 M T"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Attend with a bias: objects and all others in a call each, as in `forward`."""
        own = bias[None, :, :objects]
        if readable is not None:
            own = own.masked_fill(~readable, -torch.inf)
        out = scaled_dot_product_attention(
            query[:, :, objects:], key, value, attn_mask=bias[None, :, objects:]
        )
        if objects:
            of_objects = scaled_dot_product_attention(query[:, :, :objects], key, value, attn_mask=own)
            out = torch.cat((of_objects, out), dim=2)
        return self.proj(out.transpose(1, 2).flatten(2))

    def heads_of(
        self, x: Float[Tensor, "B T D"], rotation: Float[Tensor, "#B 2 T d"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [B, heads, T, D / heads]."""
        query, key, value = split_heads(self.qkv(x), 3, self.heads)
        return rotate(query, rotation), rotate(key, rotation), value

    def weights(
        self,
        x: Float[Tensor, "B T D"],
        readable: Bool[Tensor, "B 1 M T"] | None = None,
        rotation: Float[Tensor, "#B 2 T d"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B heads T T"]:
        """Return the attention matrix of `forward`, softmax(q k^T / sqrt(d) + bias), without windows."""
        query, key, _ = self.heads_of(x, rotation)
        logits = (query @ key.mT) * query.shape[-1] ** -0.5
        bias = None if grid is None else self.bias(grid, x.shape[1])
        logits = logits if bias is None else logits + bias
        if readable is not None:
            count = readable.shape[2]
            logits[:, :, :count] = logits[:, :, :count].masked_fill(~readable, -torch.inf)
        return logits.softmax(dim=-1)


class CrossAttention(nn.Module):
    """Every row attends to the context alone, never to another row."""

    def __init__(self, width: int, context_width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = PackedLinear(context_width, width, 2, bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B P D"],
        context: Float[Tensor, "B T C"],
        rotation: Float[Tensor, "#B 2 P d"] | None = None,
        context_rotation: Float[Tensor, "#B 2 T d"] | None = None,
    ) -> Float[Tensor, "B P D"]:
        (query,) = split_heads(self.q(x), 1, self.heads)
        key, value = split_heads(self.kv(context), 2, self.heads)
        query, key = rotate(query, rotation), rotate(key, context_rotation)
        out = scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


def split_heads(x: Float[Tensor, "B T PD"], parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split packed projections into `parts` tensors, each [B, heads, T, D / heads]."""
    batch, tokens, width = x.shape
    x = x.view(batch, tokens, parts, heads, width // (parts * heads))
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def rotate(
    x: Float[Tensor, "B heads T d"], rotation: Float[Tensor, "#B 2 T d"] | None
) -> Float[Tensor, "B heads T d"]:
    """Rotate by position: x cos + (-x2, x1) sin, where x1 and x2 are the halves of the channels of a
    head.

    Channel j and channel j + d/2 thus make a pair; whether it turns by one angle is up to `rotation`, which
    holds cosines and sines (of one row where they are the same for all images). None leaves x as it is.
    """
    if rotation is None:
        return x
    cosine, sine = rotation[:, None, 0], rotation[:, None, 1]
    first, second = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat((-second, first), dim=-1) * sine).to(x.dtype)


def readable_tokens(objects: Bool[Tensor, "B M N"], registers: int) -> Bool[Tensor, "B 1 M T"]:
    """Return what each object token may read in [object tokens, registers, patches]: itself, registers, its
    patches.

    An object without a patch reads everything: the softmax is never over nothing but the token itself.
    """
    batch, count, _ = objects.shape
    objects = objects | ~objects.any(dim=2, keepdim=True)
    itself = torch.eye(count, dtype=torch.bool, device=objects.device).expand(batch, count, count)
    extra = objects.new_ones(batch, count, registers)
    return torch.cat((itself, extra, objects), dim=2)[:, None]
