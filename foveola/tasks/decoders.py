"""Decoders of segmentation: from the patches of an encoder to a logit for each class, patch by patch."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import batch_norm, interpolate, normalize
from torch.nn.init import trunc_normal_

from foveola import distributed
from foveola.config import key
from foveola.models.blocks import Block, BlockShape, initialise

HEAD_WIDTH = 64  # channels of an attention head, as in every ViT of DINO and Segmenter


@dataclass(frozen=True)
class DecoderConfig:
    """How a decoder is built. The defaults are those of Segmenter's linear decoder."""

    kind: Literal["linear", "mask"] = key(
        "linear",
        "a linear layer on patches, or Segmenter's mask transformer, which has a token for each class",
    )
    batch_norm: bool = key(
        False, "kind=linear: channels are normalised over the patches of a batch (DINOv2's frozen probe)"
    )
    depth: int = key(2, "kind=mask: number of blocks", at_least=1, at_most=100)
    heads: int | None = key(
        None, "kind=mask: attention heads; null = one for 64 channels", at_least=1, at_most=2**12
    )

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        if self.kind == "mask":
            return {"batch_norm": "kind=mask normalises by itself"}
        return dict.fromkeys(("depth", "heads"), "kind=linear has no blocks")

    def check(self, width: int) -> None:
        """Raise ValueError where heads do not share the width."""
        if self.kind == "mask" and width % self.heads_of(width):
            raise ValueError(f"method.decoder.heads={self.heads_of(width)} does not divide the width {width}")

    def heads_of(self, width: int) -> int:
        """Return the number of attention heads."""
        return self.heads or max(width // HEAD_WIDTH, 1)

    def make(self, width: int, classes: int) -> "LinearDecoder | MaskDecoder":
        """Return a decoder with fresh weights."""
        if self.kind == "linear":
            return LinearDecoder(width, classes, self.batch_norm)
        return MaskDecoder(width, classes, self.depth, self.heads_of(width))


class PatchNorm(nn.Module):
    """Batch normalisation of each channel over the patches of all images of all processes.

    Patches of padding do not count. Statistics carry no gradient, which makes no difference on a frozen
    encoder; so several processes compute what one would. At the end running means of them are used, as in
    torch's own, whose parameter names it has.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(
        self, x: Float[Tensor, "B N D"], counted: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Normalise; in training by the statistics of the counted patches (None: all)."""
        mean, variance = (
            self._statistics(x, counted) if self.training else (self.running_mean, self.running_var)
        )
        rows = batch_norm(x.flatten(0, 1).float(), mean, variance, self.weight, self.bias, eps=self.eps)
        return rows.view(x.shape)

    @torch.no_grad()
    def _statistics(self, x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = (x.flatten(0, 1) if counted is None else x[counted]).double()
        sums = torch.stack(
            (rows.sum(dim=0), rows.square().sum(dim=0), rows.new_full(rows.shape[1:], len(rows)))
        )
        total, squares, count = distributed.all_reduce_sum(sums)
        count = count.clamp(min=1)
        mean = total / count
        variance = (squares / count - mean**2).clamp(min=0)
        unbiased = variance * count / (count - 1).clamp(min=1)
        for kept, now in ((self.running_mean, mean), (self.running_var, unbiased)):
            kept.lerp_(now.to(kept), self.momentum)
        return mean.float(), variance.float()


class LinearDecoder(nn.Module):
    """One linear layer, which starts from a truncated normal of 0.02 and no bias (Segmenter, Section 3.2)."""

    def __init__(self, width: int, classes: int, normed: bool = False) -> None:
        super().__init__()
        self.norm = PatchNorm(width) if normed else None
        self.linear = nn.Linear(width, classes)
        initialise(self.linear, "normal")

    def forward(
        self, patches: Float[Tensor, "B N D"], counted: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """Return logits. `counted` are the patches that have pixels of the image; None: all."""
        return self.linear(patches if self.norm is None else self.norm(patches, counted))


class MaskDecoder(nn.Module):
    """Segmenter's mask transformer (Section 3.2): patches and a token for each class through blocks.

    A logit is the scalar product of a patch and a class, both projected and of unit length; LayerNorm over
    the classes of each patch then sets the scale. Nothing is dropped out.
    """

    def __init__(self, width: int, classes: int, depth: int, heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)
        shape = BlockShape(width=width, heads=heads, hidden=4 * width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.mask_norm = nn.LayerNorm(classes)
        initialise(self, "normal")
        self.class_tokens = nn.Parameter(torch.empty(1, classes, width))
        trunc_normal_(self.class_tokens, std=0.02)
        self.patch_map, self.class_map = (
            nn.Parameter(torch.randn(width, width) * width**-0.5) for _ in range(2)
        )

    def forward(
        self, patches: Float[Tensor, "B N D"], counted: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """Return logits. All patches are read, those of padding (not `counted`) too, as in the encoder."""
        x = torch.cat((self.proj(patches), self.class_tokens.expand(len(patches), -1, -1)), dim=1)
        for block in self.blocks:
            x = block(x)
        features, classes = self.norm(x).split((patches.shape[1], self.class_tokens.shape[1]), dim=1)
        # In float32: half precision cannot hold the small number that keeps zero from being divided by.
        unit = normalize((features @ self.patch_map).float(), dim=-1)
        names = normalize((classes @ self.class_map).float(), dim=-1)
        return self.mask_norm(unit @ names.mT)


def enlarged_logits(
    logits: Float[Tensor, "B N C"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "B C {size[0]} {size[1]}"]:
    """Return logits of patches, row by row on a grid, at the pixels of a size: bilinear, in float32."""
    field = logits.float().transpose(1, 2).unflatten(2, grid)
    return interpolate(field, size, mode="bilinear", align_corners=False)
