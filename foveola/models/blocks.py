"""Transformer blocks: residual branches of attention and MLP, with LayerScale and stochastic depth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from torch.nn.init import constant_, trunc_normal_, xavier_uniform_, zeros_

from foveola.models.attention import Attention, CrossAttention

EPS = {"layer": 1e-6, "rms": 1e-5}  # timm's and CAPI's; torch's own defaults differ


@dataclass(frozen=True)
class BlockShape:
    """Everything that a block is made of."""

    width: int
    heads: int
    hidden: int
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float | None = None
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0
    drop_subset: bool = False
    window: int | None = None
    relative: tuple[int, int] | None = None  # the grid of its table of relative positions


class RmsNorm(nn.RMSNorm):
    """Normalises by the root of the mean square, in float32 whatever comes in.

    Autocast does so for LayerNorm, but not on every device for RMSNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


def make_norm(
    kind: Literal["layer", "rms"], width: int, affine: bool = True, eps: float | None = None
) -> nn.Module:
    make = nn.LayerNorm if kind == "layer" else RmsNorm
    return make(width, eps=EPS[kind] if eps is None else eps, elementwise_affine=affine)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """Gated MLP, fc2(silu(gate) * value); `fc1` makes gate and value at once (timm's packed SwiGLU).

    Two thirds of `hidden`, rounded up to a multiple of 8, so that it has the parameters of the plain MLP.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        inner = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.fc1 = nn.Linear(width, 2 * inner, bias=bias)
        self.fc2 = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Residual(nn.Module):
    """x + branch(x), with stochastic depth in training."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.drop_path, self.drop_subset = shape.drop_path, shape.drop_subset

    def residual(
        self, x: Float[Tensor, "B T D"], branch: Callable[..., Tensor], *others: Tensor | None
    ) -> Float[Tensor, "B T D"]:
        """Add `branch(x, *others)`; `others` are tensors of B (or of one) rows, or None.

        Stochastic depth drops an image's branch with probability p and scales the others by 1 / (1 - p).
        With `drop_subset` exactly max(int(B (1 - p)), 1) images, drawn anew, go through the branch, which
        saves the work for the others; they are scaled by B over their number (DINOv2, CAPI).
        """
        if not self.training or self.drop_path == 0:
            return x + branch(x, *others)
        batch, keep = x.shape[0], 1 - self.drop_path
        if self.drop_subset:
            rows = torch.randperm(batch, device=x.device)[: max(int(batch * keep), 1)]
            added = branch(x[rows], *(_rows_of(other, rows) for other in others))
            # As in x + added: branches behind a LayerScale are float32, and far below the steps of bf16.
            kind = torch.promote_types(x.dtype, added.dtype)
            return x.to(kind).index_add(0, rows, added.to(kind), alpha=batch / len(rows))
        alive = torch.rand(batch, 1, 1, device=x.device) < keep
        branched = branch(x, *others)
        return x + branched * (alive / keep).to(branched.dtype)


def _rows_of(other: Tensor | None, rows: Tensor) -> Tensor | None:
    return other if other is None or other.shape[0] == 1 else other[rows]


class Block(Residual):
    """Pre-norm self-attention and MLP."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        self.norm1 = make_norm(shape.norm, shape.width, eps=shape.norm_eps)
        self.attn = Attention(shape.width, shape.heads, shape.bias, shape.window, shape.relative)
        self.ls1 = _scale(shape)
        self.norm2 = make_norm(shape.norm, shape.width, eps=shape.norm_eps)
        self.mlp = _mlp(shape)
        self.ls2 = _scale(shape)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        objects: int = 0,
        readable: Bool[Tensor, "B 1 M T"] | None = None,
        rotation: Float[Tensor, "#B 2 T d"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Go through attention and MLP; the arguments are those of `Attention`: `TokenLayout.reading`."""
        x = self.residual(
            x,
            lambda x, *others: self.ls1(self.attn(self.norm1(x), objects, *others, grid)),
            readable,
            rotation,
        )
        return self.residual(x, lambda x: self.ls2(self.mlp(self.norm2(x))))


class CrossBlock(Residual):
    """Pre-norm attention to a context, and MLP; rows of x do not see each other (CAPI, Section 3.2)."""

    def __init__(self, shape: BlockShape, context_width: int) -> None:
        super().__init__(shape)
        self.norm1 = make_norm(shape.norm, shape.width, eps=shape.norm_eps)
        self.attn = CrossAttention(shape.width, context_width, shape.heads, shape.bias)
        self.ls1 = _scale(shape)
        self.norm2 = make_norm(shape.norm, shape.width, eps=shape.norm_eps)
        self.mlp = _mlp(shape)
        self.ls2 = _scale(shape)

    def forward(
        self,
        x: Float[Tensor, "B P D"],
        context: Float[Tensor, "B T C"],
        rotation: Float[Tensor, "#B 2 P d"] | None = None,
        context_rotation: Float[Tensor, "#B 2 T d"] | None = None,
    ) -> Float[Tensor, "B P D"]:
        x = self.residual(
            x,
            lambda x, *others: self.ls1(self.attn(self.norm1(x), *others)),
            context,
            rotation,
            context_rotation,
        )
        return self.residual(x, lambda x: self.ls2(self.mlp(self.norm2(x))))


def _scale(shape: BlockShape) -> nn.Module:
    return nn.Identity() if shape.layer_scale is None else LayerScale(shape.width, shape.layer_scale)


def _mlp(shape: BlockShape) -> nn.Module:
    return (Mlp if shape.mlp == "gelu" else SwiGlu)(shape.width, shape.hidden, shape.bias)


def initialise(network: nn.Module, kind: Literal["normal", "xavier"]) -> None:
    """Draw fresh weights: linear layers truncated normal of std 0.02 (DINO) or Xavier uniform (MAE, CAPI)."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            if kind == "normal":
                trunc_normal_(module.weight, std=0.02)
            else:
                # Maps that are kept in one matrix (q, k, v) are drawn each with its own fan-out.
                width = module.in_features
                parts = getattr(module, "parts", 1)
                for part in module.weight.data.view(parts, -1, width):
                    xavier_uniform_(part)
            if module.bias is not None:
                zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
        elif isinstance(module, LayerScale):
            constant_(module.gamma, module.value)
        elif isinstance(module, Attention) and module.relative_position_bias_table is not None:
            zeros_(module.relative_position_bias_table)
