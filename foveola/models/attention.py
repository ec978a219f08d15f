"""Multi-head self-attention whose object tokens read only their own object, without a full mask."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Self-attention with timm's parameter names (`qkv`, `proj`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B T D"], objects: int, readable: Bool[Tensor, "B 1 M T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Attend; the first `objects` tokens only to those named in `readable`, all others to every token.

        The restriction concerns a few rows of the attention matrix, so they make a second, small call and the
        patches keep the fast unmasked kernel (ODIS, Section 4 and Figure 3). Both calls are made without a
        mask as well (1 % of the attention's time): an object that is the whole picture gives the plain class
        token, bit for bit.
        """
        query, key, value = self.heads_of(x)
        few = scaled_dot_product_attention(query[:, :, :objects], key, value, attn_mask=readable)
        many = scaled_dot_product_attention(query[:, :, objects:], key, value)
        return self.proj(torch.cat((few, many), dim=2).transpose(1, 2).flatten(2))

    def heads_of(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, heads, T, D / heads]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def weights(
        self, x: Float[Tensor, "B T D"], readable: Bool[Tensor, "B 1 M T"] | None = None
    ) -> Float[Tensor, "B heads T T"]:
        """The attention matrix of `forward`, softmax(q k^T / sqrt(d)), for inspection."""
        query, key, _ = self.heads_of(x)
        logits = (query @ key.mT) * query.shape[-1] ** -0.5
        if readable is not None:
            count = readable.shape[2]
            logits[:, :, :count] = logits[:, :, :count].masked_fill(~readable, -torch.inf)
        return logits.softmax(dim=-1)


def readable_tokens(objects: Bool[Tensor, "B M N"], registers: int) -> Bool[Tensor, "B 1 M T"]:
    """What each object token may read in [object tokens, registers, patches]: itself, registers, its patches.

    An object without a patch reads everything: the softmax is never over nothing but the token itself.
    """
    batch, count, _ = objects.shape
    objects = objects | ~objects.any(dim=2, keepdim=True)
    itself = torch.eye(count, dtype=torch.bool, device=objects.device).expand(batch, count, count)
    extra = objects.new_ones(batch, count, registers)
    return torch.cat((itself, extra, objects), dim=2)[:, None]
