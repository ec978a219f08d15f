"""The Vision Transformer: pictures in, `Features` out. Parameter names are timm's.

Tokens stand in the order [object tokens, registers, patches]. An object token is the class token; given
object masks there is one for each object, all from the same parameter, each reading only its object's
patches. Patches and registers read everything, so with several object tokens a patch sees each of them as one
further token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.init import constant_, normal_, trunc_normal_, zeros_
from torch.utils.checkpoint import checkpoint

from foveola.config import key
from foveola.models.attention import Attention, readable_tokens
from foveola.models.positions import resize_positions, sincos_positions

SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "giant": (1536, 40, 24),
}


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the network. Defaults: ViT-S/16 as in DINO and iBOT."""

    size: Literal["tiny", "small", "base", "large", "giant"] = key("small", "width, depth and heads by name")
    width: int | None = key(None, "token width instead of the size's", at_least=1)
    depth: int | None = key(None, "blocks instead of the size's", at_least=1)
    heads: int | None = key(None, "attention heads instead of the size's", at_least=1)
    patch_size: int = key(16, "pixels a side of a patch", at_least=1)
    image_size: int = key(224, "picture side that fits the position table without resizing", at_least=1)
    mlp_ratio: float = key(4.0, "hidden width of the MLP over the token width", above=0)
    registers: int = key(0, "learnable extra tokens that no loss reads", at_least=0)
    drop_path: float = key(
        0.1, "stochastic depth of the last block in training, rising linearly from 0", at_least=0, below=1
    )
    position_antialias: bool = key(
        False, "antialias when resizing positions: timm does, DINO and iBOT do not"
    )
    position_init: Literal["random", "sincos"] = key(
        "random", "start positions from noise of 0.02 (DINO), or from sines"
    )
    layer_scale: float | None = key(
        None, "initial per-channel scale of each residual branch; null = none", above=0
    )

    def __post_init__(self) -> None:
        width, _, heads = self.shape
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(width, depth, heads)."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads


@dataclass(frozen=True, eq=False)
class Features:
    """What a ViT says about B pictures, after the final norm."""

    objects: Float[Tensor, "B M D"]
    registers: Float[Tensor, "B R D"]
    patches: Float[Tensor, "B N D"]
    grid: tuple[int, int]


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map, kept as a convolution for its parameter names."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        return self.proj(images).flatten(2).mT


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm attention and MLP, each a residual branch with optional LayerScale and drop path."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        width, _, heads = config.shape
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = nn.Identity() if config.layer_scale is None else LayerScale(width, config.layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.ls2 = nn.Identity() if config.layer_scale is None else LayerScale(width, config.layer_scale)

    def forward(
        self, x: Float[Tensor, "B T D"], objects: int, readable: Bool[Tensor, "B 1 M T"] | None
    ) -> Float[Tensor, "B T D"]:
        x = x + self.drop(self.ls1(self.attn(self.norm1(x), objects, readable)))
        return x + self.drop(self.ls2(self.mlp(self.norm2(x))))

    def drop(self, branch: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Stochastic depth: drop a picture's branch with probability p, scale the others by 1 / (1 - p)."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        alive = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
        return branch * (alive / keep).to(branch.dtype)


class VisionTransformer(nn.Module):
    """ViT with object tokens, mask tokens, registers and a choice of the patches it sees."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, depth, _ = config.shape
        self.config = config
        self.checkpoint_activations = False
        side = config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.reset()

    def reset(self) -> None:
        """Initialise as DINO and iBOT do: truncated normal of std 0.02, zero biases and mask token."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                constant_(module.gamma, module.value)
        self.patch_embed.proj.reset_parameters()
        trunc_normal_(self.pos_embed, std=0.02)
        if self.config.position_init == "sincos":
            side = self.config.image_size // self.config.patch_size
            with torch.no_grad():
                self.pos_embed[:, 1:] = sincos_positions((side, side), self.config.shape[0], amplitude=0.5)
        trunc_normal_(self.cls_token, std=0.02)
        zeros_(self.mask_token)
        if self.reg_token is not None:
            normal_(self.reg_token, std=1e-6)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        objects: Bool[Tensor, "B M N"] | None = None,
        masked: Bool[Tensor, "B N"] | None = None,
        keep: Int64[Tensor, "B K"] | None = None,
    ) -> Features:
        """Encode pictures whose sides are multiples of the patch size.

        Args:
            objects: patches that each object token may read; None = one token that reads all (the class
                token). An object without patches reads everything.
            masked: patches replaced by the mask token before positions are added.
            keep: indices of the patches to process; the others are dropped and cost nothing.
        """
        x, grid = self.embed(images, masked)
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
            objects = (
                None if objects is None else objects.gather(2, keep[:, None].expand(-1, objects.shape[1], -1))
            )
        count = 1 if objects is None else objects.shape[1]
        registers = self.config.registers
        # The first entry of the position table belongs to the class token; registers have none.
        special = [(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], count, -1)]
        if self.reg_token is not None:
            special.append(self.reg_token.expand(x.shape[0], -1, -1))
        x = torch.cat((*(s.to(x.dtype) for s in special), x), dim=1)
        readable = None if objects is None else readable_tokens(objects, registers)
        for block in self.blocks:
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, count, readable, use_reentrant=False)
            else:
                x = block(x, count, readable)
        x = self.norm(x)
        tokens, extra, patches = x.split((count, registers, x.shape[1] - count - registers), dim=1)
        return Features(tokens, extra, patches, grid)

    def embed(
        self, images: Float[Tensor, "B 3 H W"], masked: Bool[Tensor, "B N"] | None
    ) -> tuple[Float[Tensor, "B N D"], tuple[int, int]]:
        """Patch tokens with positions, and their (rows, columns) grid."""
        patch = self.config.patch_size
        height, width = images.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"pictures of {height} x {width} pixels are not made of whole {patch} x {patch} patches"
            )
        grid = (height // patch, width // patch)
        x = self.patch_embed(images)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        positions = resize_positions(self.pos_embed[:, 1:], grid, self.config.position_antialias)
        return x + positions.to(x.dtype), grid
